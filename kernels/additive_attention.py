"""The additive attention forward: a Triton kernel for tiles of queries, one for single queries,
and their launcher.

Bahdanau, Cho and Bengio 2015, A.1.2. A program runs over the keys with an online softmax (Milakov
and Gimelshein 2018), so nothing of the size of all scores is stored unless the weights are asked
for.
"""
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false
# (a kernel declares its constant argument tl.constexpr, whatever that holds, and is called with
# options that are no parameters)

import torch
import triton
import triton.language as tl
from torch import Tensor

from .additive_arguments import SIZES, Arguments, check, view
from .additive_backward import additive_attention_backward as additive_attention_backward
from .additive_rows import attend_rows, few
from .additive_table import Config
from .additive_tile import load_block, side, tile_sums
from .attention_arguments import on_device
from .tile import LOG2E, Limits, add_and_exclude, bounds, log_sum_exp


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    q, k, value, v, queries, keys, o, work, lse, raw, mask, bias, k_lens, scale, n_tiles,
    max_q, max_k, D, DV, C: tl.constexpr,
):  # fmt: skip
    """o and lse of one tile of queries.

    work: (B, Tq, Dv) fp32, where o is before it is divided by the sum of its weights; the program
    adds to it by parts of a row, so that no row is too wide. raw: unless None, gets the scores in
    base 2 as (B, Tq, Tk).
    """
    BLOCK_M: tl.constexpr = C.BLOCK_M
    BLOCK_N: tl.constexpr = C.BLOCK_N
    BLOCK_C: tl.constexpr = C.BLOCK_C
    PRECISION: tl.constexpr = C.PRECISION
    b = tl.program_id(0) // n_tiles
    i0 = tl.program_id(0) % n_tiles * BLOCK_M
    k_len = bounds(b, k_lens, None, max_k, 0)[1]
    limits = Limits(max_q, k_len, b * 0, None, None)
    own = side(q, q, queries, b, max_q, D, DV)
    other = side(k, value, keys, b, k_len, D, DV)
    i = i0 + tl.arange(0, BLOCK_M)
    row = b.to(tl.int64) * max_q + i
    exists = (i < max_q)[:, None]
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    for n in tl.range(0, tl.cdiv(k_len, BLOCK_N)):
        j0 = n * BLOCK_N
        j = j0 + tl.arange(0, BLOCK_N)[None, :]
        s = tile_sums(own, other, v, i0, j0, C) * (scale * LOG2E)
        s = add_and_exclude(s, i[:, None], j, b, b * 0, limits, None, bias, mask, C.I64)
        if raw is not None:
            tl.store(raw + row[:, None] * max_k + j, s, mask=exists & (j < k_len))
        top = tl.maximum(m, tl.max(s, 1))
        # -inf - -inf is NaN; any finite number serves where there is no score.
        safe = tl.where(top == float("-inf"), 0.0, top)
        p = tl.exp2(s - safe[:, None])
        decay = tl.exp2(m - safe)
        l = l * decay + tl.sum(p, 1)
        m = top
        for c in tl.range(0, DV, BLOCK_C):
            d = c + tl.arange(0, BLOCK_C)[None, :]
            ptrs = work + row[:, None] * DV + d
            acc = tl.load(ptrs, mask=exists & (d < DV) & (n > 0), other=0.0) * decay[:, None]
            z = load_block(other.z, j0, k_len, c, DV, BLOCK_N, BLOCK_C, C.I64)
            acc = tl.dot(p.to(z.dtype), z, acc, input_precision=PRECISION)
            tl.store(ptrs, acc, mask=exists & (d < DV))
        # What a thread has stored another one may load.
        tl.debug_barrier()
    factor = tl.where(l == 0, 0.0, 1.0 / tl.where(l == 0, 1.0, l))[:, None]
    for c in tl.range(0, DV, BLOCK_C):
        d = c + tl.arange(0, BLOCK_C)[None, :]
        inside = exists & (d < DV)
        acc = tl.load(work + row[:, None] * DV + d, mask=inside & (k_len > 0), other=0.0) * factor
        ptrs = o + row[:, None] * DV + d
        tl.store(ptrs, acc.to(o.dtype.element_ty), mask=inside)
    tl.store(lse + row, log_sum_exp(m, l), mask=i < max_q)


@triton.jit(do_not_specialize=["max_q", "max_k"])
def weights_kernel(raw, weights, lse, k_lens, max_q, max_k, BLOCK: tl.constexpr):
    """exp(s - lse) of a row of scores in base 2, 0 beyond k_lens; raw and weights may be one."""
    row = tl.program_id(0).to(tl.int64)
    k_len = bounds(row // max_q, k_lens, None, max_k, 0)[1]
    total = tl.load(lse + row)
    total = tl.where(total == float("-inf"), float("inf"), total * LOG2E)
    for j0 in tl.range(0, max_k, BLOCK):
        j = j0 + tl.arange(0, BLOCK)
        s = tl.load(raw + row * max_k + j, mask=j < k_len, other=float("-inf"))
        p = tl.exp2(s - total)
        tl.store(weights + row * max_k + j, p.to(weights.dtype.element_ty), mask=j < max_k)


def additive_attention(
    query: Tensor, key: Tensor, value: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None,
    k_lens: Tensor | None, scale: float, need_weights: bool, *, config: Config | None = None,
    splits: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """seqkern::additive_attention by Triton, in fp16, bf16 or fp32 and rows of any width.

    Args:
        query ... need_weights: the op's, in its order.
        config: sizes of the tiles; None asks the table for query's device.
        splits: into how many parts the keys of few queries are split; 0 for a choice.

    Returns:
        o (B, Tq, Dv) and the weights (B, Tq, Tk), or (0,), in query's dtype; lse (B, Tq) in fp32.

    Raises:
        TypeError, ValueError: an argument does not fit, see additive_arguments.check.
    """
    call = check("additive_attention", query, key, value, v, mask, bias, k_lens, scale)
    fp32 = {"dtype": torch.float32, "device": query.device}
    o = query.new_empty(call.B, call.Tq, call.DV)
    lse = torch.empty(call.B, call.Tq, **fp32)
    weights, raw = query.new_empty(0), None
    if need_weights:
        weights = query.new_empty(call.B, call.Tq, call.Tk)
        raw = weights if weights.dtype == torch.float32 else torch.empty(weights.shape, **fp32)
    if not lse.numel():
        return o, weights, lse
    with on_device(query):
        config = config or call.config("forward")
        if few(call):
            attend_rows(call, o, lse, raw, config, splits)
        else:
            _attend_tiles(call, o, lse, raw, config)
        if weights.numel():
            weights_kernel[(lse.numel(),)](
                raw, weights, lse, call.k_lens, call.Tq, call.Tk, BLOCK=1024, num_warps=4
            )
    return o, weights, lse


def _attend_tiles(
    call: Arguments, o: Tensor, lse: Tensor, raw: Tensor | None, config: Config
) -> None:
    n_tiles = triton.cdiv(call.Tq, config.block_m)
    work = o
    if o.dtype != torch.float32:
        work = torch.empty(o.shape, dtype=torch.float32, device=o.device)
    forward_kernel[(call.B * n_tiles,)](
        **call.common(),
        **call.tokens(config),
        value=view(call.value),
        o=o,
        work=work,
        lse=lse,
        raw=raw,
        n_tiles=n_tiles,
        C=call.build(config),
        num_warps=config.num_warps,
        num_stages=1,
    )
