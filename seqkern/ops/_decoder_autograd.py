"""Derivatives and vmap of the decoder ops, as two autograd functions, like the recurrent ops':
`Decoder` is the first derivative and `DecoderBackward`, derived through the reference, the second.
"""

from typing import Any

import torch
from torch import Tensor
from torch._C import _AutoDispatchBelowAutograd

from seqkern.ops._derivatives import batched, register_fold, register_rules, through_reference
from seqkern.ops._vmap import map_slices
from seqkern.reference import decoder as reference

ops = torch.ops.seqkern

# Places among the arguments of the forward.
GATES_X, H0, C0, KEY, VALUE, K_LENS, W_Q, B_Q, V, W_C, W_HH, B_HH, MODE = range(13)
DERIVED = (GATES_X, H0, C0, KEY, VALUE, W_Q, B_Q, V, W_C, W_HH, B_HH)
# The arguments of the backward before those of the forward: four gradients, six saved results.
GRADS, SAVED = 4, 6


class Decoder(torch.autograd.Function):
    """Arguments: those of the op."""

    @staticmethod
    def forward(*args):
        with _AutoDispatchBelowAutograd():
            return ops.attention_decoder.default(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs, output) -> None:
        s, contexts, weights, c_n, queries, gates, cells = output
        ctx.set_materialize_grads(False)
        absent = () if inputs[C0] is not None else (c_n,)
        ctx.mark_non_differentiable(*absent, queries, gates, cells)
        ctx.save_for_backward(s, contexts, weights, queries, gates, cells, *inputs[:MODE])
        ctx.mode = inputs[MODE]

    @staticmethod
    def backward(ctx: Any, *grad_outputs):
        grads, needs = grad_outputs[:GRADS], ctx.needs_input_grad
        result: list[Tensor | None] = [None] * (MODE + 1)
        if all(g is None for g in grads):
            return tuple(result)
        saved, args = ctx.saved_tensors[:SAVED], (*ctx.saved_tensors[SAVED:], ctx.mode)
        if torch.is_grad_enabled() and batched(grads):
            found = through_reference(
                lambda *t: reference.attention_decoder(*t, ctx.mode), args[:MODE], needs, grads
            )
            return *found, None
        # In a backward with create_graph, and under torch.func, the gradients are derived again.
        op = (
            DecoderBackward.apply
            if torch.is_grad_enabled()
            else ops.attention_decoder_backward.default
        )
        dgates_x, dproducts, *derived = op(*grads, *saved, *args)
        result[GATES_X] = dgates_x
        result[H0], result[C0], result[KEY], result[VALUE], result[V] = derived
        if any(needs[i] for i in (W_Q, B_Q, W_C, W_HH, B_HH)):
            s, contexts, n = saved[0], saved[1], args[W_Q].size(0)
            dw, db, dw_c = reference.weight_gradients(dgates_x, dproducts, args[H0], s, contexts)
            result[W_Q], result[W_HH], result[W_C] = dw[:n], dw[n:], dw_c
            result[B_Q], result[B_HH] = db[:n], db[n:]
        return tuple(g if need else None for g, need in zip(result, needs, strict=True))

    @staticmethod
    def vmap(info: Any, in_dims, *args):
        return map_slices(Decoder.apply, info.batch_size, in_dims, args)


class DecoderBackward(torch.autograd.Function):
    """Arguments: those of the op."""

    @staticmethod
    def forward(*args):
        with _AutoDispatchBelowAutograd():
            return ops.attention_decoder_backward.default(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs, output) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:GRADS], *inputs[GRADS + SAVED : -1])
        ctx.mode = inputs[-1]

    @staticmethod
    def backward(ctx: Any, *grad_outputs):
        """Derive the reference's forward and backward together, by all that goes in: the saved
        results are functions of the other inputs here and take no gradient themselves."""

        def first_order(*inputs: Tensor) -> tuple[Tensor, ...]:
            (ds, dcontexts, dweights, dc_n), args = inputs[:GRADS], (*inputs[GRADS:], ctx.mode)
            s, contexts, weights, _, *rest = reference.attention_decoder(*args)
            saved = reference.Saved(s, contexts, weights, *rest)
            return reference.attention_decoder_backward(ds, dcontexts, dweights, dc_n, saved, *args)

        needed = (*ctx.needs_input_grad[:GRADS], *ctx.needs_input_grad[GRADS + SAVED : -1])
        result = through_reference(first_order, ctx.saved_tensors, needed, grad_outputs)
        return *result[:GRADS], *[None] * SAVED, *result[GRADS:], None

    @staticmethod
    def vmap(info: Any, in_dims, *args):
        return map_slices(DecoderBackward.apply, info.batch_size, in_dims, args)


def register(lib: torch.library.Library) -> None:
    """Give the ops of `lib` their Autograd kernels and their vmap rules."""
    backward = ops.attention_decoder_backward.default
    places = *range(GRADS), *(GRADS + SAVED + i for i in DERIVED)
    register_rules(lib, ops.attention_decoder.default, Decoder, DERIVED, map_slices)
    register_rules(lib, backward, DecoderBackward, places, map_slices)
    register_fold(lib, ops.attention_decoder_inference.default, map_slices)
