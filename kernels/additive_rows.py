"""Additive attention of few queries to many keys: a Triton kernel whose program holds one query
and runs over a part of its keys, which are read once and as they are.

With one query for each sequence, as in the step of a decoder, exponentials of the keys would serve
nobody else, and what takes the time is reading keys and values. Where there are few rows the keys
of each are split among programs, and attention_decode's kernel combines what they found (Dao,
Haziza, Massa and Sizov 2023).
"""
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false
# (a kernel declares its constant argument tl.constexpr, whatever that holds, and is called with
# options that are no parameters)

import torch
import triton
import triton.language as tl
from torch import Tensor

from .additive_arguments import Arguments, view
from .additive_table import Config
from .additive_tile import Vector, load_block, reciprocal
from .attention_arguments import block_of
from .attention_decode import combine_kernel
from .decode_arguments import choose_splits, power_of_2, slots
from .tile import (
    LOG2E,
    Limits,
    View,
    add_and_exclude,
    bounds,
    exp_minus_2,
    log_sum_exp,
    tanh_of_size,
)

# Queries of a sequence up to which one program each costs no more than tiles of 16 rows.
MOST_QUERIES = 4
# Of values, which a program holds in its registers for several keys at a time.
MOST_VALUES = 1024
ELEMENTS = 8192


def few(call: Arguments) -> bool:
    """Whether the call has few enough queries, and narrow enough values, for this kernel."""
    return call.Tq <= MOST_QUERIES and call.DV <= MOST_VALUES


