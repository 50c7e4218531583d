"""Derivatives and vmap of the attention ops, as two autograd functions, like the recurrent ops':
`Attention` is the first derivative and `AttentionBackward`, derived through the reference, the
second.
"""

from typing import Any

import torch
from torch import Tensor
from torch._C import _AutoDispatchBelowAutograd

from seqkern.ops._derivatives import batched, register_rules, through_reference
from seqkern.ops._vmap import map_slices
from seqkern.reference import attention as reference

ops = torch.ops.seqkern

# Of the arguments of seqkern::attention: q, k, v, mask, bias, q_lens, k_lens, alibi_slopes, sinks,
# seed, cu_q and cu_k are tensors, and these have a gradient.
TENSORS = 12
Q, K, V, BIAS, SINKS = 0, 1, 2, 4, 8
DERIVED = (Q, K, V, BIAS, SINKS)
# q_lens, k_lens, cu_q and cu_k.
LENGTHS = (5, 6, 10, 11)


class Attention(torch.autograd.Function):
    """Takes the arguments of seqkern::attention, in order."""

    @staticmethod
    def forward(*args):
        with _AutoDispatchBelowAutograd():
            return ops.attention.default(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs, output) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output, *inputs[:TENSORS])
        ctx.rule = inputs[TENSORS:]

    @staticmethod
    def backward(ctx: Any, *grad_outputs):
        do, dlse = grad_outputs
        o, lse, *tensors = ctx.saved_tensors
        grads: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        if do is None and dlse is None:
            return tuple(grads)
        if torch.is_grad_enabled() and batched(grad_outputs):
            found = through_reference(
                lambda *t: reference.attention(*t, *ctx.rule),
                tensors,
                ctx.needs_input_grad,
                grad_outputs,
            )
            return *found, *[None] * len(ctx.rule)
        if do is None:
            do = torch.zeros_like(o)
        need = ctx.needs_input_grad
        # In a backward with create_graph, and under torch.func, the gradients are derived again.
        op = AttentionBackward.apply if torch.is_grad_enabled() else ops.attention_backward.default
        needs = need[Q], need[K] or need[V], need[BIAS]
        results = op(do, dlse, o, lse, *tensors, *ctx.rule, *needs)
        for i, g in zip(DERIVED, results, strict=True):
            grads[i] = g if need[i] else None
        return tuple(grads)

    @staticmethod
    def vmap(info: Any, in_dims, *args):
        return fold_batch(Attention.apply, info.batch_size, in_dims, args)


class AttentionBackward(torch.autograd.Function):
    """Takes the arguments of seqkern::attention_backward, in order."""

    @staticmethod
    def forward(*args):
        with _AutoDispatchBelowAutograd():
            return ops.attention_backward.default(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs, output) -> None:
        do, dlse, _, _, *args = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(do, dlse, *args[:TENSORS])
        ctx.rule = args[TENSORS:]

    @staticmethod
    def backward(ctx: Any, *grad_outputs):
        """Derive the reference's forward and backward together by all that goes in: o and lse are
        functions of the other inputs here and take no gradient themselves."""
        do, dlse, *tensors = ctx.saved_tensors
        rule, needs = ctx.rule[:-3], ctx.rule[-3:]
        # In the order of the op: do, dlse, o, lse, q, ...
        places = (0, 1, *(4 + i for i in DERIVED))

        def first_order(do, dlse, *derived):
            args = list(tensors)
            for i, value in zip(DERIVED, derived, strict=True):
                args[i] = value
            o, lse = reference.attention(*args, *rule)
            return reference.attention_backward(do, dlse, o, lse, *args, *rule, *needs)

        inputs = [do, dlse, *(tensors[i] for i in DERIVED)]
        needed = [ctx.needs_input_grad[place] for place in places]
        grads: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        found = through_reference(first_order, inputs, needed, grad_outputs)
        for place, g in zip(places, found, strict=True):
            grads[place] = g
        return tuple(grads)

    @staticmethod
    def vmap(info: Any, in_dims, *args):
        return map_slices(AttentionBackward.apply, info.batch_size, in_dims, args)


def fold_batch(op, v: int, in_dims, args):
    """vmap of the forward: the new dimension joins B, or each slice is a call of its own where it
    cannot: packed rows do not interleave, and dropout counts the rows of the batch."""
    tensors, rule = args[:TENSORS], args[TENSORS:]
    cu_q, seed, sinks = tensors[10], tensors[9], in_dims[SINKS]
    if cu_q is not None or seed is not None or sinks is not None:
        return map_slices(op, v, in_dims, args)
    rows = tensors[Q].size(1 if in_dims[Q] == 0 else 0)
    if in_dims[Q] is None:
        rows = tensors[Q].size(0)

    def fold(i: int, t: Tensor | None, dim: int | None) -> Tensor | None:
        if t is None or i == SINKS or (dim is None and t.size(0) == 1 and t.dim() == 4 and i > V):
            return t
        t = t.unsqueeze(0).expand(v, *t.shape) if dim is None else t.movedim(dim, 0)
        if t.dim() == 2 and i == 7:
            t = t.unsqueeze(1)
        return t.expand(v, rows, *t.shape[2:]).flatten(0, 1)

    folded = [fold(i, t, d) for i, (t, d) in enumerate(zip(tensors, in_dims, strict=False))]
    o, lse = op(*folded, *rule)
    return (o.unflatten(0, (v, rows)), lse.unflatten(0, (v, rows))), (0, 0)


def register(lib: torch.library.Library) -> None:
    """Give the ops of `lib` their Autograd kernels and their vmap rules."""
    backward = ops.attention_backward.default
    places = 0, 1, *(4 + i for i in DERIVED)
    register_rules(lib, ops.attention.default, Attention, DERIVED, fold_batch)
    register_rules(lib, backward, AttentionBackward, places, map_slices)
