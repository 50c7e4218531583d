"""What the additive attention kernels share: exponentials of tokens, scores of a tile from them,
and the products of score gradients with tanh's derivative.

tanh(q + k) = 1 - 2 r with r = 1 / (1 + e^2q e^2k): the exponentials are taken once for each token,
and an element of a tile costs one multiply-add and a reciprocal. A reciprocal of a product serves
two elements, for 1/a = b / (ab). A reciprocal r is taken relative to 1/2, its value at tanh = 0,
so that sums of small terms stay small: v tanh = -2 v (r - 1/2).

Where |q| + |k| may pass REACH the product of two such denominators could overflow, and where it
stays below NEAR the difference r - 1/2 has cancelled, which float32 shows: there a tile takes tanh
of the sums themselves, which costs it several times as much.
"""
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false
# (a kernel declares its constant argument tl.constexpr, whatever that holds)

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .tile import LOG2E, View, offsets, tanh

# (1 + e^2x)^2 is finite in fp32 up to x = 22; the exponentials alone up to 43 either way.
REACH = tl.constexpr(20.0)
CLAMP = tl.constexpr(43.0)
# From here on the error of r - 1/2 is within twice that of float32's own tanh; at 0.6 it was over.
NEAR = tl.constexpr(1.0)
# (1 + e^2x) v is finite up to there and REACH, and so is the sum of two.
LARGEST_V = tl.constexpr(1e20)
# Elements of a row that a loop takes at a time: rows of exponentials are padded to that.
STEP = tl.constexpr(4)


class Vector(NamedTuple):
    """A tensor of one dimension: pointer and stride."""

    ptr: Any
    t: Any


class Tokens(NamedTuple):
    """What `tokens_kernel` made of queries or keys (B, T, D), padded to TP tokens and DP elements.

    turned: e^2x as (B, DP, TP), or x itself for tanh by hardware. plain: e^2x as (B, TP, DP), for
    gradients alone. reach: the largest |x| of each token as (B, TP), inf where there is a NaN; of
    queries also where v has an element beyond LARGEST_V, or a NaN.
    """

    turned: Any
    plain: Any
    reach: Any
    TP: Any
    DP: Any


class Side(NamedTuple):
    """The queries or the keys of one element of the batch.

    x: a View of them. z: a View of what a product takes of them, do or values. turned, plain,
    reach, TP, DP: their Tokens. length: how many there are. D, DV: elements of a row of x and z.
    """

    x: Any
    z: Any
    turned: Any
    plain: Any
    reach: Any
    TP: Any
    DP: Any
    length: Any
    D: Any
    DV: Any


# ---- elements -----------------------------------------------------------------------------