def block_of_keys(width: int) -> int:
    """Keys that a program takes at a time, for values of that width."""
    return min(max(ELEMENTS // block_of(width), 8), 64)


@triton.jit
def row_sums(
    query, q, k, v, j0, k_len, D, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, PTX: tl.constexpr,
    I64: tl.constexpr,
):  # fmt: skip
    """sum_d v_d tanh(q_d + k_jd) of one query, at `query`, and BLOCK_N keys from j0."""
    sums = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for c in tl.range(0, D, 2 * BLOCK_C):
        d = c + tl.arange(0, BLOCK_C)
        e = d + BLOCK_C
        x = tl.load(query + d.to(tl.int64) * q.d, mask=d < D, other=0.0).to(tl.float32)
        first = load_block(k, j0, k_len, c, D, BLOCK_N, BLOCK_C, I64).to(tl.float32) + x[None, :]
        x = tl.load(query + e.to(tl.int64) * q.d, mask=e < D, other=0.0).to(tl.float32)
        y = load_block(k, j0, k_len, c + BLOCK_C, D, BLOCK_N, BLOCK_C, I64)
        second = y.to(tl.float32) + x[None, :]
        a = exp_minus_2(first)
        b = exp_minus_2(second)
        # One reciprocal for both: (1 - a) / (1 + a) = (1 - a) (1 + b) r.
        r = reciprocal((1.0 + a) * (1.0 + b), PTX)
        v1 = tl.load(v.ptr + d * v.t, mask=d < D, other=0.0).to(tl.float32)[None, :]
        v2 = tl.load(v.ptr + e * v.t, mask=e < D, other=0.0).to(tl.float32)[None, :]
        sums += v1 * tanh_of_size(first, (1.0 - a) * ((1.0 + b) * r), True)
        sums += v2 * tanh_of_size(second, (1.0 - b) * ((1.0 + a) * r), True)
    return tl.sum(sums, 1)


@triton.jit(do_not_specialize=["scale", "max_q", "max_k", "splits"])
def row_kernel(
    q, k, value, v, o, lse, parts, states, raw, mask, bias, k_lens, scale, max_q, max_k, D, DV,
    splits, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_DV: tl.constexpr,
    SPLIT: tl.constexpr, PTX: tl.constexpr, I64: tl.constexpr,
):  # fmt: skip
    """One query over one part of its keys.

    With SPLIT the unfinished state goes to parts (splits, rows, DV) and states (2, splits, rows),
    else o and lse are written. raw: unless None, gets the scores in base 2 as (rows, Tk).
    """
    row = tl.program_id(0)
    part = tl.program_id(1)
    b = row // max_q
    i = row % max_q
    k_len = bounds(b, k_lens, None, max_k, 0)[1]
    limits = Limits(max_q, k_len, b * 0, None, None)
    wide = b.to(tl.int64)
    query = q.ptr + wide * q.b + i.to(tl.int64) * q.t
    k = View(k.ptr + wide * k.b, 0, 0, k.t, k.d)
    value = View(value.ptr + wide * value.b, 0, 0, value.t, value.d)
    n_tiles = tl.cdiv(k_len, BLOCK_N)
    each = tl.cdiv(n_tiles, splits)
    start = tl.minimum(part * each, n_tiles)
    acc = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    m = tl.full((), float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_N], tl.float32)
    for n in tl.range(start, tl.minimum(start + each, n_tiles)):
        j0 = n * BLOCK_N
        j = j0 + tl.arange(0, BLOCK_N)
        s = row_sums(query, q, k, v, j0, k_len, D, BLOCK_N, BLOCK_C, PTX, I64)
        s = s * (LOG2E * scale)
        s = add_and_exclude(s, i, j, b, b * 0, limits, None, bias, mask, I64)
        if raw is not None:
            tl.store(raw + row.to(tl.int64) * max_k + j, s, mask=j < k_len)
        z = load_block(value, j0, k_len, 0, DV, BLOCK_N, BLOCK_DV, I64).to(tl.float32)
        top = tl.maximum(m, tl.max(s, 0))
        # -inf - -inf is NaN; any finite number serves where there is no score.
        safe = tl.where(top == float("-inf"), 0.0, top)
        p = tl.exp2(s - safe)
        decay = tl.exp2(m - safe)
        l = l * decay + p
        acc = acc * decay + p[:, None] * z
        m = top
    total = tl.sum(l, 0)
    out = tl.sum(acc, 0)
    d = tl.arange(0, BLOCK_DV)
    if SPLIT:
        rows = tl.num_programs(0).to(tl.int64)
        at = part * rows + row
        tl.store(parts + at * DV + d, out, mask=d < DV)
        tl.store(states + at, m)
        tl.store(states + splits * rows + at, total)
    else:
        out = out / tl.where(total == 0, 1.0, total)
        tl.store(o + row.to(tl.int64) * DV + d, out.to(o.dtype.element_ty), mask=d < DV)
        tl.store(lse + row, log_sum_exp(m, total))


def attend_rows(
    call: Arguments, o: Tensor, lse: Tensor, raw: Tensor | None, config: Config, splits: int
) -> None:
    """Launches row_kernel, and the combination where the keys are split (splits > 1)."""
    rows, block_dv = lse.numel(), block_of(call.DV)
    block_n = block_of_keys(call.DV)
    if not splits:
        splits = choose_splits(rows, triton.cdiv(call.Tk, block_n), slots(o))
    parts, states = None, None
    if splits > 1:
        parts = torch.empty(splits, rows, call.DV, dtype=torch.float32, device=o.device)
        states = torch.empty(2, splits, rows, dtype=torch.float32, device=o.device)
    results = {"o": o, "lse": lse, "parts": parts, "states": states}
    row_kernel[(rows, splits)](
        **call.common(),
        **results,
        value=view(call.value),
        v=Vector(call.v, call.v.stride(0)),
        raw=raw,
        splits=splits,
        BLOCK_N=block_n,
        # Half of a row, so that a row of one block is two parts of it; more of 64 keys would spill.
        BLOCK_C=min(64, 2048 // block_n, max(16, power_of_2(call.D) // 2)),
        BLOCK_DV=block_dv,
        SPLIT=splits > 1,
        PTX=config.ptx,
        I64=call.needs_int64(),
        num_warps=4,
    )
    if splits > 1:
        each = power_of_2(splits)
        combine_kernel[(rows,)](
            **results,
            sinks=None,
            n_heads=1,
            max_q=1,
            rows=rows,
            splits=splits,
            DV=call.DV,
            BLOCK_DV=block_dv,
            SPLITS=each,
            BLOCK_S=min(16, each),
            num_warps=4,
        )
