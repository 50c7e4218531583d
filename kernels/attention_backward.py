"""The attention backward: Triton kernels for dK and dV, dQ and the bias, and their launcher.

Each gradient has a kernel of its own whose program owns a tile of the result and runs over
everything that adds to it in a fixed order: no atomics, the same bits in every run. The scores are
computed again, by the helpers of the forward (Dao et al. 2022, algorithm 4).
"""
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false
# (a kernel declares its constant argument tl.constexpr, whatever that holds, and is called with
# options that are no parameters)

import math

import triton
import triton.language as tl
from torch import Tensor

from .attention_arguments import (
    SIZES,
    Arguments,
    check,
    check_gradients,
    dense,
    on_device,
    workspace,
)
from .attention_bias_gradient import bias_gradient
from .attention_gradients import Own, delta_of, probabilities, score_gradients
from .attention_live import live_tiles
from .attention_table import Config
from .tile import (
    LOG2E,
    Dropout,
    Limits,
    Row,
    base,
    bounds,
    cap_slope,
    keep_mask,
    key_range,
    listed,
    load_rows,
    program,
    query_range,
    row_base,
    shift_of,
    source,
    store_rows,
)

# ---- dK and dV ----------------------------------------------------------------------------


@triton.jit
def grouped_source(
    ptr, view, group, length, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """As `source`, for the rows of `group` heads in a row."""
    src = ptr
    if DESCRIPTORS:
        # A descriptor of no rows is not valid, and never read.
        shape = [group, tl.maximum(length, 1), D]
        src = tl.make_tensor_descriptor(ptr, shape, [view.h, view.t, 1], [1, ROWS, BLOCK_D])
    return src


@triton.jit
def load_grouped_rows(
    src, view, member, t0, length, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    DESCRIPTORS: tl.constexpr, I64: tl.constexpr,
):  # fmt: skip
    """As `load_rows`, of one head of the group."""
    if DESCRIPTORS:
        x = src.load([member, t0, 0]).reshape(ROWS, BLOCK_D)
    else:
        ptr = src + member.to(tl.int64) * view.h
        x = load_rows(ptr, view, t0, length, ROWS, D, BLOCK_D, True, False, I64)
    return x


@triton.jit
def add_queries(
    dk, dv, of, q, do, q_source, do_source, lse, delta, slopes, group, only, first, last, tiles,
    C: tl.constexpr, MASKED: tl.constexpr, GROUPED: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Adds what the query tiles [first, last), or those listed there, give to dk and dv.

    Of head of.h + only; GROUPED, without a list: of each of the `group` heads from of.h on. One
    loop over heads and tiles leaves more registers than one in the other. It must not start at the
    constant 0: with two such loops ptxas 12.8 waits for every single product (its C7515).
    """
    BLOCK_M: tl.constexpr = C.BLOCK_M
    PRECISION: tl.constexpr = C.PRECISION
    start = first
    stop = last
    if GROUPED:
        start = first * group
        stop = last * group
    tile = listed(tiles, start, stop)
    for n in tl.range(start, stop, num_stages=C.STAGES):
        member = only
        if GROUPED:
            member = n % group
            tile = n // group
        h = of.h + member
        i0 = tile * BLOCK_M
        rows = i0 + tl.arange(0, BLOCK_M)
        i = rows[None, :]
        q_len = of.limits.q_len
        exists = rows < q_len
        y = load_grouped_rows(
            q_source, q, member, i0, q_len, BLOCK_M, C.D, C.BLOCK_D, C.DESCRIPTORS, C.I64
        )
        total = tl.load(row_base(lse, of.b, h) + rows, mask=exists, other=float("inf"))[None, :]
        slope = None
        if slopes is not None:
            slope = tl.load(row_base(slopes, of.b, h)) * LOG2E
        p, product = probabilities(
            of.x, tl.trans(y), i, of.at, h, slope, total, of, C, MASKED, False
        )
        w = load_grouped_rows(
            do_source, do, member, i0, q_len, BLOCK_M, C.DV, C.BLOCK_DV, C.DESCRIPTORS, C.I64
        )
        if PART != "k":
            kept = p
            if of.dropout.seed is not None:
                keep = keep_mask(of.dropout, i, of.at, h, of.b)
                kept = tl.where(keep, p * of.dropout.gain, 0.0)
            dv = tl.dot(kept.to(w.dtype), w, dv, input_precision=PRECISION)
        if PART != "v":
            d = tl.load(row_base(delta, of.b, h) + rows, mask=exists, other=0.0)[None, :]
            ds = score_gradients(p, of.u, tl.trans(w), i, of.at, h, d, of, C)
            if of.rule.cap is not None:
                ds = ds * cap_slope(product, of.rule)
            dk = tl.dot(ds.to(y.dtype), y, dk, input_precision=PRECISION)
        tile = listed(tiles, n + 1, stop)
    return dk, dv


@triton.jit(do_not_specialize=SIZES)
def dkdv_kernel(
    q, k, v, do, lse, delta, dk, dv, mask, bias, q_lens, k_lens, cu_q, cu_k, slopes, rule, scale,
    live, seed, threshold, gain, left, right, n_heads, group, max_q, max_k, q_rows, k_rows,
    n_tiles, section, pairs, C: tl.constexpr, GROUPED: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """dk and dv of one tile of keys of one (batch, key head) pair, summed over its query heads;
    or one of them, where PART is "k" or "v"."""
    BLOCK_N: tl.constexpr = C.BLOCK_N
    BLOCK_D: tl.constexpr = C.BLOCK_D
    BLOCK_DV: tl.constexpr = C.BLOCK_DV
    tile, pair = program(n_tiles, section, pairs, False)
    b = pair // (n_heads // group)
    kv_head = pair % (n_heads // group)
    h = kv_head * group
    q0, q_len = bounds(b, q_lens, cu_q, max_q, q_rows)
    k0, k_len = bounds(b, k_lens, cu_k, max_k, k_rows)
    limits = Limits(q_len, k_len, shift_of(q_len, k_len, C.TOP_LEFT), left, right)
    j0 = tile * BLOCK_N
    j = j0 + tl.arange(0, BLOCK_N)
    k_base = base(k, b, kv_head, k0)
    v_base = base(v, b, kv_head, k0)
    k_source = source(k_base, k, k_len, BLOCK_N, C.D, BLOCK_D, C.DESCRIPTORS)
    v_source = source(v_base, v, k_len, BLOCK_N, C.DV, BLOCK_DV, C.DESCRIPTORS)
    x = load_rows(k_source, k, j0, k_len, BLOCK_N, C.D, BLOCK_D, True, C.DESCRIPTORS, C.I64)
    u = load_rows(v_source, v, j0, k_len, BLOCK_N, C.DV, BLOCK_DV, True, C.DESCRIPTORS, C.I64)
    q_base = base(q, b, h, q0)
    do_base = base(do, b, h, q0)
    q_source = grouped_source(q_base, q, group, q_len, C.BLOCK_M, C.D, BLOCK_D, C.DESCRIPTORS)
    do_source = grouped_source(do_base, do, group, q_len, C.BLOCK_M, C.DV, BLOCK_DV, C.DESCRIPTORS)
    lse = Row(lse.ptr + q0, lse.b, lse.h)
    delta = Row(delta.ptr + q0, delta.b, delta.h)
    word = None
    if seed is not None:
        word = tl.load(seed)
    dropout = Dropout(word, threshold, gain)
    of = Own(x, u, j[:, None], b, h, limits, rule, bias, mask, dropout)
    sum_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    sum_v = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    if live is not None:
        # The lists of two heads differ in length: here the loops have to be one in the other.
        for member in tl.range(0, group):
            tiles = row_base(live, b, h + member) + tile.to(tl.int64) * live.t
            sum_k, sum_v = add_queries(
                sum_k, sum_v, of, q, do, q_source, do_source, lse, delta, slopes, group, member,
                1, tl.load(tiles) + 1, tiles, C, True, False, PART,
            )  # fmt: skip
    else:
        span = query_range(j0, j0 + BLOCK_N, limits, C.BLOCK_M)
        if right is not None:
            sum_k, sum_v = add_queries(
                sum_k, sum_v, of, q, do, q_source, do_source, lse, delta, slopes, group, h * 0,
                span.start, span.inner, None, C, True, GROUPED, PART,
            )  # fmt: skip
        sum_k, sum_v = add_queries(
            sum_k, sum_v, of, q, do, q_source, do_source, lse, delta, slopes, group, h * 0,
            span.inner, span.outer, None, C, False, GROUPED, PART,
        )  # fmt: skip
        if left is not None:
            sum_k, sum_v = add_queries(
                sum_k, sum_v, of, q, do, q_source, do_source, lse, delta, slopes, group, h * 0,
                span.outer, span.stop, None, C, True, GROUPED, PART,
            )  # fmt: skip
    rows = max_k
    if cu_k is not None:
        rows = k_len
    # A key beyond the end has the scores of a zero key, which are not its own.
    exists = (j < k_len)[:, None]
    if PART != "v":
        x = tl.where(exists, sum_k * scale, 0.0)
        store_rows(base(dk, b, kv_head, k0), dk, x, j0, rows, BLOCK_N, C.D, BLOCK_D, C.I64)
    if PART != "k":
        x = tl.where(exists, sum_v, 0.0)
        store_rows(base(dv, b, kv_head, k0), dv, x, j0, rows, BLOCK_N, C.DV, BLOCK_DV, C.I64)


# ---- dQ -----------------------------------------------------------------------------------


@triton.jit
def add_keys(
    dq, of, k, v, k_source, v_source, slope, lse, delta, first, last, tiles,
    C: tl.constexpr, MASKED: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Adds what the key tiles [first, last), or those listed there, give to dq; WHOLE: none of
    their keys is beyond k_len."""
    BLOCK_N: tl.constexpr = C.BLOCK_N
    PRECISION: tl.constexpr = C.PRECISION
    tile = listed(tiles, first, last)
    for n in tl.range(first, last, num_stages=C.STAGES):
        j0 = tile * BLOCK_N
        j = j0 + tl.arange(0, BLOCK_N)[None, :]
        k_len = of.limits.k_len
        y = load_rows(
            k_source, k, j0, k_len, BLOCK_N, C.D, C.BLOCK_D, not WHOLE, C.DESCRIPTORS, C.I64
        )
        w = load_rows(
            v_source, v, j0, k_len, BLOCK_N, C.DV, C.BLOCK_DV, not WHOLE, C.DESCRIPTORS, C.I64
        )
        p, product = probabilities(
            of.x, tl.trans(y), of.at, j, of.h, slope, lse, of, C, MASKED, WHOLE
        )
        ds = score_gradients(p, of.u, tl.trans(w), of.at, j, of.h, delta, of, C)
        if of.rule.cap is not None:
            ds = ds * cap_slope(product, of.rule)
        dq = tl.dot(ds.to(y.dtype), y, dq, input_precision=PRECISION)
        tile = listed(tiles, n + 1, last)
    return dq


@triton.jit(do_not_specialize=SIZES)
def dq_kernel(
    q, k, v, do, lse, delta, dq, mask, bias, q_lens, k_lens, cu_q, cu_k, slopes, rule, scale,
    live, seed, threshold, gain, left, right, n_heads, group, max_q, max_k, q_rows, k_rows,
    n_tiles, section, pairs, C: tl.constexpr,
):  # fmt: skip
    """dq of one tile of queries of one (batch, head) pair."""
    BLOCK_M: tl.constexpr = C.BLOCK_M
    BLOCK_D: tl.constexpr = C.BLOCK_D
    tile, pair = program(n_tiles, section, pairs, True)
    b = pair // n_heads
    h = pair % n_heads
    q0, q_len = bounds(b, q_lens, cu_q, max_q, q_rows)
    k0, k_len = bounds(b, k_lens, cu_k, max_k, k_rows)
    limits = Limits(q_len, k_len, shift_of(q_len, k_len, C.TOP_LEFT), left, right)
    i0 = tile * BLOCK_M
    i = i0 + tl.arange(0, BLOCK_M)
    x = load_rows(base(q, b, h, q0), q, i0, q_len, BLOCK_M, C.D, BLOCK_D, True, False, C.I64)
    u = load_rows(base(do, b, h, q0), do, i0, q_len, BLOCK_M, C.DV, C.BLOCK_DV, True, False, C.I64)
    exists = i < q_len
    total = tl.load(row_base(lse, b, h) + q0 + i, mask=exists, other=float("inf"))[:, None]
    d = tl.load(row_base(delta, b, h) + q0 + i, mask=exists, other=0.0)[:, None]
    k_base = base(k, b, h // group, k0)
    v_base = base(v, b, h // group, k0)
    k_source = source(k_base, k, k_len, C.BLOCK_N, C.D, C.BLOCK_D, C.DESCRIPTORS)
    v_source = source(v_base, v, k_len, C.BLOCK_N, C.DV, C.BLOCK_DV, C.DESCRIPTORS)
    slope = None
    if slopes is not None:
        slope = tl.load(row_base(slopes, b, h)) * LOG2E
    word = None
    if seed is not None:
        word = tl.load(seed)
    dropout = Dropout(word, threshold, gain)
    of = Own(x, u, i[:, None], b, h, limits, rule, bias, mask, dropout)
    sum_q = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if live is not None:
        tiles = row_base(live, b, h) + tile.to(tl.int64) * live.t
        stop = tl.load(tiles) + 1
        # As in the forward: only the last tile of the list may reach beyond the keys.
        last = tl.maximum(stop - 1, 1)
        sum_q = add_keys(
            sum_q, of, k, v, k_source, v_source, slope, total, d, 1, last, tiles, C, True, True
        )
        sum_q = add_keys(
            sum_q, of, k, v, k_source, v_source, slope, total, d, last, stop, tiles, C, True, False
        )
    else:
        span = key_range(i0, i0 + BLOCK_M, limits, C.BLOCK_N)
        if left is not None:
            sum_q = add_keys(
                sum_q, of, k, v, k_source, v_source, slope, total, d, span.start, span.inner, None,
                C, True, False,
            )  # fmt: skip
        sum_q = add_keys(
            sum_q, of, k, v, k_source, v_source, slope, total, d, span.inner, span.outer, None,
            C, False, True,
        )  # fmt: skip
        sum_q = add_keys(
            sum_q, of, k, v, k_source, v_source, slope, total, d, span.outer, span.stop, None,
            C, True, False,
        )  # fmt: skip
    rows = max_q
    if cu_q is not None:
        rows = q_len
    store_rows(base(dq, b, h, q0), dq, sum_q * scale, i0, rows, BLOCK_M, C.D, BLOCK_D, C.I64)


# ---- launch -------------------------------------------------------------------------------


def attention_backward(
    do: Tensor, dlse: Tensor | None, o: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor,
    mask: Tensor | None, bias: Tensor | None, q_lens: Tensor | None, k_lens: Tensor | None,
    alibi_slopes: Tensor | None, sinks: Tensor | None, seed: Tensor | None, cu_q: Tensor | None,
    cu_k: Tensor | None, causal: str | None, window_left: int, window_right: int, softcap: float,
    dropout_p: float, scale: float, max_q: int, max_k: int, deterministic: bool,
    need_dq: bool, need_dkv: bool, need_dbias: bool, *, config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """seqkern::attention_backward by Triton, the gradients of attention_forward.

    Args:
        do, dlse: the gradients of o and lse, any strides; dlse may be None.
        o, lse: what the forward returned.
        q ... deterministic: the op's, in its order; no sum depends on the order of programs.
        need_dq, need_dkv, need_dbias: which gradients are wanted.
        config: sizes of the tiles of every kernel; None asks the table for each.

    Returns:
        dq, dk, dv, dbias, dsinks, shaped and typed like their inputs; (0,) where absent or not
        wanted.

    Raises:
        TypeError, ValueError: an argument does not fit, see attention_arguments.check.
    """
    call = check(
        "attention_backward", q, k, v, mask, bias, q_lens, k_lens, alibi_slopes, sinks, seed,
        cu_q, cu_k, causal, window_left, window_right, softcap, dropout_p, scale, max_q, max_k,
    )  # fmt: skip
    check_gradients("attention_backward", call, do, dlse, o, lse)
    # Both are small, and have to be dense to be addressed by two strides.
    lse, dlse = lse.contiguous(), dense(dlse)
    # No result may alias another.
    dq, dk, dv, dbias, dsinks = (q.new_empty(0) for _ in range(5))
    with on_device(q), workspace(q.device):
        lse2, delta = delta_of(call, do, dlse, o, lse)
        if need_dq:
            dq = _query_gradient(call, do, lse2, delta, config)
        if need_dkv:
            dk, dv = _key_gradients(call, do, lse2, delta, config)
        if need_dbias and bias is not None:
            dbias = bias_gradient(call, bias, do, lse2, delta, config)
    if sinks is not None:
        dsinks = _sink_gradient(call, sinks, lse2, delta)
    return dq, dk, dv, dbias, dsinks


def _query_gradient(
    call: Arguments, do: Tensor, lse: Tensor, delta: Tensor, config: Config | None
) -> Tensor:
    dq = call.new_output(call.q, call.D)
    config = config or call.config("dq")
    n_tiles, pairs = -(-call.Tq // config.block_m), call.B * call.H
    if dq.numel():
        dq_kernel[(n_tiles * pairs,)](
            **call.common,
            do=call.view(do),
            lse=call.row(lse),
            delta=call.row(delta),
            dq=call.view(dq),
            scale=call.scale,
            live=live_tiles(call, config.block_m, config.block_n, transposed=False),
            n_tiles=n_tiles,
            section=call.section(pairs, call.H // call.Hkv),
            pairs=pairs,
            C=call.build(config, do, dq),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return dq


def _key_gradients(
    call: Arguments, do: Tensor, lse: Tensor, delta: Tensor, config: Config | None
) -> tuple[Tensor, Tensor]:
    dk, dv = call.new_output(call.k, call.D), call.new_output(call.v, call.DV)
    if not call.H:
        return dk.zero_(), dv.zero_()
    config = config or call.config("dkdv")
    n_tiles, pairs = -(-call.Tk // config.block_n), call.B * call.Hkv
    if not n_tiles * pairs:
        return dk, dv
    live = live_tiles(call, config.block_m, config.block_n, transposed=True)
    for part in ("k", "v") if config.split else ("kv",):
        dkdv_kernel[(n_tiles * pairs,)](
            **call.common,
            do=call.view(do),
            lse=call.row(lse),
            delta=call.row(delta),
            dk=call.view(dk),
            dv=call.view(dv),
            scale=call.scale,
            live=live,
            n_tiles=n_tiles,
            section=call.section(pairs, 1),
            pairs=pairs,
            C=call.build(config, do, dk, dv),
            GROUPED=call.Hkv < call.H,
            PART=part,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return dk, dv


def _sink_gradient(call: Arguments, sinks: Tensor, lse2: Tensor, delta: Tensor) -> Tensor:
    """-sum exp(sink - lse) delta over the batch and the queries."""
    taken = (sinks.float().unsqueeze(-1) - lse2 * math.log(2)).exp() * delta
    return -taken.sum(-1 if call.packed else (0, -1)).to(sinks.dtype)
