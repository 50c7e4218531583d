"""The recurrent ops: schemas, shape functions and the entry that the layers call.

The reference serves every device; the C++ extension registers faster kernels for the same
schemas under the CPU key and so overrides it. Inference and training are two ops because the
second returns what the backward reads, and because an op with an autograd formula in Python
costs tens of microseconds a call even when nothing needs a gradient.
"""

import torch
from torch import Tensor

from seqkern.ops._checks import check_batch_sizes, check_recurrent
from seqkern.reference import recurrent as reference

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
_LIB.define("recurrent_pack(Tensor[] weights, str mode, int directions) -> Tensor[]")


def _recurrent(x, batch_sizes, h0, c0, weights, mode):
    check_recurrent("recurrent", mode, x, batch_sizes, h0, c0, weights)
    if batch_sizes is not None:
        check_batch_sizes("recurrent", batch_sizes, x.size(0), h0.size(1))
    return reference.recurrent(x, batch_sizes, h0, c0, weights, mode)


def _recurrent_inference(x, batch_sizes, h0, c0, weights, packed, mode):
    return _recurrent(x, batch_sizes, h0, c0, weights, mode)[:3]


def _recurrent_pack(weights, mode, directions):
    # The reference reads plain weights; an empty list is the packing that says so.
    return []


_LIB.impl("recurrent", _recurrent, "CompositeExplicitAutograd")
_LIB.impl("recurrent_inference", _recurrent_inference, "CompositeExplicitAutograd")
_LIB.impl("recurrent_pack", _recurrent_pack, "CompositeExplicitAutograd")

_training_op = torch.ops.seqkern.recurrent.default
_inference_op = torch.ops.seqkern.recurrent_inference.default


def recurrent(
    mode: str,
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: list[Tensor],
    *,
    batch_sizes: Tensor | None = None,
    packed: list[Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One recurrent layer; the sizes are those of `seqkern.reference.recurrent.recurrent`."""
    check_recurrent(mode, mode, x, batch_sizes, h0, c0, weights)
    if torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, h0, c0, *weights)
    ):
        y, h_n, c_n, _, _ = _training_op(x, batch_sizes, h0, c0, weights, mode)
    else:
        y, h_n, c_n = _inference_op(x, batch_sizes, h0, c0, weights, packed or [], mode)
    return y, h_n, c_n if c0 is not None else None
