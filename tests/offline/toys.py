"""Tiny kernels for the tests of the tools: right ones, and ones with a planted fault."""

import triton
import triton.language as tl
from triton.language.extra import libdevice


@triton.jit
def doubled(x):
    return x + x


@triton.jit
def add_kernel(X, Y, OUT, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + at, mask=at < n, other=0.0)
    y = tl.load(Y + at, mask=at < n, other=0.0)
    tl.store(OUT + at, x + y, mask=at < n)


@triton.jit
def cast_kernel(X, OUT, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + at, mask=at < n)
    tl.store(OUT + at, x.to(OUT.dtype.element_ty), mask=at < n)


@triton.jit
def rows_kernel(X, SUM, MAX, LAST, PREFIX, N: tl.constexpr):
    row = tl.program_id(0)
    x = tl.load(X + row * N + tl.arange(0, N))
    tl.store(SUM + row, tl.sum(x, 0))
    tl.store(MAX + row, x.max(0))
    tl.store(LAST + row, tl.argmax(x, 0))
    tl.store(PREFIX + row * N + tl.arange(0, N), tl.cumsum(x, 0))


@triton.jit
def online(m1, s1, m2, s2):
    m = tl.maximum(m1, m2)
    return m, s1 * tl.exp(m1 - m) + s2 * tl.exp(m2 - m)


@triton.jit
def logsumexp_kernel(X, OUT, N: tl.constexpr):
    x = tl.load(X + tl.program_id(0) * N + tl.arange(0, N))
    m, s = tl.reduce((x, tl.full((N,), 1.0, tl.float32)), 0, online)
    tl.store(OUT + tl.program_id(0), m + tl.log(s))


@triton.jit
def product_kernel(A, B, OUT, inner, TILE: tl.constexpr, PRECISION: tl.constexpr):
    """One tile of OUT = A Bᵀ; both operands have rows of length `inner`."""
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    acc = tl.zeros((TILE, TILE), tl.float32)
    for start in range(0, inner, TILE):
        at = start.to(tl.int64) + tl.arange(0, TILE)
        a = tl.load(A + row[:, None] * inner + at, mask=at < inner, other=0.0)
        b = tl.load(B + column[None, :] * inner + at[:, None], mask=at[:, None] < inner, other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    at = row[:, None] * tl.num_programs(1) * TILE + column
    tl.store(OUT + at, doubled(acc).to(OUT.dtype.element_ty))


@triton.jit
def described_product_kernel(
    A, B, OUT, rows, columns, inner, TILE: tl.constexpr, STAGES: tl.constexpr = 2
):
    """OUT = A Bᵀ by descriptors, which fill with zeros beyond the edges and clip what is stored."""
    row, column = tl.program_id(0) * TILE, tl.program_id(1) * TILE
    a = tl.make_tensor_descriptor(A, [rows, inner], [inner, 1], [TILE, TILE])
    b = tl.make_tensor_descriptor(B, [columns, inner], [inner, 1], [TILE, TILE])
    out = tl.make_tensor_descriptor(OUT, [rows, columns], [columns, 1], [TILE, TILE])
    acc = tl.zeros((TILE, TILE), tl.float32)
    for start in tl.range(0, inner, TILE, num_stages=STAGES):
        acc = tl.dot(a.load([row, start]), b.load([column, start]).T, acc)
    out.store([row, column], acc.to(OUT.dtype.element_ty))


@triton.jit
def extremes_kernel(X, Y, LARGER, SMALLER, N: tl.constexpr):
    at = tl.arange(0, N)
    x, y = tl.load(X + at), tl.load(Y + at)
    tl.store(LARGER + at, tl.maximum(x, y))
    tl.store(SMALLER + at, tl.minimum(x, y))


@triton.jit
def tanh_kernel(X, OUT, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(OUT + at, libdevice.tanh(tl.load(X + at)))


@triton.jit
def philox_kernel(OUT, UNIFORM, HIGH, seed, start, N: tl.constexpr, ROUNDS: tl.constexpr):
    at = tl.arange(0, N)
    first, second, third, fourth = tl.randint4x(seed, start + at, n_rounds=ROUNDS)
    tl.store(OUT + at, first)
    tl.store(OUT + N + at, second)
    tl.store(OUT + 2 * N + at, third)
    tl.store(OUT + 3 * N + at, fourth)
    tl.store(UNIFORM + at, tl.rand(seed, start + at, n_rounds=ROUNDS))
    tl.store(HIGH + at, tl.umulhi(first, second))


@triton.jit
def philox_words_kernel(OUT, seed, N: tl.constexpr, ROUNDS: tl.constexpr):
    """All four counter words in use."""
    at = tl.arange(0, N)
    words = tl.philox(seed, at, at + 7, at * 3, at - 5, n_rounds=ROUNDS)
    for i in tl.static_range(4):
        tl.store(OUT + i * N + at, words[i])


# ---- planted faults


@triton.jit
def too_far_kernel(X, OUT, n, BLOCK: tl.constexpr):
    """The load lacks its mask."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(OUT + at, tl.load(X + at), mask=at < n)


@triton.jit
def same_place_kernel(X, OUT, BLOCK: tl.constexpr):
    """Every program stores its sum to the same element."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(OUT, tl.sum(tl.load(X + at), 0))


@triton.jit
def neighbour_kernel(X, BLOCK: tl.constexpr):
    """Every program reads, in place, what the one before it writes."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    left = tl.load(X + at - 1, mask=at > 0, other=0.0)
    tl.store(X + at, left)


@triton.jit
def counted_kernel(X, TOTAL, BLOCK: tl.constexpr):
    """No fault: the programs meet in an atomic addition."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(TOTAL, tl.sum(tl.load(X + at), 0))


@triton.jit
def undefined_kernel(X, OUT, n, BLOCK: tl.constexpr):
    """Sums lanes that the mask leaves undefined."""
    at = tl.arange(0, BLOCK)
    tl.store(OUT, tl.sum(tl.load(X + at, mask=at < n), 0))


@triton.jit
def half_written_kernel(OUT, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(OUT + at, tl.full((BLOCK,), 1.0, tl.float32), mask=at < n // 2)


@triton.jit
def squares_kernel(A, OUT, TILE: tl.constexpr, ATOMIC: tl.constexpr):
    at = tl.arange(0, TILE)
    a = tl.load(A + at[:, None] * TILE + at)
    square = tl.dot(a, tl.trans(a))
    if ATOMIC:
        tl.atomic_add(OUT + at[:, None] * TILE + at, square)
    else:
        tl.store(OUT + at[:, None] * TILE + at, square)


@triton.jit
def word_kernel(X, OUT, N: tl.constexpr):
    """Words that the compiler and Python read differently."""
    at = tl.arange(0, N)
    x = tl.load(X + at)
    first = tl.load(X)
    sign = 1.0 if first > 0 and not first > 10 else -1.0
    total = 0.0
    for i in range(2, 4):
        total += i.to(tl.float32)
    inside = (x > 0.0) & (x < 10.0)
    tl.store(OUT + at, tl.where(inside, sign * total, x))


@triton.jit
def block_condition_kernel(X, OUT, N: tl.constexpr):
    at = tl.arange(0, N)
    x = tl.load(X + at)
    if x > 0:
        tl.store(OUT + at, x)


@triton.jit
def chained_kernel(X, OUT, N: tl.constexpr):
    at = tl.arange(0, N)
    x = tl.load(X + at)
    tl.store(OUT + at, x, mask=0 < x < 10)
