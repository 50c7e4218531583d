"""Reductions and scans of a kernel, with any combining function, on whole slices at a time."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import triton.language as tl
from triton.language import standard
from triton.runtime.jit import JITFunction

from tests.offline.builder import Handle, is_bf16

Tensors = tuple[tl.tensor, ...]
# For these numpy's own loop gives the same as the kernel's function, only faster.
NUMPY_FOLDS = {
    standard._sum_combine.fn: np.add,
    standard._elementwise_max.fn: np.fmax,
    standard._elementwise_min.fn: np.fmin,
}


def tensor_of(data: np.ndarray, dtype: tl.dtype) -> tl.tensor:
    """A block of the data, or a scalar where it has no dimension."""
    if data.ndim == 0:
        return tl.tensor(Handle(data.reshape(1), dtype), dtype)
    return tl.tensor(Handle(data, dtype), tl.block_type(dtype, list(data.shape)))


def combined(combine: JITFunction, left: Sequence, right: Sequence, dtypes: Sequence) -> list:
    """The combining function on two lists of arrays of one shape."""
    operands = [tensor_of(x, t) for side in (left, right) for x, t in zip(side, dtypes)]
    result = combine(*operands)
    parts = result if isinstance(result, tuple) else (result,)
    return [p.to(t).handle.data.reshape(x.shape) for p, t, x in zip(parts, dtypes, left)]


def fold(
    input: Any, axis: Any, combine_fn: JITFunction, keep_dims: bool = False, **_: Any
) -> tl.tensor | Tensors:
    """`tl.reduce`: neighbours are combined in pairs until one is left, as a GPU does."""
    tensors = input if isinstance(input, tuple) else (input,)
    axis = axis.value if isinstance(axis, tl.constexpr) else axis
    rank = len(tensors[0].shape)
    arrays = [t.handle.data.reshape(-1) if axis is None else t.handle.data for t in tensors]
    reduced = fold_arrays(arrays, axis or 0, combine_fn, tensors)
    if keep_dims:
        shape = [1] * rank if axis is None else None
        reduced = [x.reshape(shape) if shape else np.expand_dims(x, axis) for x in reduced]
    results = tuple(tensor_of(x, t.dtype) for x, t in zip(reduced, tensors))
    return results if isinstance(input, tuple) else results[0]


def fold_arrays(
    arrays: list[np.ndarray], axis: int, combine: JITFunction, tensors: Tensors
) -> list[np.ndarray]:
    quick = NUMPY_FOLDS.get(combine.fn)
    if quick is not None and not is_bf16(tensors[0].handle):
        return [np.asarray(quick.reduce(arrays[0], axis=axis, dtype=arrays[0].dtype))]
    arrays = [np.moveaxis(x, axis, 0) for x in arrays]
    while len(arrays[0]) > 1:
        left, right = [x[0::2] for x in arrays], [x[1::2] for x in arrays]
        arrays = combined(combine, left, right, [t.dtype for t in tensors])
    return [x[0] for x in arrays]


def scan(
    input: Any, axis: Any, combine_fn: JITFunction, reverse: bool = False, **_: Any
) -> tl.tensor | Tensors:
    """`tl.associative_scan`: each slice is combined with the result up to the one before."""
    tensors = input if isinstance(input, tuple) else (input,)
    axis = axis.value if isinstance(axis, tl.constexpr) else axis
    dtypes = [t.dtype for t in tensors]
    arrays = [np.moveaxis(t.handle.data, axis, 0).copy() for t in tensors]
    order = range(len(arrays[0]))
    order = order[::-1] if reverse else order
    for before, here in itertools.pairwise(order):
        step = combined(combine_fn, [x[before] for x in arrays], [x[here] for x in arrays], dtypes)
        for array, part in zip(arrays, step):
            array[here] = part
    results = tuple(tensor_of(np.moveaxis(x, 0, axis), t) for x, t in zip(arrays, dtypes))
    return results if isinstance(input, tuple) else results[0]
