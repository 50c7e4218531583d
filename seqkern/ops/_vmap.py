"""How torch.vmap batches the recurrent ops, and any op slice by slice.

A recurrent forward with a dense batch and shared weights folds the new dimension into B and is one
call. All else is one call for each slice: per-sample weight gradients are separate products anyway,
and the packed rows of two slices do not interleave.

Each rule takes the op, the size V of the new dimension, its place in each argument (None where
an argument has none), and the arguments; it returns the results and its place in each.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def fold_forward(op: Callable, v: int, in_dims, args):
    """recurrent and recurrent_inference: (x, batch_sizes, h0, c0, weights, ..., mode)."""
    x, batch_sizes, h0, c0, weights, *rest = args
    d_x, _, d_h0, d_c0, *d_weights, _ = in_dims
    if batch_sizes is not None or any(d is not None for dims in d_weights for d in dims or []):
        return map_slices(op, v, in_dims, args)

    def fold(t: Tensor, dim: int | None) -> Tensor:
        t = t.unsqueeze(1).expand(-1, v, -1, -1) if dim is None else t.movedim(dim, 1)
        return t.flatten(1, 2)

    folded, c0 = fold(x, d_x), None if c0 is None else fold(c0, d_c0)
    t, b = folded.size(0), folded.size(1) // v
    results, dims = [], []
    for i, out in enumerate(op(folded, None, fold(h0, d_h0), c0, weights, *rest)):
        dim = None
        if i < 3 and out.dim() == 3:
            out, dim = out.unflatten(1, (v, b)), 1
        elif out.dim() == 3:
            # gates and cells (D, T*V*B, .) hold the rows of every step side by side.
            out, dim = out.unflatten(1, (t, v, b)).movedim(2, 0).flatten(2, 3), 0
        results.append(out)
        dims.append(dim)
    return tuple(results), tuple(dims)


def map_slices(op: Callable, v: int, in_dims, args):
    """One call for each of the V slices, the results stacked at dimension 0."""

    def pick(arg, dim, i: int):
        if isinstance(arg, list | tuple):
            return [pick(a, d, i) for a, d in zip(arg, dim or [None] * len(arg), strict=True)]
        return arg if dim is None else arg.select(dim, i)

    calls = [op(*(pick(a, d, i) for a, d in zip(args, in_dims, strict=True))) for i in range(v)]
    results = [stack(same) for same in zip(*calls, strict=True)]
    dims = [[0] * len(r) if isinstance(r, list) else 0 for r in results]
    return (results, dims) if isinstance(calls[0], list) else (tuple(results), tuple(dims))


def stack(same):
    """One tensor of tensors; of lists of tensors, a list."""
    if isinstance(same[0], Tensor):
        return torch.stack(same)
    return [torch.stack(tensors) for tensors in zip(*same, strict=True)]
