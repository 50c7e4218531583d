"""The gradients of additive attention of one query a sequence: a Triton kernel whose program holds
a tile of keys, reads them and their values once, and leaves its part of the query's gradient and
of v's to be added up."""
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false
# (a kernel declares its constant argument tl.constexpr, whatever that holds, and is called with
# options that are no parameters)

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .additive_arguments import Arguments, view
from .additive_rows import block_of_keys, row_sums
from .additive_table import Config
from .additive_tile import Vector, load_block, reciprocal
from .decode_arguments import power_of_2
from .tile import (
    LOG2E,
    Limits,
    View,
    add_and_exclude,
    bounds,
    exp_minus_2,
    load_plane,
    tanh_of_size,
)


@triton.jit(do_not_specialize=["scale", "max_q", "max_k", "n_tiles"])
def row_gradient_kernel(
    q, k, value, v, do, lse2, delta, dweights, dkey, dvalue, parts, mask, bias, k_lens, scale,
    max_q, max_k, D, DV, n_tiles, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    PTX: tl.constexpr, I64: tl.constexpr,
):  # fmt: skip
    """One tile of keys under the only query of its sequence.

    dkey, dvalue: contiguous, or None. parts: (2, programs, D) fp32, of the query and of v.
    """
    pid = tl.program_id(0)
    b = pid // n_tiles
    j0 = pid % n_tiles * BLOCK_N
    j = j0 + tl.arange(0, BLOCK_N)
    k_len = bounds(b, k_lens, None, max_k, 0)[1]
    limits = Limits(max_q, k_len, b * 0, None, None)
    wide = b.to(tl.int64)
    query = q.ptr + wide * q.b
    k = View(k.ptr + wide * k.b, 0, 0, k.t, k.d)
    value = View(value.ptr + wide * value.b, 0, 0, value.t, value.d)
    s = row_sums(query, q, k, v, j0, k_len, D, BLOCK_N, BLOCK_C, PTX, I64)
    s = s * (LOG2E * scale)
    s = add_and_exclude(s, b * 0, j, b, b * 0, limits, None, bias, mask, I64)
    p = tl.exp2(s - tl.load(lse2 + b))
    sums = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for c in tl.range(0, DV, BLOCK_C):
        d = c + tl.arange(0, BLOCK_C)
        x = tl.load(do.ptr + wide * do.b + d.to(tl.int64) * do.d, mask=d < DV, other=0.0)
        y = load_block(value, j0, k_len, c, DV, BLOCK_N, BLOCK_C, I64).to(tl.float32)
        sums += y * x.to(tl.float32)[None, :]
        if dvalue is not None:
            # What has no key gives nothing, even where it is NaN.
            z = tl.where(p[:, None] == 0, 0.0, p[:, None] * x.to(tl.float32)[None, :])
            ptrs = dvalue + (wide * max_k + j)[:, None] * DV + d[None, :]
            inside = (j < max_k)[:, None] & (d < DV)[None, :]
            tl.store(ptrs, z.to(dvalue.dtype.element_ty), mask=inside)
    dp = tl.sum(sums, 1)
    if dweights is not None:
        dp += load_plane(dweights, b, b * 0, b * 0, j, limits, False, I64).to(tl.float32)
    ds = p * (dp - tl.load(delta + b))
    ds = tl.where(s == float("-inf"), 0.0, ds)[:, None]
    for c in tl.range(0, D, BLOCK_C):
        d = c + tl.arange(0, BLOCK_C)
        x = tl.load(query + d.to(tl.int64) * q.d, mask=d < D, other=0.0).to(tl.float32)
        y = load_block(k, j0, k_len, c, D, BLOCK_N, BLOCK_C, I64)
        x = x[None, :] + y.to(tl.float32)
        e = exp_minus_2(x)
        r = reciprocal(1.0 + e, PTX)
        # 1 - tanh^2 = 4 e r^2 and |tanh| = (1 - e) r; nothing of what is excluded.
        factor = 4.0 * scale * tl.load(v.ptr + d * v.t, mask=d < D, other=0.0).to(tl.float32)
        slope = tl.where(ds == 0, 0.0, ds * (e * r * r)) * factor[None, :]
        sign = tl.where(ds == 0, 0.0, ds * tanh_of_size(x, (1.0 - e) * r, True)) * scale
        if dkey is not None:
            ptrs = dkey + (wide * max_k + j)[:, None] * D + d[None, :]
            inside = (j < max_k)[:, None] & (d < D)[None, :]
            tl.store(ptrs, slope.to(dkey.dtype.element_ty), mask=inside)
        at = parts + pid.to(tl.int64) * D + d
        tl.store(at, tl.sum(slope, 0), mask=d < D)
        at += tl.num_programs(0).to(tl.int64) * D
        tl.store(at, tl.sum(sign, 0), mask=d < D)


def row_gradients(
    call: Arguments, do: Tensor, scores: dict[str, Any], config: Config, need_dk: bool,
    need_dvalue: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of query, key, value and v; (0,) for keys and values that are not needed.

    Args:
        scores: lse2, delta and dweights by name, as the kernel takes them.
    """
    options: dict[str, Any] = {"dtype": call.query.dtype, "device": do.device}
    dkey = torch.empty(call.key.shape if need_dk else 0, **options)
    dvalue = torch.empty(call.value.shape if need_dvalue else 0, **options)
    block_n = block_of_keys(call.DV)
    n_tiles = triton.cdiv(call.Tk, block_n)
    size = 2, call.B, n_tiles, call.D
    parts = torch.empty(size, dtype=torch.float32, device=do.device)
    row_gradient_kernel[(call.B * n_tiles,)](
        **call.common(),
        **scores,
        value=view(call.value),
        v=Vector(call.v, call.v.stride(0)),
        do=view(do),
        dkey=dkey if need_dk else None,
        dvalue=dvalue if need_dvalue else None,
        parts=parts,
        n_tiles=n_tiles,
        BLOCK_N=block_n,
        BLOCK_C=min(64, max(16, power_of_2(call.D) // 2)),
        PTX=config.ptx,
        I64=call.needs_int64(do, planes=(scores["dweights"],)),
        num_warps=4,
    )
    dquery = parts[0].sum(1, keepdim=True).to(call.query.dtype)
    return dquery, dkey, dvalue, parts[1].sum((0, 1)).to(call.v.dtype)
