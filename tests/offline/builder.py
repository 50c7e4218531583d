"""Triton's interpreter with a GPU's arithmetic, and with every access to memory checked.

The builder turns each operation of a kernel into one on numpy arrays. Triton's own, of version
3.6, computes bfloat16 on the bit patterns, lets maximum and minimum pass NaN on, multiplies tf32
exactly and reads zeros where a masked load is undefined; all of that is put right here.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton._C.libtriton import interpreter as cpu_memory
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import min_dot_size
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

from tests.offline import formats
from tests.offline.memory import Memory

Handle = interpreter.TensorHandle
Operator = Callable[..., np.ndarray]

# Undefined values: what a masked-off lane of a load without `other` may hold on a GPU.
UNDEFINED_INTEGER = {1: 0x5A, 2: 0x5A5A, 4: 0x5A5A5A5A, 8: 0x5A5A5A5A5A5A5A5A}


scalar_dtype = functools.cache(interpreter._get_np_dtype)


def numpy_dtype(dtype: tl.dtype) -> np.dtype:
    """How numpy stores a type; pointers and bfloat16 as unsigned integers."""
    scalar = dtype.scalar
    return np.dtype(np.uint64) if scalar.is_ptr() else scalar_dtype(scalar)


def is_bf16(handle: Handle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def values(handle: Handle) -> np.ndarray:
    """The numbers of a handle: bfloat16 as float32, all else as it is stored."""
    return formats.bf16_to_float32(handle.data) if is_bf16(handle) else handle.data


def stored(numbers: np.ndarray, dtype: tl.dtype) -> Handle:
    """A handle of the given type; what numpy computed in another one is rounded to it."""
    scalar = dtype.scalar
    if numbers.dtype == np.bool_:
        return Handle(numbers, tl.int1)
    if scalar == tl.bfloat16:
        return Handle(formats.float_to_bf16(numbers), scalar)
    return Handle(numbers.astype(numpy_dtype(scalar), copy=False), scalar)


def undefined(shape: tuple[int, ...], dtype: tl.dtype) -> np.ndarray:
    """What stands for undefined values: NaN, or an integer that points nowhere."""
    if dtype.is_floating():
        return stored(np.full(shape, np.nan, dtype=np.float32), dtype).data
    kind = numpy_dtype(dtype)
    return np.full(shape, UNDEFINED_INTEGER[kind.itemsize]).astype(kind)


def item_bytes(pointers: Handle) -> int:
    return max(1, pointers.get_element_ty().primitive_bitwidth // 8)


class Builder(interpreter.InterpreterBuilder):
    """The operations of a kernel on numpy arrays; `memory` is that of the launch in progress."""

    memory: Memory
    grid_idx: tuple[int, int, int]
    grid_dim: tuple[int, int, int]

    def __init__(self) -> None:
        super().__init__()
        precisions = ("tf32", "tf32x3", "ieee", "bf16x3", "bf16x6")
        # Overflow checks would triple the cost of integers; a wrapped offset is out of bounds.
        self.options = dataclasses.replace(
            self.options, allowed_dot_input_precisions=precisions, sanitize_overflow=False
        )
        # As small as the compiler takes them, and no smaller.
        self.codegen_fns["min_dot_size"] = min_dot_size(GPUTarget("cuda", 90, 32))

    # ---- constants and casts

    def get_bf16(self, value: float) -> Handle:
        return stored(np.array([value], dtype=np.float32), tl.bfloat16)

    def create_splat(self, ret_ty: tl.block_type, arg: Handle) -> Handle:
        return Handle(np.full(ret_ty.shape, arg.data), arg.dtype.scalar)

    def cast_impl(self, src: Handle, dst_type: tl.dtype) -> Handle:
        return stored(values(src), dst_type)

    def create_fp_to_fp(self, src: Handle, dst_type: tl.dtype, rounding_mode: Any) -> Handle:
        if rounding_mode not in (None, ir.ROUNDING_MODE.RTNE):
            raise NotImplementedError(f"a cast that rounds by {rounding_mode}")
        return self.cast_impl(src, dst_type)

    # ---- arithmetic

    def binary_op(self, lhs: Handle, rhs: Handle, op: Operator) -> Handle:
        return stored(op(values(lhs), values(rhs)), lhs.dtype)

    def unary_op(self, arg: Handle, op: Operator) -> Handle:
        return stored(op(values(arg)), arg.dtype)

    def create_maxnumf(self, lhs: Handle, rhs: Handle) -> Handle:
        return self.binary_op(lhs, rhs, np.fmax)

    def create_minnumf(self, lhs: Handle, rhs: Handle) -> Handle:
        return self.binary_op(lhs, rhs, np.fmin)

    def create_clampf(self, arg: Handle, lo: Handle, hi: Handle, propagate_nans: Any) -> Handle:
        if propagate_nans == ir.PROPAGATE_NAN.ALL:
            clipped = np.minimum(np.maximum(values(arg), values(lo)), values(hi))
        else:
            clipped = np.fmin(np.fmax(values(arg), values(lo)), values(hi))
        return stored(clipped, arg.dtype)

    def create_fabs(self, arg: Handle) -> Handle:
        return self.unary_op(arg, np.abs)

    def create_rsqrt(self, arg: Handle) -> Handle:
        return self.unary_op(arg, lambda x: 1 / np.sqrt(x))

    def create_fma(self, x: Handle, y: Handle, z: Handle) -> Handle:
        # float64 holds the product of two float32 exactly, so the result is rounded once.
        wide = [values(operand).astype(np.float64) for operand in (x, y, z)]
        return stored(wide[0] * wide[1] + wide[2], z.dtype)

    def create_ashr(self, lhs: Handle, rhs: Handle) -> Handle:
        signed = lhs.data.astype(interpreter._get_signed_np_dtype(lhs.data.dtype))
        return stored(np.right_shift(signed, rhs.data), lhs.dtype)

    def create_dot(self, a: Handle, b: Handle, d: Handle, precision: Any, _: int) -> Handle:
        if a.dtype.scalar.is_int():
            return stored(np.matmul(a.data, b.data, dtype=np.int32) + d.data, d.dtype)
        wide = np.float64 if a.dtype.scalar == tl.float64 else np.float32
        left, right = values(a).astype(wide), values(b).astype(wide)
        if a.dtype.scalar == tl.float32 and precision == ir.INPUT_PRECISION.TF32:
            left, right = formats.round_to_tf32(left), formats.round_to_tf32(right)
        return stored(np.matmul(left, right) + values(d).astype(wide), d.dtype)

    # ---- memory

    def create_masked_load(
        self, ptrs: Handle, mask: Any, other: Handle | None, *hints: Any, **more: Any
    ) -> Handle:
        dtype = ptrs.get_element_ty()
        addresses, active = self._checked("load", ptrs, mask)
        fill = undefined(active.shape, dtype) if other is None else other.data
        fill = np.ascontiguousarray(np.broadcast_to(fill, active.shape))
        loaded = cpu_memory.load(addresses, active, fill, numpy_dtype(dtype))
        return Handle(loaded, dtype)

    def create_masked_store(self, ptrs: Handle, value: Handle, mask: Any, *hints: Any) -> None:
        addresses, active = self._checked("store", ptrs, mask)
        data = np.ascontiguousarray(np.broadcast_to(value.data, active.shape))
        cpu_memory.store(addresses, data, active)

    def create_atomic_rmw(
        self, op: Any, ptr: Handle, val: Handle, mask: Handle, sem: Any, scope: Any
    ) -> Handle:
        if is_bf16(val):
            raise NotImplementedError("an atomic operation on bfloat16")
        addresses, active = self._checked("atomic", ptr, mask)
        pointers = Handle(addresses, ptr.dtype)
        return super().create_atomic_rmw(op, pointers, val, Handle(active, tl.int1), sem, scope)

    def create_atomic_cas(
        self, ptr: Handle, cmp: Handle, val: Handle, sem: Any, scope: Any
    ) -> Handle:
        addresses, _ = self._checked("atomic", ptr, np.ones(ptr.data.shape, dtype=bool))
        return super().create_atomic_cas(Handle(addresses, ptr.dtype), cmp, val, sem, scope)

    def _checked(self, kind: str, ptrs: Handle, mask: Any) -> tuple[np.ndarray, np.ndarray]:
        """Plain addresses and the mask in their shape, once the access is found to be allowed."""
        lanes = mask.data if isinstance(mask, Handle) else mask
        active = np.ascontiguousarray(np.broadcast_to(lanes, ptrs.data.shape))
        return self.memory.access(kind, ptrs.data, active, item_bytes(ptrs)), active

    def create_descriptor_load(
        self, desc: Any, indices: list[Handle], cache_modifier: Any, eviction_policy: Any
    ) -> Handle:
        pointers, mask = desc.materialize_pointers(indices)
        dtype = pointers.get_element_ty()
        nan = desc.padding == ir.PADDING_OPTION.PAD_NAN
        fill = stored(np.full(mask.shape, np.nan if nan else 0, dtype=np.float32), dtype)
        return self.create_masked_load(pointers, mask, fill, cache_modifier, eviction_policy)


BUILDER = Builder()
SEMANTIC = TritonSemantic(BUILDER)
