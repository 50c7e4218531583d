"""The additive attention backward: a Triton kernel for the gradients of queries and v, or of keys
and values, and the launcher.

A program owns a tile of the result and runs over everything that adds to it in a fixed order: no
atomics, the same bits in every run. The scores are computed again, by the helpers of the forward.
"""
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false
# (a kernel declares its constant argument tl.constexpr, whatever that holds, and is called with
# options that are no parameters)

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .additive_arguments import SIZES, Arguments, check, check_gradients, plane, view
from .additive_bias_gradient import bias_gradient
from .additive_gradients import Scores, delta_of, score_gradients
from .additive_row_gradients import row_gradients
from .additive_table import Config
from .additive_tile import add_slopes, load_block, side
from .attention_arguments import dense, on_device
from .tile import Limits, bounds


class Results(NamedTuple):
    """Where a kernel's gradients go.

    x, z: of rows and of values, contiguous, in their dtype. sum_x, sum_z: the same in fp32, to
    which a program adds. signs: what v gets of each program (programs, DP). ds: a tile of score
    gradients for each program, (BLOCK_N, BLOCK_M).
    """

    x: Any
    z: Any
    sum_x: Any
    sum_z: Any
    signs: Any
    ds: Any


@triton.jit
def add_values(of, lse2, p, other, row, exists, first, j0, C: tl.constexpr):
    """Adds p do to the gradients of the own rows' values; lse2 is the batch's, of queries."""
    DV = other.DV
    BLOCK_C: tl.constexpr = C.BLOCK_C
    PRECISION: tl.constexpr = C.PRECISION
    j = j0 + tl.arange(0, C.BLOCK_N)
    some = tl.load(lse2 + j, mask=j < other.length, other=float("inf")) != float("inf")
    for c in tl.range(0, DV, BLOCK_C):
        d = c + tl.arange(0, BLOCK_C)[None, :]
        ptrs = of.sum_z + row[:, None] * DV + d
        acc = tl.load(ptrs, mask=exists & (d < DV) & (first == 0), other=0.0)
        z = load_block(other.z, j0, other.length, c, DV, C.BLOCK_N, BLOCK_C, C.I64)
        # What has no key gives nothing, even where it is NaN.
        z = tl.where(some[:, None], z, 0.0)
        acc = tl.dot(p.to(z.dtype), z, acc, input_precision=PRECISION)
        tl.store(ptrs, acc, mask=exists & (d < DV))


@triton.jit
def add_rows(
    of, ds, own, other, row, exists, first, i0, j0, signs_ptr, C: tl.constexpr, SIGNS: tl.constexpr
):  # fmt: skip
    """Adds what the tile of score gradients at ds gives to the gradients of the own rows, and of v
    where SIGNS; see add_slopes for the factors that are left to the end."""
    D = own.D
    BLOCK_E: tl.constexpr = C.BLOCK_E
    for c in tl.range(0, D, BLOCK_E):
        d = c + tl.arange(0, BLOCK_E)
        ptrs = of.sum_x + row[:, None] * D + d[None, :]
        inside = exists & (d < D)[None, :]
        total = tl.load(ptrs, mask=inside & (first == 0), other=0.0)
        total, signs = add_slopes(total, own, other, ds, i0, j0, c, C)
        tl.store(ptrs, total, mask=inside)
        if SIGNS:
            before = tl.load(signs_ptr + d, mask=(d < D) & (first == 0), other=0.0)
            tl.store(signs_ptr + d, before + tl.sum(signs, 0), mask=d < D)


