"""Attention that also hands out its weights, which the fused kernels never hold in memory."""

import torch
import torch.nn.functional as F
from torch import Tensor

from seqkern.ops._attention_checks import check_k_lens
from seqkern.ops._checks import autocast_added
from seqkern.ops._derivatives import visible
from seqkern.reference.attention import zero_beyond


@visible
def attention_with_weights(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    k_lens: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(scale q k^T + bias) v and the softmax itself, in plain PyTorch operations.

    Any derivative of any order comes from PyTorch's own formulas. Dropout is PyTorch's, with the
    numbers of its generator.

    Args:
        q: (B, H, Tq, D).
        k, v: (B, H, Tk, D) and (B, H, Tk, Dv).
        mask: boolean, broadcasts to (B, H, Tq, Tk); False excludes a key.
        bias: floating, broadcasts to (B, H, Tq, Tk).
        k_lens: (B,), how many keys are real; what lies beyond is not read.
        dropout_p: probability of dropping a weight, in [0, 1].
        scale: of the scores; 1 / sqrt(D) if None.

    Returns:
        o (B, H, Tq, Dv) and the weights (B, H, Tq, Tk) that made it, after dropout; zeros for a
        query to which no key is left.

    Raises:
        TypeError: k_lens is no Tensor.
        ValueError: dropout_p is outside [0, 1], or k_lens does not fit.
        RuntimeError: sizes do not fit.
    """
    if k_lens is not None:
        check_k_lens("attention_with_weights", k_lens, q, k.size(2))
        k, v = (zero_beyond(t, k_lens) for t in (k, v))
        real = torch.arange(k.size(2), device=k.device) < k_lens[:, None, None, None]
        mask = real if mask is None else mask & real
    scores = (q * (q.size(-1) ** -0.5 if scale is None else scale)) @ k.mT
    if bias is not None:
        scores = scores + autocast_added(bias, q)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    if mask is None and bias is None:
        weights = scores.softmax(-1)
    else:
        # The softmax of a row of -inf is NaN, and so is its gradient, whatever comes after.
        empty = scores.isneginf().all(-1, keepdim=True)
        weights = scores.masked_fill(empty, 0).softmax(-1).masked_fill(empty, 0)
    if dropout_p != 0:
        weights = F.dropout(weights, dropout_p)
    return weights.to(v.dtype) @ v, weights