@triton.jit
def rcp_ptx(x):
    """1/x by MUFU.RCP: within one unit in the last place, 0 for results below 2^-126."""
    return tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def tanh_ptx(x):
    """tanh by MUFU.TANH: relative error up to 2^-11."""
    return tl.inline_asm_elementwise(
        "tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def reciprocal(x, PTX: tl.constexpr):
    """1/x; PTX: by rcp_ptx, where a division takes half a dozen instructions more."""
    return rcp_ptx(x) if PTX else 1.0 / x


@triton.jit
def exponential(x):
    """e^2x for |x| <= 43, with a relative error of at most 1.1 * 2^-23 on every target.

    2x log2 e is split into an integer and a rest, whose power of two is a polynomial: the
    hardware's exp2 of the product would lose as many bits as the integer has.
    """
    n = tl.floor(x * (2.0 * LOG2E) + 0.5)
    # Explicitly fused, the difference takes the product unrounded. Written as two operations, it
    # is for the compiler to say. What 2 log2 e lacks in fp32 comes on top.
    y = tl.fma(x, 2.885390043258667, -n) + x * 3.85192598e-8
    # A least relative error of 2e-9 over |y| <= 1/2.
    p = y * 1.53532572e-4 + 1.33990031e-3
    p = y * p + 9.61843878e-3
    p = y * p + 5.55033199e-2
    p = y * p + 2.40226477e-1
    p = y * p + 6.93147182e-1
    p = y * p + 1.0
    scale = ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    return p * scale


# ---- tokens -------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["n_tiles", "longest"])
def tokens_kernel(
    x, v, lens, turned, plain, reach, padded, n_tiles, longest, TP, D, DP,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """Tokens of BLOCK_T rows of x, a View (B, T, D); rows beyond lens count as zeros.

    v: a Vector, or None; then padded gets it in fp32, with zeros from D to DP.
    """
    pid = tl.program_id(0)
    b = (pid // n_tiles).to(tl.int64)
    t0 = pid % n_tiles * BLOCK_T
    t = t0 + tl.arange(0, BLOCK_T)
    length = longest
    if lens is not None:
        length = tl.minimum(tl.maximum(tl.load(lens + b), 0), longest)
    rows = x.ptr + b * x.b + t.to(tl.int64) * x.t
    most = tl.zeros([BLOCK_T], tl.float32)
    for d0 in tl.range(0, DP, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        exists = (t < length)[:, None] & (d < D)[None, :]
        ptrs = rows[:, None] + d.to(tl.int64)[None, :] * x.d
        y = tl.load(ptrs, mask=exists, other=0.0).to(tl.float32)
        # A maximum may drop a NaN.
        ordinary = y == y
        if v is not None:
            e = tl.load(v.ptr + d * v.t, mask=d < D, other=0.0).to(tl.float32)
            tl.store(padded + d, e, mask=(d < DP) & (pid == 0))
            ordinary = ordinary & (tl.abs(e) <= LARGEST_V)[None, :]
        most = tl.maximum(most, tl.max(tl.where(ordinary, tl.abs(y), float("inf")), 1))
        if not HARDWARE:
            y = tl.where(y == y, tl.minimum(tl.maximum(y, -CLAMP), CLAMP), y)
            y = exponential(y)
        room = (t < TP)[:, None] & (d < DP)[None, :]
        ptrs = turned + (b * DP + d.to(tl.int64)[None, :]) * TP + t[:, None]
        tl.store(ptrs, y, mask=room)
        if plain is not None:
            tl.store(plain + (b * TP + t.to(tl.int64)[:, None]) * DP + d[None, :], y, mask=room)
    tl.store(reach + b * TP + t, most, mask=t < TP)


# ---- tiles --------------------------------------------------------------------------------

# A tile is BLOCK_M rows of the side that a program owns by BLOCK_N = 32 num_warps of the other
# side, queries and keys or keys and queries. The layout that Triton then gives it has one column
# in each lane and all rows of a column in one thread, so that no sum over d needs another thread,
# the rows' exponentials are loaded four at a time, and the columns' side by side.


@triton.jit
def side(x, z, tokens, b, length, D, DV):
    """A Side of batch b: its rows, a View each, and what tokens_kernel made of them."""
    wide = b.to(tl.int64)
    return Side(
        View(x.ptr + wide * x.b, 0, 0, x.t, x.d),
        View(z.ptr + wide * z.b, 0, 0, z.t, z.d),
        tokens.turned + wide * tokens.DP * tokens.TP,
        tokens.plain + wide * tokens.DP * tokens.TP,
        tokens.reach + wide * tokens.TP,
        tokens.TP,
        tokens.DP,
        length,
        D,
        DV,
    )


@triton.jit
def far_or_near(own, other, i0, j0, C: tl.constexpr):
    """Whether the sums of this tile may be too large, or are all too small, for exponentials."""
    i = tl.load(own.reach + i0 + tl.arange(0, C.BLOCK_M))
    j = tl.load(other.reach + j0 + tl.arange(0, C.BLOCK_N))
    most = tl.max(i, 0) + tl.max(j, 0)
    other_form = most > REACH
    if own.x.ptr.dtype.element_ty == tl.float32:  # 16 bits do not show what has cancelled
        other_form = other_form | (most < NEAR)
    return other_form


@triton.jit
def column(view, t, length, d, I64: tl.constexpr):
    """Element d of rows t of a View, fp32; 0 beyond length."""
    ptrs = view.ptr + d.to(tl.int64) * view.d + offsets(t, view.t, I64)
    return tl.load(ptrs, mask=t < length, other=0.0).to(tl.float32)


@triton.jit
def load_block(
    view, t0, length, c, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr, I64: tl.constexpr
):  # fmt: skip
    """Elements [c, c + COLUMNS) of rows [t0, t0 + ROWS) of a View; 0 beyond length and width."""
    t = t0 + tl.arange(0, ROWS)[:, None]
    d = c + tl.arange(0, COLUMNS)[None, :]
    ptrs = view.ptr + offsets(t, view.t, I64) + offsets(d, view.d, I64)
    return tl.load(ptrs, mask=(t < length) & (d < width), other=0.0)


@triton.jit
def tile_sums(own, other, v, i0, j0, C: tl.constexpr):
    """sum_d v_d tanh(x_id + y_jd) of BLOCK_M own rows from i0 and BLOCK_N others from j0; fp32.

    v: pointer to fp32 numbers, padded with zeros like the rows.
    """
    BLOCK_M: tl.constexpr = C.BLOCK_M
    BLOCK_N: tl.constexpr = C.BLOCK_N
    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    s = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if C.TANH == "hardware":
        for d0 in tl.range(0, own.DP, STEP):
            for step in tl.static_range(STEP):
                d = d0 + step
                x = tl.load(own.turned + d.to(tl.int64) * own.TP + i0 + m)[:, None]
                y = tl.load(other.turned + d.to(tl.int64) * other.TP + j0 + n)[None, :]
                s += tl.load(v + d) * tanh_ptx(x + y)
    elif far_or_near(own, other, i0, j0, C):
        for d in tl.range(0, own.D):
            x = column(own.x, i0 + m, own.length, d, C.I64)[:, None]
            y = column(other.x, j0 + n, other.length, d, C.I64)[None, :]
            s += tl.load(v + d) * tanh(x + y, True)
    else:
        for d0 in tl.range(0, own.DP, STEP):
            for step in tl.static_range(0, STEP, 2):
                d = d0 + step
                i = own.turned + d.to(tl.int64) * own.TP + i0 + m
                j = other.turned + d.to(tl.int64) * other.TP + j0 + n
                a = tl.load(i)[:, None] * tl.load(j)[None, :] + 1.0
                b = tl.load(i + own.TP)[:, None] * tl.load(j + other.TP)[None, :] + 1.0
                v1 = tl.load(v + d)
                v2 = tl.load(v + d + 1)
                if C.TANH == "shared":
                    s += (b * v1 + a * v2) * reciprocal(a * b, C.PTX) - 0.5 * (v1 + v2)
                else:
                    s += v1 * (reciprocal(a, C.PTX) - 0.5)
                    s += v2 * (reciprocal(b, C.PTX) - 0.5)
        s = s * -2.0
    return s


@triton.jit
def tile_products(own, other, i0, j0, C: tl.constexpr):
    """The products of the z of BLOCK_M own rows and of BLOCK_N others: do value^T; fp32."""
    BLOCK_M: tl.constexpr = C.BLOCK_M
    BLOCK_N: tl.constexpr = C.BLOCK_N
    BLOCK_C: tl.constexpr = C.BLOCK_C
    PRECISION: tl.constexpr = C.PRECISION
    s = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for c in tl.range(0, own.DV, BLOCK_C):
        x = load_block(own.z, i0, own.length, c, own.DV, BLOCK_M, BLOCK_C, C.I64)
        y = load_block(other.z, j0, other.length, c, own.DV, BLOCK_N, BLOCK_C, C.I64)
        s = tl.dot(x, tl.trans(y), s, input_precision=PRECISION)
    return s


@triton.jit
def add_slopes(total, own, other, ds, i0, j0, c, C: tl.constexpr):
    """total (BLOCK_M, BLOCK_E) plus the sum over a tile's columns of ds/4 (1 - tanh^2), and the
    sum of -ds/2 tanh, for elements from c on.

    ds: pointer to the tile's score gradients, (BLOCK_N, BLOCK_M).
    """
    BLOCK_M: tl.constexpr = C.BLOCK_M
    BLOCK_E: tl.constexpr = C.BLOCK_E
    m = tl.arange(0, BLOCK_M)
    d = c + tl.arange(0, BLOCK_E)
    count = tl.minimum(other.length - j0, C.BLOCK_N)
    signs = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    if far_or_near(own, other, i0, j0, C):
        x = load_block(own.x, i0, own.length, c, own.D, BLOCK_M, BLOCK_E, C.I64).to(tl.float32)
        for n in tl.range(0, count):
            row = other.x.ptr + (j0 + n).to(tl.int64) * other.x.t + d.to(tl.int64) * other.x.d
            y = tl.load(row, mask=d < own.D, other=0.0).to(tl.float32)
            t = tanh(x + y[None, :], True)
            g = tl.load(ds + n * BLOCK_M + m)[:, None]
            # What is excluded gives nothing, even where it is NaN.
            total += tl.where(g == 0, 0.0, 0.25 * g * (1.0 - t * t))
            signs += tl.where(g == 0, 0.0, -0.5 * g * t)
    else:
        rows = own.plain + (i0 + m).to(tl.int64)[:, None] * own.DP + d[None, :]
        x = tl.load(rows, mask=(d < own.DP)[None, :], other=1.0)
        for n0 in tl.range(0, count, 4):
            for step in tl.static_range(0, 4, 2):
                n = n0 + step
                row = other.plain + (j0 + n).to(tl.int64) * other.DP + d
                a = x * tl.load(row, mask=d < other.DP, other=1.0)[None, :] + 1.0
                b = x * tl.load(row + other.DP, mask=d < other.DP, other=1.0)[None, :] + 1.0
                g = tl.load(ds + n * BLOCK_M + m)[:, None]
                h = tl.load(ds + n * BLOCK_M + BLOCK_M + m)[:, None]
                if C.TANH == "single":
                    r1 = reciprocal(a, C.PTX)
                    r2 = reciprocal(b, C.PTX)
                else:
                    r = reciprocal(a * b, C.PTX)
                    r1 = r * b
                    r2 = r * a
                total += g * (r1 - r1 * r1)
                total += h * (r2 - r2 * r2)
                signs += g * (r1 - 0.5)
                signs += h * (r2 - 0.5)
    return total, signs
