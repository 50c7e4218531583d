"""Derivatives and vmap of the recurrent ops, as two autograd functions.

`Recurrent` is the first derivative and `RecurrentBackward` the second: the backward is an op
with kernels of its own, and its derivative is that of the reference, plain PyTorch operations
that can be derived as often as asked.

These functions, not torch.library.register_autograd, hold the formulas: an op registered that
way raises under torch.func's transforms, and flattens its lists in Python on every call, which
doubles the cost of a short training step. They are also registered as the ops' Autograd kernels.
"""

from typing import Any

import torch
from torch import Tensor
from torch._C import _AutoDispatchBelowAutograd

from seqkern.ops import _recurrent_cudnn as cudnn
from seqkern.ops._checks import check_recurrent
from seqkern.ops._derivatives import batched, needs_grad, register_fold, through_reference
from seqkern.ops._vmap import fold_forward, map_slices
from seqkern.reference import recurrent as reference

ops = torch.ops.seqkern


def training(x, batch_sizes, h0, c0, weights, mode) -> tuple[Tensor, ...]:
    """seqkern::recurrent, recorded by autograd and by torch.func's transforms."""
    return Recurrent.apply(mode, batch_sizes, x, h0, c0, *weights)


def training_by_cudnn(x, batch_sizes, h0, c0, weights, mode) -> tuple[Tensor, ...]:
    """The same by cuDNN, for a call that it was chosen for; not under torch.func."""
    return RecurrentByCudnn.apply(mode, batch_sizes, x, h0, c0, *weights)


