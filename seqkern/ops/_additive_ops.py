"""The additive attention ops: schemas, kernels for each device, and shape functions.

The reference serves every device; C++ kernels replace it on the CPU and Triton's on CUDA.
`choose` says which, for the dispatch and for `seqkern.explain`.
"""

from importlib import import_module

import torch
from torch import Tensor

from seqkern.ops._additive_autograd import register
from seqkern.ops._additive_checks import check_additive, check_additive_backward
from seqkern.ops._attention_ops import refusal
from seqkern.ops.choice import HAS_TRITON, Choice, has_native_kernel
from seqkern.reference import additive as reference

_ARGS = (
    "Tensor query, Tensor key, Tensor value, Tensor v, Tensor? mask, Tensor? bias,"
    " Tensor? k_lens, float scale"
)
# The longest rows of query, key and value that the Triton kernels address.
MAX_WIDTH = 2**16
_LIB = torch.library.Library("seqkern", "FRAGMENT")
_LIB.define(
    f"additive_attention({_ARGS}, bool need_weights) -> (Tensor o, Tensor weights, Tensor lse)"
)
_LIB.define(
    "additive_attention_backward(Tensor do, Tensor? dweights, Tensor? dlse, Tensor o, Tensor lse,"
    f" {_ARGS}, bool need_dq, bool need_dk, bool need_dvalue, bool need_dv, bool need_dbias)"
    " -> (Tensor dquery, Tensor dkey, Tensor dvalue, Tensor dv, Tensor dbias)"
)


def choose(args: tuple) -> Choice:
    """The kernel that computes an additive attention, forward or backward.

    Args:
        args: of seqkern::additive_attention, in order; no value of a tensor is looked at.

    Returns:
        "native", "triton" or "reference", and why.
    """
    query, value = args[0], args[2]
    device = query.device.type
    if device == "cuda":
        if reason := refusal(query):
            return Choice("reference", reason)
        if max(query.size(2), value.size(2)) > MAX_WIDTH:
            return Choice("reference", f"the kernels address rows of up to {MAX_WIDTH} elements")
        return Choice("triton", "seqkern's own kernels serve every feature on this device")
    if device == "cpu" and has_native_kernel("additive_attention", device):
        return Choice("native", "seqkern's own kernel holds no tensor of Tq x Tk x D")
    return Choice("reference", f"no kernel of seqkern is loaded for {device}")


# ---- every device -------------------------------------------------------------------------


def _reference(*args):
    check_additive("additive_attention", *args[:-1])
    return tuple(t.contiguous() for t in reference.additive_attention(*args))


def _reference_backward(*args):
    op = "additive_attention_backward"
    check_additive(op, *args[5:-5])
    check_additive_backward(op, *args[:8])
    grads = reference.additive_attention_backward(*args)
    # Nothing may alias another result, as the placeholders of what is not needed would.
    return tuple(
        g.contiguous() if need else args[5].new_empty(0)
        for g, need in zip(grads, _needs(args), strict=True)
    )


def _needs(args) -> tuple[bool, ...]:
    """Of the backward's arguments: which gradients it computes."""
    *needs, need_dbias = args[-5:]
    return *needs, need_dbias and args[10] is not None


_LIB.impl("additive_attention", _reference, "CompositeExplicitAutograd")
_LIB.impl("additive_attention_backward", _reference_backward, "CompositeExplicitAutograd")


# ---- CUDA ---------------------------------------------------------------------------------


def _cuda(*args):
    if choose(args).kernel == "reference":
        return _reference(*args)
    # By its name, and only here: importing seqkern must not need Triton.
    return import_module("seqkern.kernels.additive_attention").additive_attention(*args)


def _cuda_backward(*args):
    if choose(args[5:]).kernel == "reference":
        return _reference_backward(*args)
    kernels = import_module("seqkern.kernels.additive_attention")
    return kernels.additive_attention_backward(*args)


# Without Triton the reference stays, and `seqkern doctor` says so.
if HAS_TRITON:
    _LIB.impl("additive_attention", _cuda, "CUDA")
    _LIB.impl("additive_attention_backward", _cuda_backward, "CUDA")


# ---- shape functions ----------------------------------------------------------------------


@torch.library.register_fake("seqkern::additive_attention", lib=_LIB)
def _additive_fake(*args):
    check_additive("additive_attention", *args[:-1])
    query, key, value = args[:3]
    B, Tq, _ = query.shape
    weights = query.new_empty((B, Tq, key.size(1)) if args[-1] else 0)
    lse_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    lse = query.new_empty((B, Tq), dtype=lse_dtype)
    return query.new_empty(B, Tq, value.size(2)), weights, lse


@torch.library.register_fake("seqkern::additive_attention_backward", lib=_LIB)
def _additive_backward_fake(*args):
    query, key, value, v, _, bias = args[5:11]

    def shaped(t: Tensor | None, need: bool) -> Tensor:
        return t.new_empty(t.shape) if t is not None and need else query.new_empty(0)

    inputs = query, key, value, v, bias
    return tuple(shaped(t, need) for t, need in zip(inputs, _needs(args), strict=True))


register(_LIB)