@triton.jit(do_not_specialize=SIZES)
def gradient_kernel(
    q, k, value, v, queries, keys, do, lse2, delta, dweights, results, mask, bias, k_lens, scale,
    n_tiles, max_q, max_k, D, DV, C: tl.constexpr, KEYS: tl.constexpr, NEED_X: tl.constexpr,
    NEED_Z: tl.constexpr,
):  # fmt: skip
    """The gradients of one tile of queries and their part of v's; or, with KEYS, of one tile of
    keys (NEED_X) and their values (NEED_Z). Without KEYS there are no values."""
    BLOCK_M: tl.constexpr = C.BLOCK_M
    BLOCK_N: tl.constexpr = C.BLOCK_N
    pid = tl.program_id(0)
    b = pid // n_tiles
    i0 = pid % n_tiles * BLOCK_M
    k_len = bounds(b, k_lens, None, max_k, 0)[1]
    limits = Limits(max_q, k_len, b * 0, None, None)
    scores = Scores(v, lse2, delta, dweights, mask, bias, scale)
    if KEYS:
        own = side(k, value, keys, b, k_len, D, DV)
        other = side(q, do, queries, b, max_q, D, DV)
        rows = max_k
    else:
        own = side(q, do, queries, b, max_q, D, DV)
        other = side(k, value, keys, b, k_len, D, DV)
        rows = max_q
    i = i0 + tl.arange(0, BLOCK_M)
    row = b.to(tl.int64) * rows + i
    exists = (i < rows)[:, None]
    ds = results.ds + pid.to(tl.int64) * (BLOCK_M * BLOCK_N)
    at = tl.arange(0, BLOCK_N)[None, :] * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    signs = results.signs + pid.to(tl.int64) * own.DP
    tiles = tl.where(i0 < own.length, tl.cdiv(other.length, BLOCK_N), 0)
    for n in tl.range(0, tiles):
        j0 = n * BLOCK_N
        p, g = score_gradients(own, other, scores, b, i0, j0, limits, C, KEYS)
        if NEED_Z:
            add_values(results, lse2 + b.to(tl.int64) * max_q, p, other, row, exists, n == 0, j0, C)
        if NEED_X:
            tl.store(ds + at, g)
            # What a thread has stored another one loads, here and in the next round.
            tl.debug_barrier()
            add_rows(results, ds, own, other, row, exists, n == 0, i0, j0, signs, C, not KEYS)
        tl.debug_barrier()
    some = tiles > 0
    if NEED_X:
        for c in tl.range(0, D, C.BLOCK_E):
            d = c + tl.arange(0, C.BLOCK_E)
            inside = exists & (d < D)[None, :]
            place = row[:, None] * D + d[None, :]
            x = tl.load(results.sum_x + place, mask=inside & some, other=0.0)
            x = x * (4.0 * scale * tl.load(v + d, mask=d < D, other=0.0))[None, :]
            tl.store(results.x + place, x.to(results.x.dtype.element_ty), mask=inside)
            if not KEYS:
                tl.store(signs + d, d * 0.0, mask=(d < D) & (tiles == 0))
    if NEED_Z:
        for c in tl.range(0, DV, C.BLOCK_C):
            d = c + tl.arange(0, C.BLOCK_C)[None, :]
            inside = exists & (d < DV)
            z = tl.load(results.sum_z + row[:, None] * DV + d, mask=inside & some, other=0.0)
            ptrs = results.z + row[:, None] * DV + d
            tl.store(ptrs, z.to(results.z.dtype.element_ty), mask=inside)


# ---- launch -------------------------------------------------------------------------------