def training_backward(
    dy, dh_n, dc_n, x, batch_sizes, h0, c0, weights, y, gates, cells, mode, need_dx, need_dw
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """seqkern::recurrent_backward, recorded like `training`."""
    flags = (mode, need_dx, need_dw, batch_sizes)
    dx, dh0, dc0, *dweights = RecurrentBackward.apply(
        *flags, dy, dh_n, dc_n, x, h0, c0, y, gates, cells, *weights
    )
    return dx, dh0, dc0, dweights


class Recurrent(torch.autograd.Function):
    """Arguments: mode, batch_sizes, x, h0, c0, then the weights."""

    @staticmethod
    def forward(mode, batch_sizes, x, h0, c0, *weights):
        with _AutoDispatchBelowAutograd():
            return ops.recurrent.default(x, batch_sizes, h0, c0, weights, mode)

    @staticmethod
    def setup_context(ctx: Any, inputs, output) -> None:
        mode, batch_sizes, x, h0, c0, *weights = inputs
        y, _, _, gates, cells = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(gates, cells)
        ctx.save_for_backward(batch_sizes, x, h0, c0, y, gates, cells, *weights)
        ctx.mode = mode

    @staticmethod
    def backward(ctx: Any, *grad_outputs):
        dy, dh_n, dc_n, *_ = grad_outputs
        batch_sizes, x, h0, c0, y, gates, cells, *weights = ctx.saved_tensors
        _, _, need_x, need_h0, need_c0, *need_w = ctx.needs_input_grad
        if dy is None and dh_n is None and dc_n is None:
            return (None,) * (5 + len(weights))
        if batched((dy, dh_n, dc_n)):
            return None, None, *_through_reference(ctx, grad_outputs[:3])
        # In a backward with create_graph, and under torch.func, the gradients are derived again.
        op = training_backward if torch.is_grad_enabled() else ops.recurrent_backward.default
        dx, dh0, dc0, dweights = op(
            dy,
            dh_n,
            None if c0 is None else dc_n,
            x,
            batch_sizes,
            h0,
            c0,
            weights,
            y,
            gates,
            cells,
            ctx.mode,
            need_x,
            any(need_w),
        )
        dweights = dweights or [None] * len(weights)
        return (
            None,
            None,
            dx if need_x else None,
            dh0 if need_h0 else None,
            dc0 if need_c0 else None,
            *(dw if need else None for dw, need in zip(dweights, need_w, strict=True)),
        )

    @staticmethod
    def vmap(info: Any, in_dims, *args):
        mode, batch_sizes, x, h0, c0, *weights = args
        _, d_sizes, d_x, d_h0, d_c0, *d_w = in_dims
        dims = (d_x, d_sizes, d_h0, d_c0, d_w, None)
        return fold_forward(
            training, info.batch_size, dims, (x, batch_sizes, h0, c0, weights, mode)
        )


class RecurrentByCudnn(Recurrent):
    """cuDNN's reserve space stands for the gates, by which recurrent_backward knows it."""

    @staticmethod
    def forward(mode, batch_sizes, x, h0, c0, *weights):
        args = (x, batch_sizes, h0, c0, list(weights))
        check_recurrent("recurrent", mode, *args)
        with _AutoDispatchBelowAutograd():
            return cudnn.forward(*args, mode, True)


def _through_reference(ctx: Any, grad_outputs) -> list[Tensor | None]:
    """The gradients of x, h0, c0 and the weights, see `batched`."""
    batch_sizes, x, h0, c0, _, _, _, *weights = ctx.saved_tensors

    def forward(x, h0, c0, *weights) -> tuple[Tensor, ...]:
        return reference.recurrent(x, batch_sizes, h0, c0, list(weights), ctx.mode)

    inputs = [x, h0, c0, *weights]
    return through_reference(forward, inputs, ctx.needs_input_grad[2:], grad_outputs)


class RecurrentBackward(torch.autograd.Function):
    """Arguments: mode, need_dx, need_dw, batch_sizes, dy, dh_n, dc_n, x, h0, c0, y, gates, cells,
    then the weights."""

    @staticmethod
    def forward(mode, need_dx, need_dw, batch_sizes, *tensors):
        dy, dh_n, dc_n, x, h0, c0, y, gates, cells, *weights = tensors
        saved = (y, gates, cells)
        with _AutoDispatchBelowAutograd():
            dx, dh0, dc0, dweights = ops.recurrent_backward.default(
                dy, dh_n, dc_n, x, batch_sizes, h0, c0, weights, *saved, mode, need_dx, need_dw
            )
        return dx, dh0, dc0, *dweights

    @staticmethod
    def setup_context(ctx: Any, inputs, output) -> None:
        mode, _, _, batch_sizes, dy, dh_n, dc_n, x, h0, c0, _, _, _, *weights = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(batch_sizes, dy, dh_n, dc_n, x, h0, c0, *weights)
        ctx.mode = mode

    @staticmethod
    def backward(ctx: Any, *grad_outputs):
        """Derive the reference's forward and backward together, by all that goes in: y, gates
        and cells are functions of the other inputs here and take no gradient themselves."""
        batch_sizes, *inputs = ctx.saved_tensors

        def first_order(dy, dh_n, dc_n, x, h0, c0, *weights) -> list[Tensor]:
            weights = list(weights)
            y, _, _, gates, cells = reference.recurrent(x, batch_sizes, h0, c0, weights, ctx.mode)
            dx, dh0, dc0, dweights = reference.recurrent_backward(
                (dy, dh_n, dc_n), x, batch_sizes, h0, c0, weights, (y, gates, cells), ctx.mode
            )
            return [dx, dh0, dc0, *dweights]

        needed = (*ctx.needs_input_grad[4:10], *ctx.needs_input_grad[13:])
        result = through_reference(first_order, inputs, needed, grad_outputs)
        return None, None, None, None, *result[:6], None, None, None, *result[6:]

    @staticmethod
    def vmap(info: Any, in_dims, *args):
        return map_slices(RecurrentBackward.apply, info.batch_size, in_dims, args)


def _autograd_recurrent(keyset, x, batch_sizes, h0, c0, weights, mode):
    if needs_grad((x, h0, c0, *weights)):
        return training(x, batch_sizes, h0, c0, weights, mode)
    with _AutoDispatchBelowAutograd():
        return ops.recurrent.default(x, batch_sizes, h0, c0, weights, mode)


def _autograd_recurrent_backward(keyset, *args):
    dy, dh_n, dc_n, x, _, h0, c0, weights, *_ = args
    if needs_grad((dy, dh_n, dc_n, x, h0, c0, *weights)):
        return training_backward(*args)
    with _AutoDispatchBelowAutograd():
        return ops.recurrent_backward.default(*args)


def register(lib: torch.library.Library) -> None:
    """Give the ops of `lib` their Autograd kernels and their vmap rules."""
    lib.impl("recurrent", _autograd_recurrent, "Autograd", with_keyset=True)
    lib.impl("recurrent_backward", _autograd_recurrent_backward, "Autograd", with_keyset=True)
    register_fold(lib, ops.recurrent.default, fold_forward)
    register_fold(lib, ops.recurrent_inference.default, fold_forward)
    register_fold(lib, ops.recurrent_backward.default, map_slices)
    register_fold(lib, ops.recurrent_pack.default, map_slices)
