"""What the kernels of the attention backward share: the row sums delta, the probabilities of one
tile and the gradients of its scores, by the helpers that gave the forward its scores."""
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false
# (a kernel declares its constant argument tl.constexpr, whatever that holds)

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .attention_arguments import SIZES, Arguments, block_of
from .tile import (
    LOG2E,
    base,
    bounds,
    keep_mask,
    load_rows,
    row_base,
    tile_scores,
)


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
def probabilities(
    x, y, i, j, h, slope, lse, of, C: tl.constexpr, MASKED: tl.constexpr, WHOLE: tl.constexpr
):  # fmt: skip
    """exp(s - lse) of one tile and the products that s came from, for x y = q k^T or k q^T.

    lse is in base 2, +inf for a query that has nothing or does not exist.
    """
    PRECISION: tl.constexpr = C.PRECISION
    s, product = tile_scores(
        x, y, i, j, of.b, h, of.limits, of.rule, slope, of.bias, of.mask, MASKED, WHOLE, C.RAW,
        C.I64, PRECISION,
    )  # fmt: skip
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


@triton.jit(do_not_specialize=SIZES)
def delta_kernel(
    o, do, lse, dlse, lse2, delta, q_lens, cu_q, n_heads, max_q, q_rows, n_tiles,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, I64: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(do * o) - dlse, and lse in base 2. A query that has nothing or does not exist
    gets 0 and +inf, which makes its probabilities 0."""
    pid = tl.program_id(0)
    pair = pid // n_tiles
    b = pair // n_heads
    h = pair % n_heads
    q0, q_len = bounds(b, q_lens, cu_q, max_q, q_rows)
    i0 = pid % n_tiles * BLOCK_M
    i = i0 + tl.arange(0, BLOCK_M)
    exists = i < q_len
    x = load_rows(base(o, b, h, q0), o, i0, q_len, BLOCK_M, DV, BLOCK_DV, True, False, I64)
    u = load_rows(base(do, b, h, q0), do, i0, q_len, BLOCK_M, DV, BLOCK_DV, True, False, I64)
    total = tl.sum(x.to(tl.float32) * u.to(tl.float32), 1)
    if dlse is not None:
        total -= tl.load(row_base(dlse, b, h) + q0 + i, mask=exists, other=0.0)
    log = tl.load(row_base(lse, b, h) + q0 + i, mask=exists, other=float("-inf"))
    # NaN has to stay visible.
    some = (log > float("-inf")) | (log != log)
    rows = max_q
    if cu_q is not None:
        rows = q_len
    tl.store(row_base(delta, b, h) + q0 + i, tl.where(some, total, 0.0), mask=i < rows)
    log = tl.where(some, log * LOG2E, float("inf"))
    tl.store(row_base(lse2, b, h) + q0 + i, log, mask=i < rows)


def delta_of(
    call: Arguments, do: Tensor, dlse: Tensor | None, o: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    """lse in base 2 and delta, see delta_kernel."""
    lse2, delta = call.new_rows(float("inf")), call.new_rows(0.0)
    block = 32 if call.DV > 128 else 64
    n_tiles = -(-call.Tq // block)
    names = "q_lens", "cu_q", "n_heads", "max_q", "q_rows"
    if delta.numel():
        delta_kernel[(n_tiles * call.B * call.H,)](
            **{name: call.common[name] for name in names},
            o=call.view(o),
            do=call.view(do),
            lse=call.row(lse),
            dlse=None if dlse is None else call.row(dlse),
            lse2=call.row(lse2),
            delta=call.row(delta),
            n_tiles=n_tiles,
            DV=call.DV,
            BLOCK_DV=block_of(call.DV),
            BLOCK_M=block,
            I64=call.needs_int64(o, do),
        )
    return lse2, delta
