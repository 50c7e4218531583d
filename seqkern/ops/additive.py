"""Additive attention: the public function."""

from typing import Any

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active, _is_any_autocast_enabled
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from seqkern.ops import _additive_ops as _additive_ops
from seqkern.ops._additive_autograd import DERIVED, AdditiveAttention
from seqkern.ops._additive_checks import check_additive, check_mask, check_sequences
from seqkern.ops._attention_checks import check_vector
from seqkern.ops._checks import check_tensor
from seqkern.ops._derivatives import recorded
from seqkern.reference import additive as reference

_NAME = "additive_attention"
_op = torch.ops.seqkern.additive_attention.default


def additive_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    g: Tensor | None = None,
    k_lens: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    return_weights: bool = False,
    return_lse: bool = False,
) -> Any:
    """softmax_j(scale v . tanh(query_i + bias + key_j)) value_j, without any Tq x Tk x D in memory.

    The attention of Bahdanau, Cho and Bengio 2015 (appendix A.1.2) after its two projections:
    query is W s and key is U h there. `seqkern.reference.additive` has the formulas.

    Args:
        query: (B, Tq, D) of fp16, bf16, fp32 or fp64, with any strides. B, Tq and Tk may be 0.
        key, value: (B, Tk, D) and (B, Tk, Dv) of the same dtype.
        v: (D,), weighs the units of the score.
        bias: (D,), added inside the tanh.
        g: (), makes v into g v / ||v|| (weight normalisation, Salimans and Kingma 2016). A v of
            zeros has no direction and gives NaN.
        k_lens: (B,) int32 or int64, how many of the Tk are real, taken as 0 or Tk where outside
            [0, Tk]. What lies beyond is never read.
        mask: broadcasts to (B, Tq, Tk); boolean, True takes part, or floating, of query's dtype
            or float32, added to the scores; -inf excludes. A floating one has a gradient.
        scale: of the scores, before a mask is added; 1 if None.
        return_weights: whether to return the weights too.
        return_lse: whether to return the logarithm of the softmax's denominator too.

    Returns:
        o (B, Tq, Dv) in query's dtype; then, where asked for, the weights (B, Tq, Tk) in query's
        dtype and lse (B, Tq), float32 (float64 for float64), natural logarithm. All of them are
        differentiable. A query to which nothing is left gives o = 0, weights of 0 and
        lse = -inf, and takes no gradient.

    Under torch.autocast query, key, value, v and bias are cast to its dtype, unless they are
    float64.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: a size, dtype or device does not fit; the message names it.
    """
    args = _normal_form((query, key, value, v), bias, g, k_lens, mask, scale)
    o, weights, lse = _call((*args, return_weights))
    if not (return_weights or return_lse):
        return o
    return (o, *((weights,) if return_weights else ()), *((lse,) if return_lse else ()))


def _normal_form(tensors: tuple, bias, g, k_lens, mask, scale) -> tuple:
    """The arguments of seqkern::additive_attention, in order, but need_weights.

    Args:
        tensors: query, key, value, v.
    """
    for name, t in zip(("query", "key", "value", "v"), tensors, strict=True):
        check_tensor(_NAME, name, t)
    if bias is not None:
        check_tensor(_NAME, "bias", bias)
    if g is not None:
        tensors = *tensors[:3], _normalized(tensors[3], g)
    tensors = *tensors, bias
    if _is_any_autocast_enabled():
        tensors = _autocast(tensors)
    query, key, value, v, bias = tensors
    check_sequences(_NAME, query, key, value)
    if bias is not None:
        check_vector(_NAME, "bias", bias, query, query.size(2), (query.dtype,))
        query = query + bias
    boolean, added = _masks(mask, query, key)
    args = query, key, value, v, boolean, added, _lengths(k_lens, query, key), _scale(scale)
    check_additive(_NAME, *args)
    return args


def _normalized(v: Tensor, g: Tensor) -> Tensor:
    check_tensor(_NAME, "g", g)
    if g.dim() != 0:
        raise ValueError(f"{_NAME}: g must be a scalar, (), got {tuple(g.shape)}")
    if g.dtype != v.dtype or g.device != v.device:
        raise ValueError(
            f"{_NAME}: g must have the dtype and device of v, {v.dtype} on {v.device}, got "
            f"{g.dtype} on {g.device}"
        )
    return v * (g / torch.linalg.vector_norm(v))


def _autocast(tensors: tuple) -> tuple:
    device = tensors[0].device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def _masks(mask: Any, query: Tensor, key: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The mask with three dimensions: the boolean one or the one to be added."""
    if mask is None:
        return None, None
    check_tensor(_NAME, "mask", mask)
    m = mask[(None,) * (3 - mask.dim())] if mask.dim() < 3 else mask
    check_mask(_NAME, "mask", m, query, (query.size(0), query.size(1), key.size(1)))
    if m.dtype == torch.bool:
        return m, None
    if m.dtype not in (query.dtype, torch.float32):
        raise ValueError(
            f"{_NAME}: mask must be boolean, {query.dtype} or torch.float32, got {m.dtype}"
        )
    return None, m


def _lengths(k_lens: Any, query: Tensor, key: Tensor) -> Tensor | None:
    if k_lens is None:
        return None
    check_vector(_NAME, "k_lens", k_lens, query, query.size(0), (torch.int32, torch.int64))
    # A length beyond 32 bits must not wrap into a valid one.
    return k_lens if k_lens.dtype == torch.int32 else k_lens.clamp(0, key.size(1)).int()


def _scale(scale: Any) -> float:
    if scale is None:
        return 1.0
    if isinstance(scale, bool) or not isinstance(scale, int | float | torch.SymFloat):
        raise TypeError(f"{_NAME}: scale must be a number or None, got {type(scale).__name__}")
    return float(scale)


def _call(args: tuple) -> tuple[Tensor, Tensor, Tensor]:
    """seqkern::additive_attention, recorded where a derivative may be asked for."""
    transformed, compiling = _are_functorch_transforms_active(), is_compiling()
    if forward_ad._current_level >= 0 or (compiling and transformed):
        # Only plain PyTorch operations carry tangents, and only they can be traced by
        # torch.compile inside a transform.
        check_additive(_NAME, *args[:-1])
        return reference.additive_attention(*args)
    if not compiling and recorded([args[i] for i in DERIVED]):
        return AdditiveAttention.apply(*args)
    return _op(*args)
