"""Attention over all keys from attentions over parts of the keys."""

from collections.abc import Sequence

import torch
from torch import Tensor

from seqkern.ops._checks import check_tensor


def combine_partials(os: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """What attention over the keys of all parts together would return, for queries that attended
    to each part apart.

    Part n of the keys gave o_n and lse_n, the logarithm of its softmax's denominator. Then

        lse = log sum_n exp(lse_n),    o = sum_n exp(lse_n - lse) o_n

    which is the online softmax of Milakov and Gimelshein 2018, taken over parts in place of single
    keys; ring attention (Liu et al. 2023) passes the parts from process to process. Plain PyTorch
    operations: both results are differentiable in all that goes in, to any order. The order of the
    parts does not matter, and results may be combined again, so a part can be folded in as it
    arrives.

    A query sees the keys of each part where `attention` puts them: causality, windows and ALiBi
    have to be chosen for each part. A sink belongs to the whole row: give it to one part only.

    Args:
        os: o_n (..., Tq, Dv) of each part, one dtype: `attention(..., return_lse=True)[0]`.
        lses: lse_n (..., Tq) of each part; -inf for a query that saw no key of the part. The lse
            of `attention_varlen`, (H, Nq), has to be transposed first.

    Returns:
        o in the dtype of the parts, summed up in the lses' dtype, and lse. A query without keys in
        all parts gives o = 0 and lse = -inf, and takes no gradient.

    Raises:
        TypeError: something other than tensors in sequences.
        ValueError: no parts, or their numbers, shapes, dtypes or devices do not fit together.
    """
    _check("combine_partials", os, lses)
    stacked = torch.stack(tuple(lses))
    top = stacked.detach().amax(0)
    # Differences from -inf would be NaN; these rows are put right at the end.
    top = top.masked_fill(top == -torch.inf, 0)
    weights = (stacked - top).exp()
    total = weights.sum(0)
    empty = total == 0
    total = total.masked_fill(empty, 1)
    lse = (total.log() + top).masked_fill(empty, -torch.inf)
    shares = (weights / total).unsqueeze(-1)
    o = shares[0] * os[0]
    for share, part in zip(shares[1:], os[1:]):
        o = o + share * part
    return o.to(os[0].dtype), lse


def _check(name: str, os: Sequence[Tensor], lses: Sequence[Tensor]) -> None:
    for argument, parts in (("os", os), ("lses", lses)):
        if not isinstance(parts, list | tuple):
            raise TypeError(
                f"{name}: {argument} must be a list or a tuple, got {type(parts).__name__}"
            )
        for n, t in enumerate(parts):
            check_tensor(name, f"{argument}[{n}]", t)
    if not os or len(os) != len(lses):
        raise ValueError(
            f"{name}: os and lses must hold one entry for each part, got {len(os)} and {len(lses)}"
        )
    o, lse = os[0], lses[0]
    if o.shape[:-1] != lse.shape or o.dim() < 2:
        raise ValueError(
            f"{name}: lses[0] must be (..., Tq) for os[0] (..., Tq, Dv), "
            f"got {tuple(lse.shape)} and {tuple(o.shape)}"
        )
    wanted = torch.float64 if o.dtype == torch.float64 else torch.float32
    if not o.dtype.is_floating_point or lse.dtype != wanted:
        raise ValueError(
            f"{name}: lses[0] must be {wanted} for os[0] of {o.dtype}, got {lse.dtype}"
        )
    for argument, parts in (("os", os), ("lses", lses)):
        for n, t in enumerate(parts):
            given = tuple(t.shape), t.dtype, t.device
            first = tuple(parts[0].shape), parts[0].dtype, o.device
            if given != first:
                raise ValueError(
                    f"{name}: {argument}[{n}] must be like the first part, {first}, got {given}"
                )
