"""The gradient of the additive attention's float mask: a Triton kernel and its launch.

A program owns a tile of the mask and sums the score gradients over everything that the tile was
broadcast to, in a fixed order.
"""
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false
# (a kernel declares its constant argument tl.constexpr, whatever that holds, and is called with
# options that are no parameters)

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .additive_arguments import SIZES, Arguments, plane, view
from .additive_gradients import Scores, score_gradients
from .additive_table import Config
from .additive_tile import side
from .tile import Limits, bounds, store_plane


@triton.jit(do_not_specialize=(*SIZES, "tiles_i", "tiles_j", "repeat_b", "repeat_i", "repeat_j"))
def dbias_kernel(
    q, k, value, v, queries, keys, do, lse2, delta, dweights, dbias, mask, bias, k_lens, scale,
    max_q, max_k, D, DV, tiles_i, tiles_j, repeat_b, repeat_i, repeat_j,
    SUM_I: tl.constexpr, SUM_J: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """One tile of dbias, summed over what the bias was broadcast over.

    The bias has tiles_i x tiles_j tiles for each batch; each element of it served repeat_b batches
    and, where it has one query or one key (SUM_I, SUM_J), repeat_i tiles of queries and repeat_j
    tiles of keys.
    """
    BLOCK_M: tl.constexpr = C.BLOCK_M
    BLOCK_N: tl.constexpr = C.BLOCK_N
    tile_j = tl.program_id(0) % tiles_j
    tile_i = tl.program_id(0) // tiles_j % tiles_i
    own_b = tl.program_id(0) // tiles_j // tiles_i
    of = Scores(v, lse2, delta, dweights, mask, bias, scale)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for more_b in tl.range(0, repeat_b):
        b = own_b + more_b
        k_len = bounds(b, k_lens, None, max_k, 0)[1]
        limits = Limits(max_q, k_len, b * 0, None, None)
        own = side(q, do, queries, b, max_q, D, DV)
        other = side(k, value, keys, b, k_len, D, DV)
        last = tl.minimum(tile_j + repeat_j, tl.cdiv(k_len, BLOCK_N))
        for more_i in tl.range(0, repeat_i):
            i0 = (tile_i + more_i) * BLOCK_M
            for n in tl.range(tile_j, last):
                _, ds = score_gradients(own, other, of, b, i0, n * BLOCK_N, limits, C, False)
                acc += ds
    ptr = dbias.ptr + own_b.to(tl.int64) * dbias.b
    store_plane(
        ptr, dbias, acc, tile_i, tile_j, max_q, max_k, BLOCK_M, BLOCK_N, SUM_I, SUM_J, C.I64
    )


def bias_gradient(
    call: Arguments, bias: Tensor, do: Tensor, scores: dict[str, Any], config: Config
) -> Tensor:
    """dbias, shaped and typed like the bias.

    Args:
        scores: the tokens, lse2, delta and dweights by name, as the kernel takes them.
    """
    dbias = torch.empty(bias.shape, dtype=bias.dtype, device=bias.device)
    if not dbias.numel():
        return dbias
    result = plane(dbias)
    full = triton.cdiv(call.Tq, config.block_m), triton.cdiv(call.Tk, config.block_n)
    sums = [n == 1 for n in bias.shape[1:]]
    tiles = [1 if one else many for one, many in zip(sums, full)]
    repeats = [many if one else 1 for one, many in zip(sums, full)]
    dbias_kernel[(bias.size(0) * tiles[0] * tiles[1],)](
        **call.common(),
        **scores,
        value=view(call.value),
        do=view(do),
        dbias=result,
        tiles_i=tiles[0],
        tiles_j=tiles[1],
        repeat_b=call.B if bias.size(0) == 1 else 1,
        repeat_i=repeats[0],
        repeat_j=repeats[1],
        SUM_I=sums[0],
        SUM_J=sums[1],
        C=call.build(config, do, planes=(result, scores["dweights"])),
        num_warps=config.num_warps,
        num_stages=1,
    )
    return dbias
