"""Additive attention in plain PyTorch: the definition, the fallback and the oracle.

With queries q_i (D), keys k_j (D), both projected already, values value_j (Dv) and v (D),

    t_ijd = tanh(q_id + k_jd)
    s_ij  = scale * sum_d v_d t_ijd + bias_ij
    s_ij  = -inf   where j >= k_lens, or not mask_ij
    lse_i = log sum_j exp(s_ij)
    w_ij  = exp(s_ij - lse_i),    o_i = sum_j w_ij value_j

after Bahdanau, Cho and Bengio 2015 (appendix A.1.2). A query to which nothing is left gives o = 0,
w = 0 and lse = -inf, and takes no gradient.

Backward, with do, dw and dlse the gradients of the three results:

    dP_ij    = do_i . value_j + dw_ij
    delta_i  = sum_j w_ij dP_ij - dlse_i
    ds_ij    = w_ij (dP_ij - delta_i),   dbias = ds
    dq_id    = scale v_d sum_j ds_ij (1 - t_ijd^2)
    dk_jd    = scale v_d sum_i ds_ij (1 - t_ijd^2)
    dv_d     = scale sum_bij ds_ij t_ijd
    dvalue_j = sum_i w_ij do_i

Both run over blocks of queries, so that t is never whole in memory. All functions take the
arguments of the op seqkern::additive_attention in its order; fp16 and bf16 are computed in fp32
and rounded once, at the end.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from seqkern.reference.attention import without_autocast, zero_beyond

# Elements of t that are in memory at once, unless a single query has more.
_BLOCK_ELEMENTS = 2**20


@without_autocast
def additive_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    k_lens: Tensor | None,
    scale: float,
    need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of query (B, Tq, D) over key (B, Tk, D) and value (B, Tk, Dv) with v (D,).

    Args:
        mask, bias: 3-D, broadcast to (B, Tq, Tk); boolean (True takes part) and floating.
        k_lens: (B,), clamped to [0, Tk]; keys and values beyond it are never read.
        scale: of the scores.
        need_weights: whether w is wanted.

    Returns:
        o (B, Tq, Dv) and w (B, Tq, Tk), or (0,) if not wanted, in query's dtype, and lse (B, Tq)
        in fp32 (fp64 for fp64).
    """
    dtype, outputs, weights, lses = query.dtype, [], [], []
    values = zero_beyond(value, k_lens)
    for block in _blocks(query, key, v, mask, bias, k_lens, scale):
        w, lse = _softmax(block.s)
        outputs.append((w @ values.to(w.dtype)).to(dtype))
        lses.append(lse)
        if need_weights:
            weights.append(w.to(dtype))
    w = torch.cat(weights, 1) if need_weights else query.new_empty(0)
    return torch.cat(outputs, 1), w, torch.cat(lses, 1)


