"""Attention over a cache: Triton kernels that split the keys, and one that appends to the cache.

Dao, Haziza, Massa and Sizov 2023 (Flash-Decoding): a few queries over many keys leave most of a
GPU idle where a program takes all keys of its queries, so the keys are split among programs, and
a second kernel combines what they found. The query heads that share a key head, with all their
queries, are the rows of one tile, so that the cache is read once for all of them. Pages are
those of Kwon et al. 2023 (PagedAttention), of any size.

Lengths and page numbers are read on the device: the grid depends on nothing but shapes, so that
a launch needs no synchronisation and may be replayed by a CUDA graph.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_arguments import (
    block_of,
    dense,
    on_device,
    precision,
    refuse,
    rule_of,
    slopes_of,
)
from .decode_arguments import (
    cache_arguments,
    check_cache,
    check_queries,
    check_rule,
    check_tensor,
    choose,
    choose_splits,
    common_width,
    needs_int64,
    power_of_2,
    slots,
    view,
)
from .tile import (
    LOG2E,
    Limits,
    View,
    add_and_exclude,
    base,
    bounds,
    fold,
    key_range,
    load_rows,
    log_sum_exp,
    row_base,
    shift_of,
    tile_product,
)

# Arguments that change from call to call: a kernel compiled for one value serves every other.
SIZES = ["left", "right", "n_heads", "group", "places", "pages", "n_tiles", "splits", "table_b"]
COMBINED_SIZES = ["n_heads", "max_q", "rows", "splits"]
APPENDED_SIZES = ["n_heads", "new", "places", "pages", "n_tiles", "table_b"]


# ---- kernels ------------------------------------------------------------------------------


@triton.jit
def find_pages(entries, stride, j, k_len, pages, PAGE: tl.constexpr):
    """The pages of places j (N,), and which places have none in the pool: they get page 0."""
    number = tl.load(entries + (j // PAGE).to(tl.int64) * stride, mask=j < k_len, other=0)
    absent = (number < 0) | (number >= pages)
    return tl.where(absent, 0, number).to(tl.int64), absent


@triton.jit
def load_pages(view, head, page, place, inside, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Places (N,) of pages (N,) as (N, BLOCK_D), zeros where not inside (N,) and beyond D."""
    d = tl.arange(0, BLOCK_D)[None, :]
    row = page * view.b + place.to(tl.int64) * view.t
    ptrs = view.ptr + head.to(tl.int64) * view.h + row[:, None] + d.to(tl.int64) * view.d
    return tl.load(ptrs, mask=inside[:, None] & (d < D), other=0.0)


@triton.jit
def add_sink(acc, m, l, sink):
    """Fold a logit without a value, in base 2, into the state of `tile.fold`."""
    top = tl.maximum(m, sink)
    safe = tl.where(top == float("-inf"), 0.0, top)
    decay = tl.exp2(m - safe)
    return acc * decay[:, None], top, l * decay + tl.exp2(sink - safe)


@triton.jit
def aligned(view, WIDE: tl.constexpr):
    """A view of which all strides but the last are multiples of WIDE elements.

    Triton finds out by itself about multiples of 16 elements, but 16 bytes are enough.
    """
    return View(
        view.ptr,
        view.b // WIDE * WIDE,
        view.h // WIDE * WIDE,
        view.t // WIDE * WIDE,
        view.d,
    )


