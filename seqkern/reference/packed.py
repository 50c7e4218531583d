"""Packed sequences (rows one after another, with their bounds) as a padded batch, and back."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def pad(rows: Tensor, cu: Tensor, length: int) -> Tensor:
    """(N, H, D) rows of packed sequences as (B, H, length, D), zeros beyond each one's end."""
    place = torch.arange(length, device=rows.device)
    if rows.size(0) == 0:
        return rows.new_zeros(cu.numel() - 1, rows.size(1), length, rows.size(2))
    index = (cu[:-1, None] + place).clamp(max=rows.size(0) - 1)
    padded = rows[index].transpose(1, 2)
    return padded.masked_fill((place >= cu.diff()[:, None])[:, None, :, None], 0)


def unpad(padded: Tensor, cu: Tensor, rows: int) -> Tensor:
    """The inverse of `pad`: (B, H, T, D) to (rows, H, D), zeros beyond the last sequence."""
    if padded.numel() == 0:
        return padded.new_zeros(rows, padded.size(1), padded.size(3))
    row = torch.arange(rows, device=padded.device)
    b = torch.searchsorted(cu[1:].contiguous(), row, right=True).clamp(max=padded.size(0) - 1)
    i = (row - cu[b]).clamp(max=padded.size(2) - 1)
    return padded[b, :, i].masked_fill((row >= cu[-1])[:, None, None], 0)


def forward(attention: Callable[..., Any], args: tuple) -> tuple[Tensor, Tensor]:
    """seqkern::attention of packed rows, by a function that takes a padded batch.

    Args:
        attention: takes the arguments of seqkern::attention, without cu_q and cu_k.
        args: those arguments, with cu_q and cu_k.

    Returns:
        o (Nq, H, Dv) and lse (H, Nq).
    """
    cu_q, rows = args[10], args[0].size(0)
    o, lse = attention(*_padded(args))
    return unpad(o, cu_q, rows), unpad(lse.unsqueeze(-1), cu_q, rows).squeeze(-1).T.contiguous()


def backward(
    attention_backward: Callable[..., Any],
    grads: tuple[Tensor, Tensor | None, Tensor, Tensor],
    args: tuple,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """seqkern::attention_backward likewise; grads are do, dlse, o and lse."""
    do, dlse, o, lse = grads
    cu_q, cu_k, max_q = args[10], args[11], args[-3]

    def by_row(t: Tensor) -> Tensor:
        return pad(t.T.unsqueeze(-1), cu_q, max_q).squeeze(-1)

    dq, dk, dv, dbias, dsinks = attention_backward(
        pad(do, cu_q, max_q),
        None if dlse is None else by_row(dlse),
        pad(o, cu_q, max_q),
        by_row(lse),
        *_padded(args),
        *needs,
    )
    if needs[0]:
        dq = unpad(dq, cu_q, args[0].size(0))
    if needs[1]:
        dk, dv = (unpad(t, cu_k, args[1].size(0)) for t in (dk, dv))
    return dq, dk, dv, dbias, dsinks


def _padded(args: tuple) -> tuple:
    q, k, v, mask, bias, _, _, slopes, sinks, seed, cu_q, cu_k, *rule = args
    max_q, max_k = rule[-3:-1]
    qkv = pad(q, cu_q, max_q), pad(k, cu_k, max_k), pad(v, cu_k, max_k)
    lens = cu_q.diff(), cu_k.diff()
    return *qkv, mask, bias, *lens, slopes, sinks, seed, None, None, *rule
