"""What the attention kernels share: the scores of one tile, folding a tile into a running softmax,
the tiles that the exclusions leave, the dropout mask, and the addressing of rows.

Scores are kept in base 2 (multiplied by log2 e), so that the exponential is exp2. A row's running
state is acc (the weighted sum of values), m (the largest score so far, -inf at first) and l (the
sum of exp2(s - m)); its log-sum-exp is (m + log2 l) ln 2.

An argument that may be absent is None, which a compiled kernel resolves at compile time: what a
call does not use costs nothing. Helpers take such arguments but return none: a compiled function
cannot return None. Sizes of blocks are powers of two of at least 16.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


class View(NamedTuple):
    """An operand (B, H, T, D): pointer and strides in elements. Packed rows have b = 0."""

    ptr: Any
    b: Any
    h: Any
    t: Any
    d: Any


class Plane(NamedTuple):
    """A mask or a bias (B, H, Tq, Tk): pointer and strides, 0 where it is broadcast."""

    ptr: Any
    b: Any
    h: Any
    i: Any
    j: Any


class Row(NamedTuple):
    """One number for each (b, h) or each query of it: pointer and strides of b and h."""

    ptr: Any
    b: Any
    h: Any


class Limits(NamedTuple):
    """What takes part: i < q_len, j < k_len, p - left <= j <= p + right with p = i + shift.

    left and right are None where there is no bound; causal is right = 0.
    """

    q_len: Any
    k_len: Any
    shift: Any
    left: Any
    right: Any


class Rule(NamedTuple):
    """From products to scores. Without a softcap: scale = the softmax scale times log2 e, and
    cap = None. With one: scale = the softmax scale / softcap, cap = softcap times log2 e."""

    scale: Any
    cap: Any


class Dropout(NamedTuple):
    """Keep where the random word is >= threshold; what is kept is multiplied by gain. seed is the
    number itself, or None where there is no dropout."""

    seed: Any
    threshold: Any
    gain: Any


class Span(NamedTuple):
    """Tiles [start, stop), of which [inner, outer) need no exclusion element by element."""

    start: Any
    inner: Any
    outer: Any
    stop: Any


# ---- scores -------------------------------------------------------------------------------


@triton.jit
def exp_minus_2(x):
    """exp(-2 |x|), which neither overflows nor loses a NaN."""
    return tl.exp2(tl.abs(x) * (-2.0 * LOG2E))


@triton.jit
def tanh_of_size(x, y, PRECISE: tl.constexpr):
    """tanh x from y, its size. PRECISE keeps the relative error near 0, where 1 - exp(-2x) cancels:
    it takes the series."""
    y = tl.where(x < 0, -y, y)
    if PRECISE:
        z = x * x
        series = z * (-1.0 / 3 + z * (2.0 / 15 + z * (-17.0 / 315 + z * (62.0 / 2835))))
        y = tl.where(tl.abs(x) < 0.25, x + x * series, y)
    return y


@triton.jit
def tanh(x, PRECISE: tl.constexpr):
    """tanh by exp2; PRECISE: see tanh_of_size."""
    e = exp_minus_2(x)
    return tanh_of_size(x, (1.0 - e) / (1.0 + e), PRECISE)


@triton.jit
def tile_product(x, y, rule, RAW: tl.constexpr, PRECISION: tl.constexpr):
    """scale x y in base 2, capped where the rule has a cap; fp32.

    RAW leaves the factor rule.scale to the one who exponentiates, where it costs nothing. It is
    allowed for a positive scale when nothing is added to the product and it is not capped.
    """
    s = tl.dot(x, y, input_precision=PRECISION)
    if rule.cap is not None:
        s = rule.cap * tanh(s * rule.scale, x.dtype == tl.float32)
    elif not RAW:
        s = s * rule.scale
    return s


@triton.jit
def cap_slope(product, rule):
    """The derivative 1 - tanh^2 of the softcap, from what tile_product returned."""
    t = product / rule.cap
    return 1.0 - t * t


@triton.jit
def add_and_exclude(s, i, j, b, h, limits, slope, bias, mask, I64: tl.constexpr):
    """Scores from products: bias and ALiBi added, -inf for what does not take part.

    Args:
        s: the products in base 2. i, j: positions of queries and keys, which broadcast to s.
        b, h: batch and query head.
        slope: ALiBi's slope times log2 e, or None.
        bias, mask: Planes, or None; the mask is non-zero where an element takes part.

    Queries beyond q_len are the caller's business.
    """
    more = None
    allowed = None
    if bias is not None:
        more = load_plane(bias, b, h, i, j, limits, False, I64)
    if mask is not None:
        allowed = load_plane(mask, b, h, i, j, limits, False, I64)
    return add_loaded(s, i, j, limits, slope, more, allowed, True)


@triton.jit
def add_loaded(s, i, j, limits, slope, more, allowed, MASKED: tl.constexpr):
    """As add_and_exclude, of the tiles of bias and mask themselves.

    MASKED: apply the limits. Without it the caller knows that all of the tile is within.
    """
    if more is not None:
        s += more.to(tl.float32) * LOG2E
    if slope is not None:
        s -= slope * tl.abs(i + limits.shift - j).to(tl.float32)
    if MASKED:
        keep = (j < limits.k_len) & (i == i)
        if limits.left is not None:
            keep = keep & (j >= i + limits.shift - limits.left)
        if limits.right is not None:
            keep = keep & (j <= i + limits.shift + limits.right)
        s = tl.where(keep, s, float("-inf"))
    if allowed is not None:
        s = tl.where(allowed != 0, s, float("-inf"))
    return s


@triton.jit
def tile_scores(
    x, y, i, j, b, h, limits, rule, slope, bias, mask,
    MASKED: tl.constexpr, WHOLE: tl.constexpr, RAW: tl.constexpr, I64: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The scores of one tile in base 2, -inf where excluded, and the products that they came from:
    tile_product, add_and_exclude.

    x y is q k^T with i (M, 1), j (1, N), or its transpose k q^T with i (1, M), j (N, 1).
    WHOLE: no key of the tile is beyond k_len.
    """
    # Bias and mask are loaded before the product. They are on their way meanwhile; and after it,
    # Triton would carry the softmax in their layout too, and compute all of it twice.
    more = None
    allowed = None
    if bias is not None:
        more = load_plane(bias, b, h, i, j, limits, WHOLE, I64)
    if mask is not None:
        allowed = load_plane(mask, b, h, i, j, limits, WHOLE, I64)
    product = tile_product(x, y, rule, RAW, PRECISION)
    s = add_loaded(product, i, j, limits, slope, more, allowed, MASKED)
    return s, product


