"""What the kernels of the attention backward share: the probabilities of one tile and the
gradients of its scores, by the helpers that gave the forward its scores."""
# pyright: reportAttributeAccessIssue=false
# (a kernel declares its constant argument tl.constexpr, whatever that holds)

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .tile import add_and_exclude, keep_mask, tile_product


class Own(NamedTuple):
    """What a program holds of its tile, rows x and u and their positions, and what it needs to
    compute a tile of scores. h is the query head, or the first of those of a tile of keys."""

    x: Any
    u: Any
    at: Any
    b: Any
    h: Any
    limits: Any
    rule: Any
    bias: Any
    mask: Any
    dropout: Any


@triton.jit
def probabilities(x, y, i, j, h, slope, lse, of, C: tl.constexpr, MASKED: tl.constexpr):
    """exp(s - lse) of one tile and the products that s came from, for x y = q k^T or k q^T.

    lse is in base 2, +inf for a query that has nothing or does not exist.
    """
    PRECISION: tl.constexpr = C.PRECISION
    product = tile_product(x, y, of.rule, C.RAW, PRECISION)
    s = add_and_exclude(product, i, j, of.b, h, of.limits, slope, of.bias, of.mask, MASKED, C.I64)
    if C.RAW:
        s = s * of.rule.scale
    return tl.exp2(s - lse), product


@triton.jit
def score_gradients(p, u, w, i, j, h, delta, of, C: tl.constexpr):
    """ds of one tile, for u w = do v^T or v do^T."""
    PRECISION: tl.constexpr = C.PRECISION
    dp = tl.dot(u, w, input_precision=PRECISION)
    if of.dropout.seed is not None:
        keep = keep_mask(of.dropout, i, j, h, of.b)
        dp = tl.where(keep, dp * of.dropout.gain, 0.0)
    return p * (dp - delta)