def additive_attention_backward(
    do: Tensor, dweights: Tensor | None, dlse: Tensor | None, o: Tensor, lse: Tensor,
    query: Tensor, key: Tensor, value: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None,
    k_lens: Tensor | None, scale: float, need_dq: bool, need_dk: bool, need_dvalue: bool,
    need_dv: bool, need_dbias: bool, *, config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """seqkern::additive_attention_backward by Triton, the gradients of additive_attention.

    Args:
        do, dweights, dlse: the gradients of o, the weights and lse, any strides; the last two may
            be None.
        o, lse: what the forward returned.
        query ... scale: the op's, in its order.
        need_dq ... need_dbias: which gradients are wanted.
        config: sizes of the tiles of every kernel; None asks the table for each.

    Returns:
        dquery, dkey, dvalue, dv, dbias, shaped and typed like their inputs and contiguous; (0,)
        where absent or not wanted.

    Raises:
        TypeError, ValueError: an argument does not fit, see additive_arguments.check; a config
            that takes tanh by hardware, of which no derivative is computed.
    """
    op = "additive_attention_backward"
    call = check(op, query, key, value, v, mask, bias, k_lens, scale)
    check_gradients(op, call, do, dweights, dlse, o, lse)
    if config is not None and config.tanh == "hardware":
        raise ValueError(f"{op}: config.tanh must be 'shared' or 'single', got 'hardware'")
    if 0 in (call.B, call.Tq, call.Tk):
        wanted = zip((query, key, value, v), (need_dq, need_dk, need_dvalue, need_dv))
        dquery, dkey, dvalue, dv = (
            torch.zeros(t.shape if need else 0, **_like(t)) for t, need in wanted
        )
        dbias = query.new_zeros(0)
        if need_dbias and bias is not None:
            dbias = torch.zeros(bias.shape, **_like(bias))
        return dquery, dkey, dvalue, dv, dbias
    # Both are small, and have to be dense to be addressed as such.
    lse, dlse = lse.contiguous(), dense(dlse)
    dquery, dkey, dvalue, dv, dbias = (query.new_empty(0) for _ in range(5))
    with on_device(query):
        of_queries, of_keys = config or call.config("queries"), config or call.config("keys")
        # One query a sequence takes exponentials of its own, but for what is of the scores' size.
        single = call.Tq == 1
        tokens: dict[str, Any] = dict.fromkeys(("queries", "keys", "v"))
        if not single or dweights is not None or (need_dbias and bias is not None):
            tokens = call.tokens(of_queries, of_keys, plain=True)
        lse2, delta = delta_of(call, tokens, do, dweights, dlse, o, lse, of_queries)
        rows = {"lse2": lse2, "delta": delta, "dweights": plane(dweights)}
        scores = tokens | rows
        if single and (need_dq or need_dk or need_dvalue or need_dv):
            x, dkey, dvalue, total = row_gradients(call, do, rows, of_queries, need_dk, need_dvalue)
            dquery, dv = x if need_dq else dquery, total if need_dv else dv
        if not single and (need_dq or need_dv):
            x, total = _query_gradients(call, do, scores, of_queries)
            dquery, dv = x if need_dq else dquery, total if need_dv else dv
        if not single and (need_dk or need_dvalue):
            dkey, dvalue = _key_gradients(call, do, scores, of_keys, need_dk, need_dvalue)
        if need_dbias and bias is not None:
            dbias = bias_gradient(call, bias, do, scores, of_queries)
    return dquery, dkey, dvalue, dv, dbias


def _like(t: Tensor) -> dict[str, Any]:
    return {"dtype": t.dtype, "device": t.device}


def _query_gradients(
    call: Arguments, do: Tensor, scores: dict[str, Any], config: Config
) -> tuple[Tensor, Tensor]:
    """The gradients of the queries and of v, of which each program sums a part."""
    dquery = torch.empty(call.query.shape, **_like(call.query))
    n_tiles = triton.cdiv(call.Tq, config.block_m)
    signs = scores["v"].new_empty(call.B * n_tiles, scores["v"].numel())
    _launch(call, do, scores, config, n_tiles, (dquery, None), signs)
    total = signs[:, : call.D].sum(0) * (-2 * call.scale)
    return dquery, total.to(call.v.dtype)


def _key_gradients(
    call: Arguments,
    do: Tensor,
    scores: dict[str, Any],
    config: Config,
    need_dk: bool,
    need_dvalue: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients of keys and values; (0,) for those that are not needed."""
    sizes = call.key.shape if need_dk else 0, call.value.shape if need_dvalue else 0
    dkey, dvalue = (torch.empty(size, **_like(call.key)) for size in sizes)
    n_tiles = triton.cdiv(call.Tk, config.block_m)
    results = dkey if need_dk else None, dvalue if need_dvalue else None
    _launch(call, do, scores, config, n_tiles, results, None)
    return dkey, dvalue


def _launch(
    call: Arguments, do: Tensor, scores: dict[str, Any], config: Config, n_tiles: int,
    gradients: tuple[Tensor | None, Tensor | None], signs: Tensor | None,
) -> None:  # fmt: skip
    """gradient_kernel for keys, or for queries where signs is given."""
    programs = call.B * n_tiles
    fp32 = {"dtype": torch.float32, "device": do.device}
    sums = [
        t if t is None or t.dtype == torch.float32 else torch.empty(t.shape, **fp32)
        for t in gradients
    ]
    ds = torch.empty(programs, config.block_n, config.block_m, **fp32)
    # A kernel that is not to write something gets ds in its place.
    filled = [ds if t is None else t for t in (*gradients, *sums, signs)]
    gradient_kernel[(programs,)](
        **call.common(),
        **scores,
        value=view(call.value),
        do=view(do),
        results=Results(*filled, ds),
        n_tiles=n_tiles,
        C=call.build(config, do, planes=(scores["dweights"],)),
        KEYS=signs is None,
        NEED_X=gradients[0] is not None,
        NEED_Z=gradients[1] is not None,
        num_warps=config.num_warps,
        num_stages=1,
    )