@triton.jit
def fold(acc, m, l, s, v, keep, factor, PRECISION: tl.constexpr):
    """Fold scores s (M, N) and values v (N, Dv) into the state acc (M, Dv), m (M,), l (M,).

    Args:
        keep: what dropout keeps, or None; its gain is left to the end.
        factor: what RAW scores lack, else 1.

    Returns:
        acc, m, l, with rows of which nothing has taken part yet at 0, -inf, 0.
    """
    top = tl.maximum(m, tl.max(s, 1) * factor)
    # -inf - -inf is NaN; any finite number serves where there is no score.
    safe = tl.where(top == float("-inf"), 0.0, top)
    p = tl.exp2(s * factor - safe[:, None])
    decay = tl.exp2(m - safe)
    l = l * decay + tl.sum(p, 1)
    if keep is not None:
        p = tl.where(keep, p, 0.0)
    acc = acc * decay[:, None]
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, top, l


@triton.jit
def log_sum_exp(m, l):
    """The natural log-sum-exp of a state; -inf where l = 0, and NaN stays NaN."""
    some = l != 0
    return tl.where(some, (m + tl.log2(tl.where(some, l, 1.0))) * LN2, float("-inf"))


@triton.jit
def keep_mask(dropout, i, j, h, b):
    """Which elements dropout keeps: Philox-4x32 with 7 rounds (Salmon et al. 2011), keyed by the
    int64 seed and counting (j, i, h, b) with h the query head, so that it depends on no tile."""
    words = tl.philox(dropout.seed, j, i, h, b, n_rounds=7)
    return words[0] >= dropout.threshold.to(tl.uint32)


# ---- which tiles --------------------------------------------------------------------------


