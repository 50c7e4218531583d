"""Checks of the additive attention ops: each raises with the argument's name and its value."""

from typing import Any

import torch
from torch import Tensor

from seqkern.ops._attention_checks import FLOATING, check_scale, check_vector
from seqkern.ops._checks import (
    autocast_added,
    check_device,
    check_like,
    check_tensor,
    compute_dtype,
)


def check_additive(
    op: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    k_lens: Tensor | None,
    scale: float,
) -> None:
    """The arguments of seqkern::additive_attention, but not the values of k_lens.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: a size, dtype or device does not fit.
    """
    check_sequences(op, query, key, value)
    check_vector(op, "v", v, query, query.size(2), (query.dtype,), "query")
    full = (query.size(0), query.size(1), key.size(1))
    if mask is not None:
        check_mask(op, "mask", mask, query, full)
        if mask.dtype != torch.bool:
            raise ValueError(f"{op}: mask must be boolean, got {mask.dtype}; bias is for the rest")
    if bias is not None:
        check_mask(op, "bias", bias, query, full)
        if bias.dtype not in (query.dtype, torch.float32):
            raise ValueError(f"{op}: bias must be {query.dtype} or torch.float32, got {bias.dtype}")
    if k_lens is not None:
        check_vector(op, "k_lens", k_lens, query, query.size(0), (torch.int32,), "query")
    check_scale(op, scale)


def check_sequences(op: str, query: Tensor, key: Tensor, value: Tensor) -> None:
    """Ranks, sizes, dtypes and devices of query (B, Tq, D), key (B, Tk, D), value (B, Tk, Dv)."""
    forms = ("query", query, "(B, Tq, D)"), ("key", key, "(B, Tk, D)"), ("value", value, "")
    for name, t, form in forms:
        check_tensor(op, name, t)
        if t.dim() != 3:
            hint = "; one sequence is a batch of one, unsqueeze(0)" if t.dim() == 2 else ""
            raise ValueError(
                f"{op}: {name} must be {form or '(B, Tk, Dv)'}, got {tuple(t.shape)}{hint}"
            )
    if query.dtype not in FLOATING:
        raise ValueError(f"{op}: query must be fp32, fp64, bf16 or fp16, got {query.dtype}")
    for name, t, _ in forms[1:]:
        check_like(op, name, t, query, "query")
    B, _, D = query.shape
    if key.size(0) != B or key.size(2) != D:
        raise ValueError(f"{op}: key must be (B, Tk, D) = ({B}, Tk, {D}), got {tuple(key.shape)}")
    Tk = key.size(1)
    if value.size(0) != B or value.size(1) != Tk:
        raise ValueError(
            f"{op}: value must be (B, Tk, Dv) = ({B}, {Tk}, Dv), got {tuple(value.shape)}"
        )
    for name, t, width in (("query", query, "D"), ("value", value, "Dv")):
        if t.size(2) == 0:
            raise ValueError(f"{op}: {name} must have {width} > 0, got {tuple(t.shape)}")


def check_mask(op: str, name: str, t: Tensor, query: Tensor, full: tuple[int, int, int]) -> None:
    """A 3-D tensor on query's device that broadcasts to `full` = (B, Tq, Tk)."""
    check_tensor(op, name, t)
    check_device(op, name, t, query, "query")
    if t.dim() != 3 or any(n not in (1, m) for n, m in zip(t.shape, full, strict=True)):
        raise ValueError(
            f"{op}: {name} must broadcast to (B, Tq, Tk) = {tuple(full)}, got {tuple(t.shape)}"
        )


def check_public_mask(op: str, t: Any, query: Tensor, key: Tensor) -> None:
    """A mask as the public function takes it: of fewer dimensions too, and boolean or added."""
    check_tensor(op, "mask", t)
    full = query.size(0), query.size(1), key.size(1)
    check_mask(op, "mask", t[(None,) * (3 - t.dim())], query, full)
    dtype = compute_dtype(query)
    if autocast_added(t, query).dtype not in (torch.bool, dtype, torch.float32):
        raise ValueError(f"{op}: mask must be boolean, {dtype} or torch.float32, got {t.dtype}")


def check_additive_backward(
    op: str,
    do: Tensor,
    dweights: Tensor | None,
    dlse: Tensor | None,
    o: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
) -> None:
    """What the backward takes besides the forward's arguments.

    Raises:
        ValueError: a size, dtype or device does not match.
    """
    B, Tq, _ = query.shape
    Tk, Dv = value.shape[1:]
    exact = torch.float64 if query.dtype == torch.float64 else torch.float32
    expected = {
        "do": (do, (B, Tq, Dv), query.dtype),
        "dweights": (dweights, (B, Tq, Tk), query.dtype),
        "dlse": (dlse, (B, Tq), exact),
        "o": (o, (B, Tq, Dv), query.dtype),
        "lse": (lse, (B, Tq), exact),
    }
    for name, (t, shape, dtype) in expected.items():
        if t is None:
            continue
        if tuple(t.shape) != shape or t.dtype != dtype or t.device != query.device:
            raise ValueError(
                f"{op}: {name} must be {shape} of {dtype} on {query.device}, got "
                f"{tuple(t.shape)} of {t.dtype} on {t.device}"
            )
