"""Derivatives and vmap of the additive attention ops: `AdditiveAttention` is the first derivative
and `AdditiveAttentionBackward`, derived through the reference, the second.
"""

from typing import Any

import torch
from torch import Tensor
from torch._C import _AutoDispatchBelowAutograd

from seqkern.ops._derivatives import batched, register_rules, through_reference
from seqkern.ops._vmap import map_slices
from seqkern.reference import additive as reference

ops = torch.ops.seqkern

# Of the arguments of seqkern::additive_attention: query, key, value, v, mask, bias and k_lens are
# tensors, and all but mask and k_lens have a gradient.
TENSORS = 7
DERIVED = (0, 1, 2, 3, 5)
V = 3


class AdditiveAttention(torch.autograd.Function):
    """Takes the arguments of seqkern::additive_attention, in order."""

    @staticmethod
    def forward(*args):
        with _AutoDispatchBelowAutograd():
            return ops.additive_attention.default(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs, output) -> None:
        o, weights, lse = output
        ctx.set_materialize_grads(False)
        ctx.scale, ctx.need_weights = inputs[TENSORS:]
        if not ctx.need_weights:
            ctx.mark_non_differentiable(weights)
        ctx.save_for_backward(o, lse, *inputs[:TENSORS])

    @staticmethod
    def backward(ctx: Any, *grad_outputs):
        do, dweights, dlse = grad_outputs
        o, lse, *tensors = ctx.saved_tensors
        grads: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        if do is None and dweights is None and dlse is None:
            return tuple(grads)
        if torch.is_grad_enabled() and batched(grad_outputs):
            found = through_reference(
                lambda *t: reference.additive_attention(*t, ctx.scale, ctx.need_weights),
                tensors,
                ctx.needs_input_grad,
                grad_outputs,
            )
            return *found, None, None
        if do is None:
            do = torch.zeros_like(o)
        needs = [ctx.needs_input_grad[i] for i in DERIVED]
        # In a backward with create_graph, and under torch.func, the gradients are derived again.
        op = (
            AdditiveAttentionBackward.apply
            if torch.is_grad_enabled()
            else ops.additive_attention_backward.default
        )
        results = op(do, dweights, dlse, o, lse, *tensors, ctx.scale, *needs)
        for i, need, g in zip(DERIVED, needs, results, strict=True):
            grads[i] = g if need else None
        return tuple(grads)

    @staticmethod
    def vmap(info: Any, in_dims, *args):
        return fold_batch(AdditiveAttention.apply, info.batch_size, in_dims, args)


class AdditiveAttentionBackward(torch.autograd.Function):
    """Takes the arguments of seqkern::additive_attention_backward, in order."""

    @staticmethod
    def forward(*args):
        with _AutoDispatchBelowAutograd():
            return ops.additive_attention_backward.default(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs, output) -> None:
        do, dweights, dlse, _, _, *args = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(do, dweights, dlse, *args[:TENSORS])
        ctx.scale, *ctx.needs = args[TENSORS:]

    @staticmethod
    def backward(ctx: Any, *grad_outputs):
        """Derive the reference's forward and backward together by all that goes in: o and lse are
        functions of the other inputs here and take no gradient themselves."""
        do, dweights, dlse, *tensors = ctx.saved_tensors
        # In the order of the op: do, dweights, dlse, o, lse, query, ...
        places = (0, 1, 2, *(5 + i for i in DERIVED))

        def first_order(do, dweights, dlse, *derived):
            args = list(tensors)
            for i, t in zip(DERIVED, derived, strict=True):
                args[i] = t
            o, _, lse = reference.additive_attention(*args, ctx.scale, False)
            grads = do, dweights, dlse, o, lse
            return reference.additive_attention_backward(*grads, *args, ctx.scale, *ctx.needs)

        inputs = [do, dweights, dlse, *(tensors[i] for i in DERIVED)]
        needed = [ctx.needs_input_grad[place] for place in places]
        grads: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        found = through_reference(first_order, inputs, needed, grad_outputs)
        for place, g in zip(places, found, strict=True):
            grads[place] = g
        return tuple(grads)

    @staticmethod
    def vmap(info: Any, in_dims, *args):
        return map_slices(AdditiveAttentionBackward.apply, info.batch_size, in_dims, args)


def fold_batch(op, size: int, in_dims, args):
    """vmap of the forward: the new dimension joins B; with a v for each slice, each slice is a
    call of its own."""
    if in_dims[V] is not None:
        return map_slices(op, size, in_dims, args)
    tensors, rule = args[:TENSORS], args[TENSORS:]
    B = tensors[0].size(0 if in_dims[0] is None else int(in_dims[0] == 0))

    def fold(i: int, t: Tensor | None, dim: int | None) -> Tensor | None:
        if t is None or i == V:
            return t
        t = t.unsqueeze(0).expand(size, *t.shape) if dim is None else t.movedim(dim, 0)
        # A mask of one row for the whole batch is one row for each of its slices.
        return t.expand(size, B, *t.shape[2:]).flatten(0, 1)

    folded = [fold(i, t, d) for i, (t, d) in enumerate(zip(tensors, in_dims, strict=False))]
    o, weights, lse = op(*folded, *rule)
    dims = 0, (0 if rule[-1] else None), 0
    weights = weights.unflatten(0, (size, B)) if rule[-1] else weights
    return (o.unflatten(0, (size, B)), weights, lse.unflatten(0, (size, B))), dims


def register(lib: torch.library.Library) -> None:
    """Give the ops of `lib` their Autograd kernels and their vmap rules."""
    backward = ops.additive_attention_backward.default
    places = 0, 1, 2, *(5 + i for i in DERIVED)
    register_rules(lib, ops.additive_attention.default, AdditiveAttention, DERIVED, fold_batch)
    register_rules(lib, backward, AdditiveAttentionBackward, places, map_slices)