@without_autocast
def additive_attention_backward(
    do: Tensor,
    dweights: Tensor | None,
    dlse: Tensor | None,
    o: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    k_lens: Tensor | None,
    scale: float,
    need_dq: bool,
    need_dk: bool,
    need_dvalue: bool,
    need_dv: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of `additive_attention`.

    Args:
        do, dweights, dlse: the gradients of the results; the last two may be None.
        o, lse: what `additive_attention` returned; o is not read here.
        need_dq, need_dk, need_dvalue, need_dv, need_dbias: which gradients are wanted.

    Returns:
        dquery, dkey, dvalue, dv, dbias, each shaped like its input and in its dtype; (0,) where
        not wanted.
    """
    values = zero_beyond(value, k_lens)
    dquery, dbias = [], []
    dkey = dvalue = dv = torch.zeros((), dtype=lse.dtype, device=lse.device)
    for rows, t, s, live in _blocks(query, key, v, mask, bias, k_lens, scale):
        empty = (lse[:, rows] == -torch.inf).unsqueeze(-1)
        w = (s - lse[:, rows].unsqueeze(-1).masked_fill(empty, torch.inf)).exp()
        g = do[:, rows].to(w.dtype).masked_fill(empty, 0)
        dP = g @ values.to(w.dtype).mT
        if dweights is not None:
            dP = dP + dweights[:, rows].to(w.dtype)
        delta = (w * dP).sum(-1, keepdim=True)
        if dlse is not None:
            delta = delta - dlse[:, rows].to(w.dtype).unsqueeze(-1)
        ds = w * (dP - delta)
        if live is not None:
            # What is excluded gives exactly nothing, even where it is NaN.
            ds, t = ds.masked_fill(~live, 0), t.masked_fill(~live.unsqueeze(-1), 0)
        if bias is not None and need_dbias:
            count = 1 if bias.size(1) == 1 else ds.size(1)
            dbias.append(ds.sum_to_size(bias.size(0), count, bias.size(2)))
        if need_dvalue:
            dvalue = dvalue + w.mT @ g
        if need_dv:
            dv = dv + scale * (ds.flatten() @ t.flatten(0, 2))
        if need_dq or need_dk:
            slopes = scale * v.to(w.dtype) * ds.unsqueeze(-1) * (1 - t * t)
            if need_dq:
                dquery.append(slopes.sum(2).to(query.dtype))
            if need_dk:
                dkey = dkey + slopes.sum(1)
    none = query.new_empty(0)
    return (
        torch.cat(dquery, 1) if need_dq else none,
        dkey.to(key.dtype) if need_dk else none,
        dvalue.to(value.dtype) if need_dvalue else none,
        dv.to(v.dtype) if need_dv else none,
        _joined(dbias, bias) if bias is not None and need_dbias else none,
    )


class Block(NamedTuple):
    """Some of the queries: which, t (B, n, Tk, D), s and what takes part, both (B, n, Tk); None
    where everything does."""

    rows: slice
    t: Tensor
    s: Tensor
    live: Tensor | None


def _blocks(query, key, v, mask, bias, k_lens, scale) -> Iterator[Block]:
    B, Tq, D = query.shape
    Tk = key.size(1)
    dtype = query.dtype if query.dtype in (torch.float32, torch.float64) else torch.float32
    key, v = zero_beyond(key, k_lens).to(dtype), v.to(dtype)
    size = max(1, _BLOCK_ELEMENTS // max(B * Tk * D, 1))
    # At least one, so that there is something of the right size to return.
    for first in range(0, max(Tq, 1), size):
        rows = slice(first, min(first + size, Tq))
        t = (query[:, rows].to(dtype).unsqueeze(2) + key.unsqueeze(1)).tanh()
        s = scale * (t @ v)
        live = None
        if k_lens is not None:
            live = (torch.arange(Tk, device=key.device) < k_lens[:, None]).unsqueeze(1)
        if mask is not None:
            part = _rows_of(mask, rows)
            live = part if live is None else live & part
        if bias is not None:
            part = _rows_of(bias, rows)
            s, finite = s + part.to(dtype), part != -torch.inf
            live = finite if live is None else live & finite
        if live is not None:
            live = live.expand(s.shape)
            s = s.masked_fill(~live, -torch.inf)
        yield Block(rows, t, s, live)


def _rows_of(t: Tensor, rows: slice) -> Tensor:
    """Those rows of a mask of which the rows may be one."""
    return t if t.size(1) == 1 else t[:, rows]


def _softmax(s: Tensor) -> tuple[Tensor, Tensor]:
    """w and lse of the scores (B, n, Tk)."""
    least, rows = torch.finfo(s.dtype).min, (*s.shape[:2], 1)
    top = s.detach().amax(-1, keepdim=True) if s.size(-1) else s.new_full(rows, least)
    # -inf only in a row without anything left, where any finite value will do.
    top = top.clamp(min=least)
    e = (s - top).exp()
    total = e.sum(-1, keepdim=True)
    empty = total == 0
    total = total.masked_fill(empty, 1)
    return e / total, (top + total.log()).masked_fill(empty, -torch.inf).squeeze(-1)


def _joined(dbias: list[Tensor], bias: Tensor) -> Tensor:
    """The blocks' gradients one below the other, or added up where bias has one row for all."""
    whole = torch.cat(dbias, 1)
    return whole.sum_to_size(bias.shape).to(bias.dtype)