@triton.jit(do_not_specialize=SIZES)
def decode_kernel(
    q, k, v, o, lse, parts, states, k_lens, table, table_b, table_t, slopes, sinks, rule,
    left, right, n_heads, group, max_q, places, pages, n_tiles, splits,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    TOP_LEFT: tl.constexpr, PAGE: tl.constexpr, SPLIT: tl.constexpr, I64: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of the rows (head of the group, query) of one key head, over one part of its keys.

    n_heads: key heads. group: query heads of each. PAGE: 0 where the cache is in one piece.
    With SPLIT the unfinished state goes to parts (splits, rows, DV) and states (2, splits, rows),
    rows being those of o; else o and lse are written.
    """
    if WIDE > 1:
        k = aligned(k, WIDE)
        v = aligned(v, WIDE)
    pair = tl.program_id(0) // n_tiles
    tile = tl.program_id(0) % n_tiles
    part = tl.program_id(1)
    b = pair // n_heads
    head = pair % n_heads
    k_len = bounds(b, k_lens, None, places, places)[1]
    limits = Limits(max_q, k_len, shift_of(max_q, k_len, TOP_LEFT), left, right)

    rows = group * max_q
    r = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    query_head = head * group + r // max_q
    i = r % max_q
    d = tl.arange(0, BLOCK_D)
    q_rows = query_head.to(tl.int64) * q.h + i.to(tl.int64) * q.t
    q_ptrs = q.ptr + b.to(tl.int64) * q.b + q_rows[:, None] + d[None, :].to(tl.int64) * q.d
    q_tile = tl.load(q_ptrs, mask=(r < rows)[:, None] & (d < D)[None, :], other=0.0)
    slope = None
    if slopes is not None:
        slope = tl.load(row_base(slopes, b, query_head), mask=r < rows, other=0.0)[:, None] * LOG2E

    # A tile that holds rows of several heads holds queries from anywhere.
    first = tile * BLOCK_M
    last = tl.minimum(first + BLOCK_M, rows) - 1
    one_head = first // max_q == last // max_q
    i0 = tl.where(one_head, first % max_q, 0)
    i1 = tl.where(one_head, last % max_q, max_q - 1) + 1
    span = key_range(i0, i1, limits, BLOCK_N)
    each = tl.cdiv(span.stop - span.start, splits)
    start = tl.minimum(span.start + part * each, span.stop)
    stop = tl.minimum(start + each, span.stop)

    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    zero = tl.full((), 0, tl.int64)
    for n in tl.range(start, stop, num_stages=STAGES):
        j0 = n * BLOCK_N
        j = j0 + tl.arange(0, BLOCK_N)
        if PAGE > 0:
            entries = table + b.to(tl.int64) * table_b
            page, absent = find_pages(entries, table_t, j, k_len, pages, PAGE)
            k_tile = load_pages(k, head, page, j % PAGE, j < k_len, D, BLOCK_D)
            v_tile = load_pages(v, head, page, j % PAGE, j < k_len, DV, BLOCK_DV)
        else:
            k_tile = load_rows(
                base(k, b, head, zero), k, j0, k_len, BLOCK_N, D, BLOCK_D, True, False, I64
            )
            v_tile = load_rows(
                base(v, b, head, zero), v, j0, k_len, BLOCK_N, DV, BLOCK_DV, True, False, I64
            )
        s = tile_product(q_tile, tl.trans(k_tile), rule, False, PRECISION)
        if PAGE > 0:
            # What is in no page has no value: its scores, and so the results, become NaN.
            s = tl.where(absent[None, :], float("nan"), s)
        s = add_and_exclude(
            s, i[:, None], j[None, :], b, head, limits, slope, None, None, I64
        )  # fmt: skip
        acc, m, l = fold(acc, m, l, s, v_tile, None, 1.0, PRECISION)

    row = pair.to(tl.int64) * rows + r
    dv = tl.arange(0, BLOCK_DV)
    exists = (r < rows)[:, None] & (dv < DV)[None, :]
    if SPLIT:
        all_rows = (tl.num_programs(0) // n_tiles).to(tl.int64) * rows
        row = part * all_rows + row
        tl.store(parts + row[:, None] * DV + dv[None, :], acc, mask=exists)
        tl.store(states + row, m, mask=r < rows)
        tl.store(states + splits * all_rows + row, l, mask=r < rows)
    else:
        if sinks is not None:
            sink = tl.load(sinks + query_head, mask=r < rows, other=0.0).to(tl.float32)
            acc, m, l = add_sink(acc, m, l, sink * LOG2E)
        out = acc / tl.where(l == 0, 1.0, l)[:, None]
        tl.store(o + row[:, None] * DV + dv[None, :], out.to(o.dtype.element_ty), mask=exists)
        tl.store(lse + row, log_sum_exp(m, l), mask=r < rows)


@triton.jit(do_not_specialize=COMBINED_SIZES)
def combine_kernel(
    parts, states, o, lse, sinks, n_heads, max_q, rows, splits,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, SPLITS: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One row of o and lse from the states of all parts. SPLITS: a power of two, >= splits."""
    row = tl.program_id(0).to(tl.int64)
    # rows * splits may be more than 32 bits hold.
    rows = rows.to(tl.int64)
    each = tl.arange(0, SPLITS)
    m = tl.load(states + each * rows + row, mask=each < splits, other=float("-inf"))
    top = tl.max(m, 0)
    if sinks is not None:
        head = (row // max_q) % n_heads
        sink = tl.load(sinks + head).to(tl.float32) * LOG2E
        top = tl.maximum(top, sink)
    safe = tl.where(top == float("-inf"), 0.0, top)
    dv = tl.arange(0, BLOCK_DV)
    acc = tl.zeros([BLOCK_DV], tl.float32)
    total = tl.zeros([BLOCK_S], tl.float32)
    for s0 in tl.range(0, splits, BLOCK_S):
        s = s0 + tl.arange(0, BLOCK_S)
        at = s * rows + row
        l = tl.load(states + splits * rows + at, mask=s < splits, other=0.0)
        # Parts without a key left their accumulators at 0; what is NaN there has to stay.
        weight = tl.exp2(tl.load(states + at, mask=s < splits, other=float("-inf")) - safe)
        total += l * weight
        part = tl.load(
            parts + at[:, None] * DV + dv[None, :],
            mask=(s < splits)[:, None] & (dv < DV)[None, :],
            other=0.0,
        )
        acc += tl.sum(part * weight[:, None], 0)
    l = tl.sum(total, 0)
    if sinks is not None:
        l += tl.exp2(sink - safe)
    out = acc / tl.where(l == 0, 1.0, l)
    tl.store(o + row * DV + dv, out.to(o.dtype.element_ty), mask=dv < DV)
    tl.store(lse + row, log_sum_exp(top, l))


@triton.jit(do_not_specialize=APPENDED_SIZES)
def append_kernel(
    k, v, k_new, v_new, k_lens, table, table_b, table_t, n_heads, new, places, pages, n_tiles,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_T: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """BLOCK_T new keys and values of one head to their places; nothing outside of the cache."""
    pair = tl.program_id(0) // n_tiles
    b = pair // n_heads
    head = pair % n_heads
    t = tl.program_id(0) % n_tiles * BLOCK_T + tl.arange(0, BLOCK_T)
    place = tl.load(k_lens + b).to(tl.int64) + t
    inside = (t < new) & (place >= 0) & (place < places)
    row = b.to(tl.int64) + place * 0
    slot = place
    if PAGE > 0:
        entries = table + b.to(tl.int64) * table_b
        row = tl.load(entries + (place // PAGE) * table_t, mask=inside, other=-1).to(tl.int64)
        slot = place % PAGE
        inside = inside & (row >= 0) & (row < pages)
    copy_rows(k, k_new, b, head, t, row, slot, inside, D, BLOCK_D)
    copy_rows(v, v_new, b, head, t, row, slot, inside, DV, BLOCK_DV)


@triton.jit
def copy_rows(cache, new, b, head, t, row, slot, inside, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """new[b, head, t] to cache[row, head, slot]."""
    d = tl.arange(0, BLOCK_D)[None, :].to(tl.int64)
    mask = inside[:, None] & (d < D)
    given = base(new, b, head, t.to(tl.int64))
    x = tl.load(given[:, None] + d * new.d, mask=mask, other=0.0)
    target = cache.ptr + row * cache.b + head.to(tl.int64) * cache.h + slot * cache.t
    tl.store(target[:, None] + d * cache.d, x, mask=mask)


# ---- launchers ----------------------------------------------------------------------------


def attention_decode(
    q, k_cache, v_cache, k_lens, block_table, alibi_slopes, sinks,
    causal, window_left, window_right, softcap, scale, splits,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """seqkern::attention_decode on the device of the tensors.

    Raises:
        TypeError: an argument is no tensor.
        ValueError: a rank, size, dtype, device or value does not fit; fp64 is refused.
    """
    op = "attention_decode"
    B, places = check_cache(op, k_cache, v_cache, k_lens, block_table)
    check_queries(op, q, k_cache, B, alibi_slopes, sinks)
    left, right = check_rule(op, causal, window_left, window_right, softcap, scale, splits)
    k_lens, sinks = k_lens.contiguous(), dense(sinks)
    H, Tq, D = q.shape[1:]
    Hkv, DV = k_cache.size(1), v_cache.size(3)
    o = torch.empty(B, H, Tq, DV, dtype=q.dtype, device=q.device)
    lse = torch.empty(B, H, Tq, dtype=torch.float32, device=q.device)
    if not lse.numel():
        return o, lse
    rows, block_d, block_dv = H // Hkv * Tq, block_of(D), block_of(DV)
    wide = common_width(k_cache, v_cache)
    config = choose(
        max(block_d, block_dv) * q.element_size(),
        rows,
        fp32=q.dtype == torch.float32,
        paged=block_table is not None,
        aligned=wide > 1,
        amd=torch.version.hip is not None,
    )
    n_tiles = -(-rows // config.block_m)
    programs = B * Hkv * n_tiles
    if not splits:
        seen = places if left is None or right is None else min(places, Tq + left + right)
        splits = choose_splits(programs, -(-seen // config.block_n), slots(q))
    parts, states = None, None
    if splits > 1:
        parts = torch.empty(splits, lse.numel(), DV, dtype=torch.float32, device=q.device)
        states = torch.empty(2, splits, lse.numel(), dtype=torch.float32, device=q.device)
    sizes = {"DV": DV, "BLOCK_DV": block_dv, "splits": splits}
    results = {"parts": parts, "states": states, "o": o, "lse": lse, "max_q": Tq}
    arguments = {
        "q": view(q),
        "k_lens": k_lens,
        "slopes": slopes_of(alibi_slopes),
        "sinks": sinks if splits == 1 else None,
        "rule": rule_of(softcap, scale),
        "left": left,
        "right": right,
        "n_heads": Hkv,
        "group": H // Hkv,
        "places": places,
        "n_tiles": n_tiles,
        "D": D,
        "BLOCK_D": block_d,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "STAGES": config.num_stages,
        "TOP_LEFT": causal == "top_left",
        "SPLIT": splits > 1,
        "WIDE": wide,
        "I64": needs_int64(k_cache, v_cache),
        "PRECISION": precision(q),
        "num_warps": config.num_warps,
    }
    arguments |= cache_arguments(k_cache, v_cache, block_table) | sizes | results
    with on_device(q):
        decode_kernel[(programs, splits)](**arguments)
        if splits > 1:
            each = power_of_2(splits)
            arguments = {"n_heads": H, "rows": lse.numel(), "sinks": sinks}
            arguments |= {"SPLITS": each, "BLOCK_S": min(16, each), "num_warps": 4}
            combine_kernel[(lse.numel(),)](**arguments, **sizes, **results)
    return o, lse


def cache_append(k_cache, v_cache, k_new, v_new, k_lens, block_table) -> None:
    """seqkern::cache_append on the device of the tensors.

    Raises:
        TypeError: an argument is no tensor.
        ValueError: a rank, size, dtype or device does not fit.
    """
    op = "cache_append"
    B, places = check_cache(op, k_cache, v_cache, k_lens, block_table)
    Hkv, D, DV = k_cache.size(1), k_cache.size(3), v_cache.size(3)
    new = k_new.size(2) if isinstance(k_new, Tensor) and k_new.dim() == 4 else 0
    for name, t, width in (("k_new", k_new, D), ("v_new", v_new, DV)):
        check_tensor(op, name, t, k_cache)
        if tuple(t.shape) != (B, Hkv, new, width):
            refuse(op, name, f"(B, Hkv, Tn, D) = {(B, Hkv, new, width)}", tuple(t.shape))
    if not B * new:
        return
    block_t = min(16, power_of_2(new))
    n_tiles = -(-new // block_t)
    arguments = {
        "k_new": view(k_new),
        "v_new": view(v_new),
        "k_lens": k_lens.contiguous(),
        "n_heads": Hkv,
        "new": new,
        "places": places,
        "n_tiles": n_tiles,
        "D": D,
        "DV": DV,
        "BLOCK_D": block_of(D),
        "BLOCK_DV": block_of(DV),
        "BLOCK_T": block_t,
    }
    with on_device(k_cache):
        append_kernel[(B * Hkv * n_tiles,)](
            **arguments, **cache_arguments(k_cache, v_cache, block_table)
        )
