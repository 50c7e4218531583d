"""The recurrent ops: schemas, kernels, shape functions, and the entry that the layers call.

The reference serves every device; the C++ extension registers faster kernels for the same
schemas under the CPU key and so overrides it, whichever of the two is loaded first. Inference
and training are two ops because training returns what the backward reads, and because an op
with an autograd formula in Python costs tens of microseconds a call even where nothing needs a
gradient.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._C import (
    _are_functorch_transforms_active,
    _get_tracing_state,
    _is_any_autocast_enabled,
    _len_torch_dispatch_stack,
)
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from seqkern.ops import _recurrent_block as block
from seqkern.ops import _recurrent_cudnn as cudnn
from seqkern.ops import _recurrent_steps as steps
from seqkern.ops._checks import (
    autocast,
    check_batch_sizes,
    check_mode,
    check_recurrent,
    check_recurrent_backward,
    weight_names,
)
from seqkern.ops._derivatives import exporting, only_plain_operations, takes_graph
from seqkern.ops._recurrent_autograd import register, training, training_by_cudnn
from seqkern.reference import recurrent as reference
from seqkern.reference.cells import GATES

_LIB = torch.library.Library("seqkern", "FRAGMENT")
_LIB.define(
    "recurrent_inference(Tensor x, Tensor? batch_sizes, Tensor h0, Tensor? c0, Tensor[] weights,"
    " Tensor[] packed, str mode) -> (Tensor y, Tensor h_n, Tensor c_n)"
)
_LIB.define(
    "recurrent(Tensor x, Tensor? batch_sizes, Tensor h0, Tensor? c0, Tensor[] weights, str mode)"
    " -> (Tensor y, Tensor h_n, Tensor c_n, Tensor gates, Tensor cells)"
)
_LIB.define(
    "recurrent_backward(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor x, Tensor? batch_sizes,"
    " Tensor h0, Tensor? c0, Tensor[] weights, Tensor y, Tensor gates, Tensor cells, str mode,"
    " bool need_dx, bool need_dw)"
    " -> (Tensor dx, Tensor dh0, Tensor dc0, Tensor[] dweights)"
)
_LIB.define(
    "recurrent_prepacked(Tensor x, Tensor? h0, Tensor? c0, Tensor packed)"
    " -> (Tensor y, Tensor h_n, Tensor c_n)"
)
_LIB.define("recurrent_pack(Tensor[] weights, str mode, int directions) -> Tensor[]")


# ---- kernels for every device -------------------------------------------------------------


def _recurrent(x, batch_sizes, h0, c0, weights, mode):
    check_recurrent("recurrent", mode, x, batch_sizes, h0, c0, weights)
    if batch_sizes is not None and not is_compiling():  # it has no values while it is traced
        check_batch_sizes("recurrent", batch_sizes, x.size(0), h0.size(1))
    return reference.recurrent(x, batch_sizes, h0, c0, weights, mode)


def _recurrent_inference(x, batch_sizes, h0, c0, weights, packed, mode):
    return _recurrent(x, batch_sizes, h0, c0, packed or weights, mode)[:3]


def _recurrent_backward(
    dy, dh_n, dc_n, x, batch_sizes, h0, c0, weights, y, gates, cells, mode, need_dx, need_dw
):
    op, grads, saved = "recurrent_backward", (dy, dh_n, dc_n), (y, gates, cells)
    check_recurrent(op, mode, x, batch_sizes, h0, c0, weights)
    if batch_sizes is not None:
        check_batch_sizes(op, batch_sizes, x.size(0), h0.size(1))
    check_recurrent_backward(op, mode, x, h0, weights, grads, saved)
    dx, dh0, dc0, dweights = reference.recurrent_backward(
        grads, x, batch_sizes, h0, c0, weights, saved, mode
    )
    return dx if need_dx else x.new_empty(0), dh0, dc0, dweights if need_dw else []


def _recurrent_pack(weights, mode, directions):
    check_mode("recurrent_pack", mode)
    weight_names("recurrent_pack", mode, directions, len(weights))
    # The reference has no layout of its own, but a snapshot must not follow the weights.
    return [w.clone() for w in weights]


_LIB.impl("recurrent", _recurrent, "CompositeExplicitAutograd")
_LIB.impl("recurrent_inference", _recurrent_inference, "CompositeExplicitAutograd")
_LIB.impl("recurrent_backward", _recurrent_backward, "CompositeExplicitAutograd")
_LIB.impl("recurrent_pack", _recurrent_pack, "CompositeExplicitAutograd")


# ---- kernels for CUDA, where they were built ----------------------------------------------


def _recurrent_cuda(x, batch_sizes, h0, c0, weights, mode, save=True):
    check_recurrent("recurrent", mode, x, batch_sizes, h0, c0, weights)
    if block.refusal(x.dtype, _has_projection(h0, weights), x.get_device()):
        return _recurrent(x, batch_sizes, h0, c0, weights, mode)
    # With `save` the op owes the gates; cuDNN is then chosen before it, in _recorded.
    if not save and cudnn.chosen(mode, x, batch_sizes, h0, training=False):
        return cudnn.forward(x, batch_sizes, h0, c0, weights, mode, save)
    launch = torch.ops.seqkern.recurrent_block.default
    if not block.fits(mode, x.dtype, h0.size(2), False, x.get_device()):
        _check_steps("recurrent", x, batch_sizes, h0)
        launch = partial(steps.forward, torch.ops.seqkern.recurrent_step.default)
    return block.forward(launch, x, batch_sizes, h0, c0, weights, mode, save)


def _recurrent_inference_cuda(x, batch_sizes, h0, c0, weights, packed, mode):
    return _recurrent_cuda(x, batch_sizes, h0, c0, packed or weights, mode, False)[:3]


def _recurrent_backward_cuda(
    dy, dh_n, dc_n, x, batch_sizes, h0, c0, weights, y, gates, cells, mode, need_dx, need_dw
):
    op, grads, saved = "recurrent_backward", (dy, dh_n, dc_n), (y, gates, cells)
    args = (x, batch_sizes, h0, c0, weights)
    check_recurrent(op, mode, *args)
    by_cudnn = gates.dtype == torch.uint8  # then they are its reserve space
    kept = (y, None, None) if by_cudnn else saved
    check_recurrent_backward(op, mode, x, h0, weights, grads, kept)
    if block.refusal(x.dtype, _has_projection(h0, weights), x.get_device()):
        return _recurrent_backward(*grads, *args, *saved, mode, need_dx, need_dw)
    if by_cudnn:
        return cudnn.backward(grads, *args, (y, gates), mode, need_dx, need_dw)
    launch = torch.ops.seqkern.recurrent_block_backward.default
    if not block.fits(mode, x.dtype, h0.size(2), True, x.get_device()):
        _check_steps(op, x, batch_sizes, h0)
        launch = partial(steps.backward, torch.ops.seqkern.recurrent_step_backward.default)
    return block.backward(launch, grads, *args, saved, mode, need_dx, need_dw)


def _has_projection(h0, weights) -> bool:
    return len(weights) // h0.size(0) % 2 == 1


def _check_steps(op, x, batch_sizes, h0) -> None:
    """A launch of all steps checks them by itself."""
    if batch_sizes is not None:
        check_batch_sizes(op, batch_sizes, x.size(0), h0.size(1))


if hasattr(torch.ops.seqkern, "recurrent_block"):
    _LIB.impl("recurrent", _recurrent_cuda, "CUDA")
    _LIB.impl("recurrent_inference", _recurrent_inference_cuda, "CUDA")
    _LIB.impl("recurrent_backward", _recurrent_backward_cuda, "CUDA")


# ---- shape functions ----------------------------------------------------------------------


@torch.library.register_fake("seqkern::recurrent", lib=_LIB)
def _recurrent_fake(x, batch_sizes, h0, c0, weights, mode):
    check_recurrent("recurrent", mode, x, batch_sizes, h0, c0, weights)
    directions, batch, outputs = h0.shape
    hidden = weights[0].size(0) // GATES[mode]
    rows = x.size(0) * x.size(1) if x.dim() == 3 else x.size(0)
    has_cells, has_gates = mode == "LSTM", mode in ("LSTM", "GRU")
    return (
        x.new_empty(*x.shape[:-1], directions * outputs),
        h0.new_empty(directions, batch, outputs),
        x.new_empty(directions, batch, hidden) if has_cells else x.new_empty(0),
        x.new_empty(directions, rows, 4 * hidden) if has_gates else x.new_empty(0),
        x.new_empty(directions, rows, hidden) if has_cells else x.new_empty(0),
    )


@torch.library.register_fake("seqkern::recurrent_inference", lib=_LIB)
def _recurrent_inference_fake(x, batch_sizes, h0, c0, weights, packed, mode):
    return _recurrent_fake(x, batch_sizes, h0, c0, weights, mode)[:3]


@torch.library.register_fake("seqkern::recurrent_backward", lib=_LIB)
def _recurrent_backward_fake(
    dy, dh_n, dc_n, x, batch_sizes, h0, c0, weights, y, gates, cells, mode, need_dx, need_dw
):
    return (
        x.new_empty(x.shape) if need_dx else x.new_empty(0),
        h0.new_empty(h0.shape),
        x.new_empty(0) if c0 is None else c0.new_empty(c0.shape),
        [w.new_empty(w.shape) for w in weights] if need_dw else [],
    )


@torch.library.register_fake("seqkern::recurrent_pack", lib=_LIB)
def _recurrent_pack_fake(weights, mode, directions):
    raise RuntimeError("recurrent_pack: weights are packed in eager mode, not while tracing")


register(_LIB)


# ---- the entry ----------------------------------------------------------------------------

_training_op = torch.ops.seqkern.recurrent.default
_inference_op = torch.ops.seqkern.recurrent_inference.default
# A dense layer on packed weights alone: the short call for which `unobserved` asks.
prepacked_op = torch.ops.seqkern.recurrent_prepacked.default


def recurrent(
    mode: str,
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: list[Tensor],
    *,
    batch_sizes: Tensor | None = None,
    packed: list[Tensor] | None = None,
) -> tuple[Tensor, Tensor, Any]:
    """One recurrent layer, in one or two directions: checks, autocast, and the choice of op.

    Args:
        mode: "LSTM", "GRU", "RNN_TANH" or "RNN_RELU".
        x: (T, B, I), or (N, I) packed with `batch_sizes`; of a floating-point dtype.
        h0: (D, B, P), D = 1 or 2 directions, P = H or the size of the projection.
        c0: (D, B, H) for LSTM, else None.
        weights: for each direction w_ih (G*H, I), w_hh (G*H, P)[, b_ih (G*H,), b_hh (G*H,)]
            [, w_hr (P, H)], the order of torch.nn.
        batch_sizes: (T,) int64 on the CPU, as in torch.nn.utils.rnn.PackedSequence.
        packed: what seqkern::recurrent_pack returned for these weights, to be read in their
            place where no gradient is needed; not by a graph that torch.export or torch.jit.trace
            takes.

    Returns:
        y (T, B, D*P) or (N, D*P); h_n (D, B, P); c_n (D, B, H) for LSTM, else None.

    Under torch.autocast the tensors but float64 ones are cast to its dtype, and the results
    have it.

    Raises:
        TypeError: an argument is of the wrong type, or c0 does not suit the mode.
        ValueError: a size, dtype or device does not match.
    """
    try:
        if _is_any_autocast_enabled():
            x, h0, c0, weights = autocast((x, h0, c0, weights), x)
        if needs_grad(x, h0, c0, weights):
            args = (x, batch_sizes, h0, c0, weights, mode)
            y, h_n, c_n, _, _ = _recorded(*args)(*args)
        else:
            y, h_n, c_n = _inference_op(x, batch_sizes, h0, c0, weights, packed or (), mode)
    except (AttributeError, RuntimeError, TypeError, ValueError):
        # The ops refuse what does not fit; only then is it worth finding out what it was. The
        # checks in advance would cost a single step as much as its arithmetic.
        op = "rnn" if str(mode).startswith("RNN_") else str(mode).lower()
        check_recurrent(op, mode, x, batch_sizes, h0, c0, weights)
        if batch_sizes is not None:
            check_batch_sizes(op, batch_sizes, x.size(0), h0.size(1))
        raise
    return y, h_n, None if c0 is None else c_n


def needs_grad(x: Tensor, h0: Tensor, c0: Tensor | None, weights: Sequence[Tensor]) -> bool:
    """Whether a call with these tensors has to be recorded."""
    if forward_ad._current_level >= 0:
        return True
    if not torch.is_grad_enabled():
        # Only the training op has an Autograd kernel: the inference op would cut the tape where an
        # exported graph is trained.
        return exporting()
    if x.requires_grad or h0.requires_grad or (c0 is not None and c0.requires_grad):
        return True
    for w in weights:
        if w.requires_grad:
            return True
    # Inside torch.func transforms the outermost tensor does not tell what the inner ones need.
    return _are_functorch_transforms_active() or exporting()


def unobserved() -> bool:
    """Whether a call is for its numbers alone: no gradient, autocast, transform, mode, tracing."""
    return not (
        is_compiling()
        or _get_tracing_state() is not None
        or torch.is_grad_enabled()
        or _is_any_autocast_enabled()
        or _are_functorch_transforms_active()
        or _len_torch_dispatch_stack()
        or forward_ad._current_level >= 0
    )


def _recorded(x, batch_sizes, h0, c0, weights, mode) -> Callable[..., tuple[Tensor, ...]]:
    """The forward whose derivatives the context can take."""
    if only_plain_operations():
        return _recurrent
    if takes_graph():
        return _training_op
    if cudnn.chosen(mode, x, batch_sizes, h0, training=True):
        proj = _has_projection(h0, weights)
        if not block.refusal(x.dtype, proj, x.get_device()):
            return training_by_cudnn
    return training