@triton.jit
def _span(a0, a1, shift, left, right, length, BLOCK: tl.constexpr, PARTIAL: tl.constexpr):
    low = a0 * 0
    high = low + length
    inner_low = low
    inner_high = high
    if PARTIAL:
        inner_high = tl.cdiv(high, BLOCK) * BLOCK
    if left is not None:
        low = tl.maximum(low, a0 + shift - left)
        inner_low = tl.maximum(inner_low, a1 - 1 + shift - left)
    if right is not None:
        high = tl.maximum(tl.minimum(high, a1 + shift + right), 0)
        inner_high = tl.maximum(tl.minimum(inner_high, a0 + 1 + shift + right), 0)
    some = (a0 < a1) & (low < high)
    start = low // BLOCK
    stop = tl.where(some, tl.cdiv(high, BLOCK), start)
    inner = tl.minimum(tl.maximum(tl.cdiv(inner_low, BLOCK), start), stop)
    outer = tl.minimum(tl.maximum(inner_high // BLOCK, inner), stop)
    return Span(start, inner, outer, stop)


@triton.jit
def key_range(i0, i1, limits, BLOCK_N: tl.constexpr):
    """The tiles of BLOCK_N keys that queries [i0, min(i1, q_len)) see: a Span."""
    end = tl.minimum(i1, limits.q_len)
    return _span(i0, end, limits.shift, limits.left, limits.right, limits.k_len, BLOCK_N, False)


@triton.jit
def query_range(j0, j1, limits, BLOCK_M: tl.constexpr):
    """The tiles of BLOCK_M queries that see a key of [j0, min(j1, k_len)): a Span.

    A last tile that reaches beyond q_len may count as inner: what it does not hold must have a
    probability of 0 by a log-sum-exp of +inf. So may keys beyond k_len.
    """
    end = tl.minimum(j1, limits.k_len)
    return _span(j0, end, -limits.shift, limits.right, limits.left, limits.q_len, BLOCK_M, True)


@triton.jit
def listed(tiles, n, last):
    """Entry n of a list of tiles, 0 from `last` on; n itself without a list.

    A loop asks for it an iteration ahead: with the load in front of those that depend on it, one
    stage of the pipeline of loads would be its alone.
    """
    tile = n
    if tiles is not None:
        tile = tl.load(tiles + n, mask=n < last, other=0)
    return tile


@triton.jit
def program(n_tiles, section, pairs, LAST_FIRST: tl.constexpr):
    """This program's tile and (batch, head) pair, for a grid of n_tiles * pairs.

    `section` pairs at a time run tile by tile, the longest tiles first, so that their keys and
    values stay in the cache and the short tiles fill the end.
    """
    pid = tl.program_id(0)
    first = pid // (section * n_tiles) * section
    width = tl.minimum(section, pairs - first)
    rest = pid - first * n_tiles
    tile = rest // width
    if LAST_FIRST:
        tile = n_tiles - 1 - tile
    return tile, first + rest % width


@triton.jit
def bounds(b, lens, cu, longest, rows):
    """First row (int64) and length (int32) of sequence b.

    Args:
        lens: (B,) lengths, or None. cu: (B + 1,) bounds of packed sequences, or None.
        longest: the padded length, or the longest packed sequence. rows: of the packed tensor.

    Values that would reach outside are clamped: the kernels own no other memory.
    """
    start = tl.full((), 0, tl.int64)
    length = b * 0 + longest
    if cu is not None:
        first = tl.minimum(tl.maximum(tl.load(cu + b), 0), rows)
        last = tl.minimum(tl.load(cu + b + 1), rows)
        start = first.to(tl.int64)
        length = tl.minimum(tl.maximum(last - first, 0), longest).to(tl.int32)
    if lens is not None:
        length = tl.minimum(tl.maximum(tl.load(lens + b), 0), longest).to(tl.int32)
    return start, length


@triton.jit
def shift_of(q_len, k_len, TOP_LEFT: tl.constexpr):
    """What takes a query to its key position: 0, or the last query to the last key."""
    shift = k_len - q_len
    if TOP_LEFT:
        shift = shift * 0
    return shift


# ---- memory -------------------------------------------------------------------------------


@triton.jit
def base(view, b, h, start):
    """Pointer to row `start` (int64) of head h of batch b."""
    return view.ptr + b.to(tl.int64) * view.b + h.to(tl.int64) * view.h + start * view.t


@triton.jit
def row_base(row, b, h):
    """Pointer to the number, or the first of the numbers, of head h of batch b."""
    return row.ptr + b.to(tl.int64) * row.b + h.to(tl.int64) * row.h


@triton.jit
def offsets(t, stride, I64: tl.constexpr):
    """t * stride, in 64 bits where 32 would not do."""
    if I64:
        t = t.to(tl.int64)
    return t * stride


@triton.jit
def source(ptr, view, length, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
           DESCRIPTORS: tl.constexpr):  # fmt: skip
    """What load_rows reads from: the pointer, or a descriptor of tiles (ROWS, BLOCK_D) of it."""
    src = ptr
    if DESCRIPTORS:
        # A descriptor of no rows is not valid, and never read.
        rows = tl.maximum(length, 1)
        # The declared types know no constants, which the width and the last stride have to be.
        src = tl.make_tensor_descriptor(
            ptr,
            [rows, D],  # pyright: ignore[reportArgumentType]
            [view.t, 1],  # pyright: ignore[reportArgumentType]
            [ROWS, BLOCK_D],
        )
    return src


@triton.jit
def load_rows(
    src, view, t0, length, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BOUNDED: tl.constexpr, DESCRIPTORS: tl.constexpr, I64: tl.constexpr,
):  # fmt: skip
    """Rows [t0, t0 + ROWS) as (ROWS, BLOCK_D), with zeros beyond length and D.

    BOUNDED = False says that all the rows are there.
    """
    if DESCRIPTORS:
        x = src.load([t0, 0])
    else:
        t = t0 + tl.arange(0, ROWS)[:, None]
        d = tl.arange(0, BLOCK_D)[None, :]
        ptrs = src + offsets(t, view.t, I64) + offsets(d, view.d, I64)
        if BOUNDED:
            inside = t < length
            if D < BLOCK_D:
                inside = inside & (d < D)
            x = tl.load(ptrs, mask=inside, other=0.0)
        elif D < BLOCK_D:
            x = tl.load(ptrs, mask=(d < D) & (t == t), other=0.0)
        else:
            x = tl.load(ptrs)
    return x


@triton.jit
def store_rows(
    ptr, view, x, t0, length, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    I64: tl.constexpr,
):  # fmt: skip
    """Writes x (ROWS, BLOCK_D) to rows [t0, t0 + ROWS), except beyond length and D."""
    t = t0 + tl.arange(0, ROWS)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    ptrs = ptr + offsets(t, view.t, I64) + offsets(d, view.d, I64)
    tl.store(ptrs, x.to(ptr.dtype.element_ty), mask=(t < length) & (d < D))


@triton.jit
def load_plane(plane, b, h, i, j, limits, WHOLE: tl.constexpr, I64: tl.constexpr):
    """The tile of a Plane at positions i, j (either orientation), 0 beyond the lengths.

    WHOLE says that no key is: without a condition along j, neighbours come in one load.
    """
    ptr = plane.ptr + b.to(tl.int64) * plane.b + h.to(tl.int64) * plane.h
    ptrs = ptr + (offsets(i, plane.i, I64) + offsets(j, plane.j, I64))
    exists = (i < limits.q_len) & (j == j)
    if not WHOLE:
        exists = exists & (j < limits.k_len)
    return tl.load(ptrs, mask=exists, other=0)


@triton.jit
def store_plane(
    ptr, plane, x, tile_i, tile_j, size_i, size_j, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SUM_I: tl.constexpr, SUM_J: tl.constexpr, I64: tl.constexpr,
):  # fmt: skip
    """Writes x (BLOCK_M, BLOCK_N) to a tile of one head of a Plane, at ptr, of size_i x size_j.

    SUM_I, SUM_J: x is summed over that side first, of which the plane has one for all.
    """
    i = tile_i * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    j = tile_j * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    rows = size_i
    columns = size_j
    if SUM_I:
        x = tl.sum(x, 0)[None, :]
        i = tile_i + tl.arange(0, 1)[:, None]
        rows = 1
    if SUM_J:
        x = tl.sum(x, 1)[:, None]
        j = tile_j + tl.arange(0, 1)[None, :]
        columns = 1
    ptrs = ptr + offsets(i, plane.i, I64) + offsets(j, plane.j, I64)
    tl.store(ptrs, x.to(ptr.dtype.element_ty), mask=(i < rows) & (j < columns))
