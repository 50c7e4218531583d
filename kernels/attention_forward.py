"""The attention forward: one Triton kernel for every feature, and its launcher.

Dao et al. 2022 and 2023 (FlashAttention, FlashAttention-2): a program holds a tile of queries and
runs over the tiles of keys with an online softmax, so nothing of size Tq x Tk is stored.
"""
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false
# (a kernel declares its constant argument tl.constexpr, whatever that holds, and is called with
# options that are no parameters)

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .attention_arguments import SIZES, Arguments, check, on_device, workspace
from .attention_live import live_tiles
from .attention_table import Config
from .tile import (
    LOG2E,
    Dropout,
    Limits,
    base,
    bounds,
    fold,
    keep_mask,
    key_range,
    listed,
    load_rows,
    log_sum_exp,
    program,
    row_base,
    shift_of,
    source,
    store_rows,
    tile_scores,
)


class Queries(NamedTuple):
    """What a program's tile of queries needs on its way over the keys."""

    x: Any
    i: Any
    b: Any
    h: Any
    k: Any
    v: Any
    limits: Any
    rule: Any
    slope: Any
    bias: Any
    mask: Any
    dropout: Any


@triton.jit
def attend(
    acc, m, l, of, k_source, v_source, first, last, tiles, C: tl.constexpr, MASKED: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """Folds the key tiles [first, last), or those that `tiles` lists there, into acc, m, l.

    WHOLE: none of their keys is beyond k_len.
    """
    BLOCK_N: tl.constexpr = C.BLOCK_N
    PRECISION: tl.constexpr = C.PRECISION
    factor = 1.0
    if C.RAW:
        factor = of.rule.scale
    tile = listed(tiles, first, last)
    for n in tl.range(first, last, num_stages=C.STAGES):
        j0 = tile * BLOCK_N
        j = j0 + tl.arange(0, BLOCK_N)[None, :]
        y = load_rows(
            k_source, of.k, j0, of.limits.k_len, BLOCK_N, C.D, C.BLOCK_D, not WHOLE,
            C.DESCRIPTORS, C.I64,
        )  # fmt: skip
        s, _ = tile_scores(
            of.x, tl.trans(y), of.i, j, of.b, of.h, of.limits, of.rule, of.slope, of.bias,
            of.mask, MASKED, WHOLE, C.RAW, C.I64, PRECISION,
        )  # fmt: skip
        z = load_rows(
            v_source, of.v, j0, of.limits.k_len, BLOCK_N, C.DV, C.BLOCK_DV, not WHOLE,
            C.DESCRIPTORS, C.I64,
        )  # fmt: skip
        keep = None
        if of.dropout.seed is not None:
            keep = keep_mask(of.dropout, of.i, j, of.h, of.b)
        acc, m, l = fold(acc, m, l, s, z, keep, factor, PRECISION)
        tile = listed(tiles, n + 1, last)
    return acc, m, l


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    q, k, v, o, lse, mask, bias, q_lens, k_lens, cu_q, cu_k, slopes, sinks, rule, live,
    seed, threshold, gain, left, right, n_heads, group, max_q, max_k, q_rows, k_rows,
    n_tiles, section, pairs, C: tl.constexpr,
):  # fmt: skip
    """o and lse of one tile of queries of one (batch, head) pair."""
    BLOCK_M: tl.constexpr = C.BLOCK_M
    BLOCK_DV: tl.constexpr = C.BLOCK_DV
    tile, pair = program(n_tiles, section, pairs, True)
    b = pair // n_heads
    h = pair % n_heads
    q0, q_len = bounds(b, q_lens, cu_q, max_q, q_rows)
    k0, k_len = bounds(b, k_lens, cu_k, max_k, k_rows)
    limits = Limits(q_len, k_len, shift_of(q_len, k_len, C.TOP_LEFT), left, right)
    i0 = tile * BLOCK_M
    i = i0 + tl.arange(0, BLOCK_M)
    x = load_rows(base(q, b, h, q0), q, i0, q_len, BLOCK_M, C.D, C.BLOCK_D, True, False, C.I64)
    k_base = base(k, b, h // group, k0)
    v_base = base(v, b, h // group, k0)
    k_source = source(k_base, k, k_len, C.BLOCK_N, C.D, C.BLOCK_D, C.DESCRIPTORS)
    v_source = source(v_base, v, k_len, C.BLOCK_N, C.DV, C.BLOCK_DV, C.DESCRIPTORS)
    slope = None
    if slopes is not None:
        slope = tl.load(row_base(slopes, b, h)) * LOG2E
    value = None
    if seed is not None:
        value = tl.load(seed)
    dropout = Dropout(value, threshold, gain)
    of = Queries(x, i[:, None], b, h, k, v, limits, rule, slope, bias, mask, dropout)

    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    if sinks is not None:
        m = tl.zeros([BLOCK_M], tl.float32) + tl.load(sinks + h).to(tl.float32) * LOG2E
        l = tl.where(m == float("-inf"), 0.0, 1.0)

    if live is not None:
        tiles = row_base(live, b, h) + tile.to(tl.int64) * live.t
        stop = tl.load(tiles) + 1
        # The list ascends, so that only its last tile may reach beyond the keys.
        last = tl.maximum(stop - 1, 1)
        acc, m, l = attend(acc, m, l, of, k_source, v_source, 1, last, tiles, C, True, True)
        acc, m, l = attend(acc, m, l, of, k_source, v_source, last, stop, tiles, C, True, False)
    else:
        span = key_range(i0, i0 + BLOCK_M, limits, C.BLOCK_N)
        if left is not None:
            acc, m, l = attend(
                acc, m, l, of, k_source, v_source, span.start, span.inner, None, C, True, False
            )
        acc, m, l = attend(
            acc, m, l, of, k_source, v_source, span.inner, span.outer, None, C, False, True
        )
        acc, m, l = attend(
            acc, m, l, of, k_source, v_source, span.outer, span.stop, None, C, True, False
        )

    if gain is not None:
        acc = acc * gain
    # What follows a sequence of a padded batch gets zeros; what follows a packed one is another's.
    rows = max_q
    if cu_q is not None:
        rows = q_len
    exists = i < q_len
    acc = acc * tl.where(exists & (l != 0), 1.0 / tl.where(l != 0, l, 1.0), 0.0)[:, None]
    store_rows(base(o, b, h, q0), o, acc, i0, rows, BLOCK_M, C.DV, BLOCK_DV, C.I64)
    total = tl.where(exists, log_sum_exp(m, l), float("-inf"))
    tl.store(row_base(lse, b, h) + q0 + i, total, mask=i < rows)


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None,
    q_lens: Tensor | None, k_lens: Tensor | None, alibi_slopes: Tensor | None,
    sinks: Tensor | None, seed: Tensor | None, cu_q: Tensor | None, cu_k: Tensor | None,
    causal: str | None, window_left: int, window_right: int, softcap: float, dropout_p: float,
    scale: float, max_q: int, max_k: int, deterministic: bool, *, config: Config | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """seqkern::attention by Triton: fp16 and bf16 with head dimensions to 512, fp32 to 256.

    Args:
        q ... deterministic: the op's, in its order; every sum has one order in either case.
        config: sizes of the tiles; None asks the table for q's device.

    Returns:
        o (B, H, Tq, Dv) in q's dtype and lse (B, H, Tq) in fp32; packed (Nq, H, Dv), (H, Nq).

    Raises:
        TypeError, ValueError: an argument does not fit, see attention_arguments.check.
    """
    call = check(
        "attention", q, k, v, mask, bias, q_lens, k_lens, alibi_slopes, sinks, seed, cu_q, cu_k,
        causal, window_left, window_right, softcap, dropout_p, scale, max_q, max_k,
    )  # fmt: skip
    o, lse = call.new_output(q, call.DV), call.new_rows(0.0)
    if o.numel():
        with on_device(q), workspace(q.device):
            _launch(call, o, lse, config or call.config("forward"))
    return o, lse


def _launch(call: Arguments, o: Tensor, lse: Tensor, config: Config) -> None:
    n_tiles, pairs = -(-call.Tq // config.block_m), call.B * call.H
    forward_kernel[(n_tiles * pairs,)](
        **call.common,
        o=call.view(o),
        lse=call.row(lse),
        sinks=call.sinks,
        live=live_tiles(call, config.block_m, config.block_n, transposed=False),
        n_tiles=n_tiles,
        section=call.section(pairs, call.H // call.Hkv),
        pairs=pairs,
        C=call.build(config, o),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
