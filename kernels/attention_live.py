"""Which tiles a boolean mask leaves: the attention kernels visit no other."""
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false
# (a kernel declares its constant argument tl.constexpr, whatever that holds, and is called with
# options that are no parameters)

from typing import Any

import torch
import triton
import triton.language as tl

from .attention_arguments import SIZES, Arguments
from .tile import Limits, View, bounds, key_range, load_plane, query_range, shift_of


@triton.jit(do_not_specialize=SIZES)
def live_kernel(
    live, mask, q_lens, k_lens, cu_q, cu_k, left, right, n_heads, max_q, max_k, q_rows, k_rows,
    n_tiles, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TOP_LEFT: tl.constexpr,
    I64: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Lists, for one tile of queries, the tiles of keys in which something takes part: their
    number, then they. TRANSPOSED: for a tile of keys, those of queries."""
    pid = tl.program_id(0)
    own = pid % n_tiles
    h = pid // n_tiles % n_heads
    b = pid // n_tiles // n_heads
    _, q_len = bounds(b, q_lens, cu_q, max_q, q_rows)
    _, k_len = bounds(b, k_lens, cu_k, max_k, k_rows)
    limits = Limits(q_len, k_len, shift_of(q_len, k_len, TOP_LEFT), left, right)
    if TRANSPOSED:
        span = query_range(own * BLOCK_N, (own + 1) * BLOCK_N, limits, BLOCK_M)
    else:
        span = key_range(own * BLOCK_M, (own + 1) * BLOCK_M, limits, BLOCK_N)
    entries = live.ptr + pid.to(tl.int64) * live.t
    count = own * 0
    for other in tl.range(span.start, span.stop):
        i0, j0 = own * BLOCK_M, other * BLOCK_N
        if TRANSPOSED:
            i0, j0 = other * BLOCK_M, own * BLOCK_N
        i = i0 + tl.arange(0, BLOCK_M)[:, None]
        j = j0 + tl.arange(0, BLOCK_N)[None, :]
        if j0 + BLOCK_N <= k_len:
            x = load_plane(mask, b, h, i, j, limits, True, I64)
        else:
            x = load_plane(mask, b, h, i, j, limits, False, I64)
        some = tl.max(tl.max(x.to(tl.int32), 1), 0) > 0
        tl.store(entries + 1 + count, other, mask=some)
        count += some.to(tl.int32)
    tl.store(entries, count)


def live_tiles(call: Arguments, block_m: int, block_n: int, transposed: bool) -> View | None:
    """The lists that live_kernel makes, (B, H, tiles, 1 + tiles of the other side) int32 with B or
    H = 1 where they do not differ; None for a mask that has one value for a whole (b, h)."""
    mask = call.mask
    if mask is None or mask.size(2) == mask.size(3) == 1:
        return None
    tiles = -(-call.Tq // block_m), -(-call.Tk // block_n)
    n_tiles, n_others = reversed(tiles) if transposed else tiles
    ragged = call.packed or call.q_lens is not None or call.k_lens is not None
    B, H = call.B if ragged else mask.size(0), mask.size(1)
    lists = torch.empty(B, H, n_tiles, 1 + n_others, dtype=torch.int32, device=mask.device)
    b, h, t, d = lists.stride()
    if lists.numel():
        names = ("mask", "q_lens", "k_lens", "cu_q", "cu_k", "left", "right")
        sizes = ("max_q", "max_k", "q_rows", "k_rows")
        arguments: dict[str, Any] = {name: call.common[name] for name in (*names, *sizes)}
        live_kernel[(B * H * n_tiles,)](
            **arguments,
            live=View(lists, b, h, t, d),
            n_heads=H,
            n_tiles=n_tiles,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            TOP_LEFT=call.top_left,
            I64=call.needs_int64(),
            TRANSPOSED=transposed,
        )
    return View(lists, 0 if B == 1 else b, 0 if H == 1 else h, t, d)
