"""What the kernels of the additive attention backward share: the row sums delta, and the weights
and score gradients of one tile, by the helpers that gave the forward its scores."""
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false
# (a kernel declares its constant argument tl.constexpr, whatever that holds, and is called with
# options that are no parameters)

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .additive_arguments import SIZES, Arguments, plane, view
from .additive_table import Config
from .additive_tile import load_block, side, tile_products, tile_sums
from .tile import LOG2E, Limits, View, add_and_exclude, bounds, load_plane


class Scores(NamedTuple):
    """What the scores of a call are made of besides rows, and their softmax: v as pointer; lse in
    base 2 and delta (B, Tq), see delta_kernel; dweights, mask and bias as Planes or None."""

    v: Any
    lse2: Any
    delta: Any
    dweights: Any
    mask: Any
    bias: Any
    scale: Any


@triton.jit
def tile_scores(own, other, of, b, i, j, i0, j0, limits, C: tl.constexpr):
    """Scores in base 2 of BLOCK_M own rows and BLOCK_N others, at queries i and keys j."""
    s = tile_sums(own, other, of.v, i0, j0, C) * (of.scale * LOG2E)
    return add_and_exclude(s, i, j, b, b * 0, limits, None, of.bias, of.mask, C.I64)


@triton.jit
def score_gradients(own, other, of, b, i0, j0, limits, C: tl.constexpr, KEYS: tl.constexpr):
    """The weights and the gradients of the scores of one tile. KEYS: the own rows are keys."""
    i = i0 + tl.arange(0, C.BLOCK_M)[:, None]
    j = j0 + tl.arange(0, C.BLOCK_N)[None, :]
    if KEYS:
        s = tile_scores(own, other, of, b, j, i, i0, j0, limits, C)
        at = j
    else:
        s = tile_scores(own, other, of, b, i, j, i0, j0, limits, C)
        at = i
    row = b.to(tl.int64) * limits.q_len + at
    exists = at < limits.q_len
    p = tl.exp2(s - tl.load(of.lse2 + row, mask=exists, other=float("inf")))
    dp = tile_products(own, other, i0, j0, C)
    if of.dweights is not None:
        if KEYS:
            more = load_plane(of.dweights, b, b * 0, j, i, limits, False, C.I64)
        else:
            more = load_plane(of.dweights, b, b * 0, i, j, limits, False, C.I64)
        dp += more.to(tl.float32)
    ds = p * (dp - tl.load(of.delta + row, mask=exists, other=0.0))
    # What is excluded gives nothing, even where it is NaN.
    return p, tl.where(s == float("-inf"), 0.0, ds)


@triton.jit(do_not_specialize=SIZES)
def delta_kernel(
    q, k, v, queries, keys, o, do, lse, dlse, dweights, lse2, delta, mask, bias, k_lens, scale,
    n_tiles, max_q, max_k, D, DV, C: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(do * o) + rowsum(w * dweights) - dlse, and lse in base 2. A query that has no
    key gets 0 and +inf, which makes its weights 0."""
    BLOCK_M: tl.constexpr = C.BLOCK_M
    BLOCK_N: tl.constexpr = C.BLOCK_N
    BLOCK_C: tl.constexpr = C.BLOCK_C
    b = tl.program_id(0) // n_tiles
    i0 = tl.program_id(0) % n_tiles * BLOCK_M
    i = i0 + tl.arange(0, BLOCK_M)
    exists = i < max_q
    row = b.to(tl.int64) * max_q + i
    log = tl.load(lse + row, mask=exists, other=float("-inf"))
    some = log > float("-inf")
    some = some | (log != log)
    log = tl.where(some, log * LOG2E, float("inf"))
    total = tl.zeros([BLOCK_M], tl.float32)
    wide = b.to(tl.int64)
    o = View(o.ptr + wide * o.b, 0, 0, o.t, o.d)
    of_o = View(do.ptr + wide * do.b, 0, 0, do.t, do.d)
    for c in tl.range(0, DV, BLOCK_C):
        y = load_block(o, i0, max_q, c, DV, BLOCK_M, BLOCK_C, C.I64).to(tl.float32)
        z = load_block(of_o, i0, max_q, c, DV, BLOCK_M, BLOCK_C, C.I64).to(tl.float32)
        total += tl.sum(y * z, 1)
    if dlse is not None:
        total -= tl.load(dlse + row, mask=exists, other=0.0)
    if dweights is not None:
        k_len = bounds(b, k_lens, None, max_k, 0)[1]
        limits = Limits(max_q, k_len, b * 0, None, None)
        own = side(q, do, queries, b, max_q, D, DV)
        other = side(k, k, keys, b, k_len, D, DV)
        of = Scores(v, lse2, delta, dweights, mask, bias, scale)
        for n in tl.range(0, tl.cdiv(k_len, BLOCK_N)):
            j = n * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
            s = tile_scores(own, other, of, b, i[:, None], j, i0, n * BLOCK_N, limits, C)
            more = load_plane(dweights, b, b * 0, i[:, None], j, limits, False, C.I64)
            more = tl.where(s == float("-inf"), 0.0, more.to(tl.float32))
            total += tl.sum(tl.exp2(s - log[:, None]) * more, 1)
    tl.store(delta + row, tl.where(some, total, 0.0), mask=exists)
    tl.store(lse2 + row, log, mask=exists)


def delta_of(
    call: Arguments, tokens: dict[str, Any], do: Tensor, dweights: Tensor | None,
    dlse: Tensor | None, o: Tensor, lse: Tensor, config: Config,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """lse in base 2 and delta, see delta_kernel; without dweights tokens may be None."""
    lse2, delta = torch.empty_like(lse), torch.empty_like(lse)
    n_tiles = triton.cdiv(call.Tq, config.block_m)
    weighted = plane(dweights)
    delta_kernel[(call.B * n_tiles,)](
        **call.common(),
        **tokens,
        o=view(o),
        do=view(do),
        lse=lse,
        dlse=dlse,
        dweights=weighted,
        lse2=lse2,
        delta=delta,
        n_tiles=n_tiles,
        C=call.build(config, o, do, planes=(weighted,)),
        num_warps=config.num_warps,
        num_stages=1,
    )
    return lse2, delta
