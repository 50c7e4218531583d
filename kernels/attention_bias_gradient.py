"""The gradient of the attention's additive bias: a Triton kernel and its launch.

A program owns a tile of the bias and sums the score gradients over everything that the tile was
broadcast to, in a fixed order.
"""
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false
# (a kernel declares its constant argument tl.constexpr, whatever that holds, and is called with
# options that are no parameters)

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_arguments import SIZES, Arguments, plane
from .attention_gradients import Own, probabilities, score_gradients
from .attention_table import Config
from .tile import (
    LOG2E,
    Dropout,
    Limits,
    base,
    bounds,
    key_range,
    load_rows,
    row_base,
    shift_of,
    store_plane,
)


@triton.jit(do_not_specialize=(*SIZES, "repeat_b", "repeat_h", "repeat_i", "repeat_j"))
def dbias_kernel(
    q, k, v, do, lse, delta, dbias, mask, bias, q_lens, k_lens, cu_q, cu_k, slopes, rule,
    seed, threshold, gain, left, right, n_heads, group, max_q, max_k, q_rows, k_rows,
    heads, tiles_i, tiles_j, repeat_b, repeat_h, repeat_i, repeat_j,
    SUM_I: tl.constexpr, SUM_J: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """One tile of dbias, summed over what the bias was broadcast over.

    The bias has `heads` heads and tiles_i x tiles_j tiles; each element of it served repeat_b
    batches, repeat_h heads and, where it has one query or one key (SUM_I, SUM_J), repeat_i tiles
    of queries and repeat_j tiles of keys.
    """
    BLOCK_M: tl.constexpr = C.BLOCK_M
    BLOCK_N: tl.constexpr = C.BLOCK_N
    pid = tl.program_id(0)
    tile_j = pid % tiles_j
    tile_i = pid // tiles_j % tiles_i
    own_h = pid // tiles_j // tiles_i % heads
    own_b = pid // tiles_j // tiles_i // heads
    word = None
    if seed is not None:
        word = tl.load(seed)
    dropout = Dropout(word, threshold, gain)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for more_b in tl.range(0, repeat_b):
        b = own_b + more_b
        q0, q_len = bounds(b, q_lens, cu_q, max_q, q_rows)
        k0, k_len = bounds(b, k_lens, cu_k, max_k, k_rows)
        limits = Limits(q_len, k_len, shift_of(q_len, k_len, C.TOP_LEFT), left, right)
        for more_h in tl.range(0, repeat_h):
            h = own_h + more_h
            slope = None
            if slopes is not None:
                slope = tl.load(row_base(slopes, b, h)) * LOG2E
            for more_i in tl.range(0, repeat_i):
                i0 = (tile_i + more_i) * BLOCK_M
                i = i0 + tl.arange(0, BLOCK_M)
                x = load_rows(
                    base(q, b, h, q0), q, i0, q_len, BLOCK_M, C.D, C.BLOCK_D, True, False, C.I64
                )
                u = load_rows(
                    base(do, b, h, q0), do, i0, q_len, BLOCK_M, C.DV, C.BLOCK_DV, True, False,
                    C.I64,
                )  # fmt: skip
                exists = i < q_len
                total = tl.load(row_base(lse, b, h) + q0 + i, mask=exists, other=float("inf"))
                d = tl.load(row_base(delta, b, h) + q0 + i, mask=exists, other=0.0)[:, None]
                of = Own(x, u, i[:, None], b, h, limits, rule, bias, mask, dropout)
                span = key_range(i0, i0 + BLOCK_M, limits, BLOCK_N)
                first = tl.maximum(span.start, tile_j)
                last = tl.minimum(span.stop, tile_j + repeat_j)
                for tile in tl.range(first, last, num_stages=C.STAGES):
                    j0 = tile * BLOCK_N
                    j = j0 + tl.arange(0, BLOCK_N)[None, :]
                    y = load_rows(
                        base(k, b, h // group, k0), k, j0, k_len, BLOCK_N, C.D, C.BLOCK_D, True,
                        False, C.I64,
                    )  # fmt: skip
                    w = load_rows(
                        base(v, b, h // group, k0), v, j0, k_len, BLOCK_N, C.DV, C.BLOCK_DV, True,
                        False, C.I64,
                    )  # fmt: skip
                    p, _ = probabilities(
                        x, tl.trans(y), of.at, j, h, slope, total[:, None], of, C, True, False
                    )
                    acc += score_gradients(p, u, tl.trans(w), of.at, j, h, d, of, C)
    ptr = dbias.ptr + own_b.to(tl.int64) * dbias.b + own_h.to(tl.int64) * dbias.h
    store_plane(
        ptr, dbias, acc, tile_i, tile_j, max_q, max_k, BLOCK_M, BLOCK_N, SUM_I, SUM_J, C.I64
    )


def bias_gradient(
    call: Arguments, bias: Tensor, do: Tensor, lse: Tensor, delta: Tensor, config: Config | None
) -> Tensor:
    """dbias, shaped and typed like the bias."""
    dbias = torch.empty(bias.shape, dtype=bias.dtype, device=bias.device)
    if not dbias.numel():
        return dbias
    config = config or call.config("dbias")
    # Dense, where the bias itself may be expanded.
    result = plane(dbias)
    full = -(-call.Tq // config.block_m), -(-call.Tk // config.block_n)
    batches, heads, *lengths = bias.shape
    sums = [n == 1 for n in lengths]
    tiles = [1 if n == 1 else many for n, many in zip(lengths, full)]
    repeats = [many if n == 1 else 1 for n, many in zip(lengths, full)]
    dbias_kernel[(batches * heads * tiles[0] * tiles[1],)](
        **call.common,
        do=call.view(do),
        lse=call.row(lse),
        delta=call.row(delta),
        dbias=result,
        heads=heads,
        tiles_i=tiles[0],
        tiles_j=tiles[1],
        repeat_b=call.B if batches == 1 else 1,
        repeat_h=call.H if heads == 1 else 1,
        repeat_i=repeats[0],
        repeat_j=repeats[1],
        SUM_I=sums[0],
        SUM_J=sums[1],
        C=call.build(config, do, planes=(result,)),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return dbias
