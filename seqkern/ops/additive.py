"""Additive attention: the public function."""

from typing import Any

import torch
from torch import Tensor
from torch._C import (
    _AutoDispatchBelowAutograd,
    _is_any_autocast_enabled,
)

from seqkern.ops import _additive_ops as _additive_ops
from seqkern.ops._additive_autograd import DERIVED, AdditiveAttention
from seqkern.ops._additive_checks import check_additive, check_public_mask, check_sequences
from seqkern.ops._attention_checks import INT, check_scale, check_vector, number
from seqkern.ops._checks import autocast, autocast_added, check_tensor
from seqkern.ops._derivatives import (
    in_plain_operations,
    only_plain_operations,
    recorded,
    takes_graph,
)
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

    Under torch.autocast query, key, value, v, bias and a mask of 16 bits are cast to its dtype, the
    former unless they are float64.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: a size, dtype or device does not fit; the message names it.
    """
    try:
        args = _normal_form((query, key, value, v), bias, g, k_lens, mask, scale)
        o, weights, lse = _call((*args, bool(return_weights)))
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        # The ops refuse what does not fit; only then is it worth finding out what it was. The
        # checks in advance would cost a single query as much as its arithmetic.
        _check((query, key, value, v), bias, g, k_lens, mask, scale)
        raise
    if not (return_weights or return_lse):
        return o
    return (o, *((weights,) if return_weights else ()), *((lse,) if return_lse else ()))


def _normal_form(tensors: tuple, bias, g, k_lens, mask, scale) -> tuple:
    """The arguments of seqkern::additive_attention, in order, but need_weights.

    Args:
        tensors: query, key, value, v.
    """
    if g is not None:
        tensors = *tensors[:3], normalized(tensors[3], g)
    query, key, value, v = tensors
    if _is_any_autocast_enabled():
        query, key, value, v, bias = autocast((*tensors, bias), query)
    if bias is not None:
        # Other shapes would broadcast.
        check_vector(_NAME, "bias", bias, query, query.size(2), (query.dtype,), "query")
        query = query + bias
    boolean = added = None
    if mask is not None:
        m = autocast_added(mask[(None,) * (3 - mask.dim())], query)
        boolean, added = (m, None) if m.dtype == torch.bool else (None, m)
    if k_lens is not None and k_lens.dtype == torch.int64:
        # A length beyond 32 bits must not wrap into a valid one.
        k_lens = k_lens.clamp(0, key.size(1)).int()
    return query, key, value, v, boolean, added, k_lens, _scale(scale)


def _check(tensors: tuple, bias, g, k_lens, mask, scale) -> None:
    """The arguments of `additive_attention`, by the names that they have there."""
    for name, t in zip(("query", "key", "value", "v"), tensors, strict=True):
        check_tensor(_NAME, name, t)
    if g is not None:
        normalized(tensors[3], g)
    if bias is not None:
        check_tensor(_NAME, "bias", bias)
    query, key, value, v, bias = autocast((*tensors, bias), tensors[0])
    check_sequences(_NAME, query, key, value)
    check_vector(_NAME, "v", v, query, query.size(2), (query.dtype,), "query")
    if bias is not None:
        check_vector(_NAME, "bias", bias, query, query.size(2), (query.dtype,), "query")
    if mask is not None:
        check_public_mask(_NAME, mask, query, key)
    if k_lens is not None:
        check_vector(_NAME, "k_lens", k_lens, query, query.size(0), INT, "query")
    _scale(scale)


def normalized(v: Tensor, g: Tensor) -> Tensor:
    """g v / ||v|| for v (D,) and g ()."""
    check_tensor(_NAME, "g", g)
    if g.dim() != 0:
        raise ValueError(f"{_NAME}: g must be a scalar, (), got {tuple(g.shape)}")
    if g.dtype != v.dtype or g.device != v.device:
        raise ValueError(
            f"{_NAME}: g must have the dtype and device of v, {v.dtype} on {v.device}, got "
            f"{g.dtype} on {g.device}"
        )
    return v * (g / torch.linalg.vector_norm(v))


def _scale(scale: Any) -> float:
    if scale is None:
        return 1.0
    scale = number(_NAME, "scale", scale)
    check_scale(_NAME, scale)
    return scale


def _call(args: tuple) -> tuple[Tensor, Tensor, Tensor]:
    """seqkern::additive_attention, recorded where a derivative may be asked for."""
    if only_plain_operations():
        check_additive(_NAME, *args[:-1])
        return in_plain_operations(_op, reference.additive_attention, *args)
    if takes_graph():
        return _op(*args)
    if recorded([args[i] for i in DERIVED]):
        return AdditiveAttention.apply(*args)
    # Not by way of the Autograd kernel, which is in Python and records nothing here.
    with _AutoDispatchBelowAutograd():
        return _op(*args)
