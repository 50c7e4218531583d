"""How torch.vmap batches the recurrent ops.

The forward folds the batched dimension into B, so that vmap over examples costs one call; this
holds for a dense batch and shared weights. All else is one call for each slice: per-sample
weight gradients are separate products anyway, and packed rows of two slices do not interleave.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def register_batching(lib: torch.library.Library) -> None:
    ops = torch.ops.seqkern

    def forward(info, in_dims, x, batch_sizes, h0, c0, weights, *rest):
        op = ops.recurrent.default if len(rest) == 1 else ops.recurrent_inference.default
        args = (x, batch_sizes, h0, c0, weights, *rest)
        shared_weights = all(d is None for dims in in_dims[4:] for d in _as_list(dims))
        if batch_sizes is None and shared_weights:
            return _folded(op, info.batch_size, in_dims, x, h0, c0, weights, *rest)
        return _sliced(op, info.batch_size, in_dims, args)

    def backward(info, in_dims, *args):
        return _sliced(ops.recurrent_backward.default, info.batch_size, in_dims, args)

    def pack(info, in_dims, *args):
        return _sliced(ops.recurrent_pack.default, info.batch_size, in_dims, args)

    torch.library.register_vmap("seqkern::recurrent", forward, lib=lib)
    torch.library.register_vmap("seqkern::recurrent_inference", forward, lib=lib)
    torch.library.register_vmap("seqkern::recurrent_backward", backward, lib=lib)
    torch.library.register_vmap("seqkern::recurrent_pack", pack, lib=lib)


def _as_list(dims):
    return dims if isinstance(dims, list | tuple) else [dims]


def _folded(op: Callable, v: int, in_dims, x: Tensor, h0: Tensor, c0, weights, *rest):
    """One call with V*B rows; x, h0 and c0 have B as their second dimension."""

    def fold(t: Tensor | None, dim: int | None) -> Tensor | None:
        if t is None:
            return None
        t = t.unsqueeze(1).expand(-1, v, -1, -1) if dim is None else t.movedim(dim, 1)
        return t.flatten(1, 2)

    steps = x.size(1 if in_dims[0] == 0 else 0)
    batch = x.size(1) if in_dims[0] is None else x.movedim(in_dims[0], 0).size(2)
    x, h0, c0 = fold(x, in_dims[0]), fold(h0, in_dims[2]), fold(c0, in_dims[3])
    results, dims = [], []
    for i, out in enumerate(op(x, None, h0, c0, weights, *rest)):
        if out.dim() == 1:
            # The placeholder of what this mode does not have.
            out, dim = out, None
        elif i < 3:
            out, dim = out.unflatten(1, (v, batch)), 1
        else:
            # gates and cells (D, T*V*B, .): the rows of one slice are T*B.
            out = out.unflatten(1, (steps, v, batch)).movedim(2, 0).flatten(2, 3)
            dim = 0
        results.append(out)
        dims.append(dim)
    return tuple(results), tuple(dims)


def _sliced(op: Callable, v: int, in_dims, args):
    """One call for each of the V slices, results stacked at dimension 0."""

    def pick(arg, dim, i: int):
        if isinstance(arg, list | tuple):
            return [pick(a, d, i) for a, d in zip(arg, dim, strict=True)] if dim else list(arg)
        return arg if dim is None else arg.select(dim, i)

    calls = [op(*(pick(a, d, i) for a, d in zip(args, in_dims, strict=True))) for i in range(v)]
    if isinstance(calls[0], list):
        return _stacked(calls), [0] * len(calls[0])
    results = [_stacked(outs) for outs in zip(*calls, strict=True)]
    return tuple(results), tuple([0] * len(r) if isinstance(r, list) else 0 for r in results)


def _stacked(outs):
    """Tensors stacked, lists of tensors stacked element by element."""
    if isinstance(outs[0], Tensor):
        return torch.stack(outs)
    return [torch.stack(same) for same in zip(*outs, strict=True)]
