"""The decoder ops, whole sequences of an attending recurrent decoder, and the public function."""

from typing import Any

import torch
from torch import Tensor
from torch._C import _is_any_autocast_enabled
from torch.nn import functional as F

from seqkern.ops._checks import autocast, check_shape
from seqkern.ops._decoder_autograd import DERIVED, GRADS, SAVED, Decoder, register
from seqkern.ops._decoder_checks import (
    check_decoder,
    check_decoder_backward,
    check_public,
)
from seqkern.ops._derivatives import (
    exporting,
    in_plain_operations,
    only_plain_operations,
    recorded,
    takes_graph,
)
from seqkern.ops.choice import Choice, has_native_kernel
from seqkern.reference import decoder as reference
from seqkern.reference.recurrent import accumulation_dtype, keep_dtypes

_ARGS = (
    "Tensor gates_x, Tensor h0, Tensor? c0, Tensor key, Tensor value, Tensor? k_lens, Tensor w_q,"
    " Tensor? b_q, Tensor v, Tensor w_c, Tensor w_hh, Tensor? b_hh, str mode"
)
_LIB = torch.library.Library("seqkern", "FRAGMENT")
_LIB.define(
    f"attention_decoder({_ARGS}) -> (Tensor s, Tensor contexts, Tensor weights, Tensor c_n,"
    " Tensor queries, Tensor gates, Tensor cells)"
)
_LIB.define(
    f"attention_decoder_inference({_ARGS})"
    " -> (Tensor s, Tensor contexts, Tensor weights, Tensor c_n)"
)
_LIB.define(
    "attention_decoder_backward(Tensor? ds, Tensor? dcontexts, Tensor? dweights, Tensor? dc_n,"
    " Tensor s, Tensor contexts, Tensor weights, Tensor queries, Tensor gates, Tensor cells,"
    f" {_ARGS}) -> (Tensor dgates_x, Tensor dproducts, Tensor dh0, Tensor dc0, Tensor dkey,"
    " Tensor dvalue, Tensor dv)"
)


# ---- every device -------------------------------------------------------------------------


def _forward(*args):
    check_decoder("attention_decoder", *args)
    return reference.attention_decoder(*args)


def _inference(*args):
    check_decoder("attention_decoder_inference", *args)
    return reference.attention_decoder(*args)[:GRADS]


def _backward(*args):
    op, saved = "attention_decoder_backward", reference.Saved(*args[GRADS : GRADS + SAVED])
    grads, rest = args[:GRADS], args[GRADS + SAVED :]
    check_decoder(op, *rest)
    check_decoder_backward(op, grads, saved, *rest)
    return reference.attention_decoder_backward(*grads, saved, *rest)


_LIB.impl("attention_decoder", _forward, "CompositeExplicitAutograd")
_LIB.impl("attention_decoder_inference", _inference, "CompositeExplicitAutograd")
_LIB.impl("attention_decoder_backward", _backward, "CompositeExplicitAutograd")


# ---- shape functions ----------------------------------------------------------------------


@torch.library.register_fake("seqkern::attention_decoder", lib=_LIB)
def _forward_fake(*args):
    check_decoder("attention_decoder", *args)
    a = reference.Arguments(*args)
    (N, H), Tk, T = a.h0.shape, a.key.size(1), a.gates_x.size(1)
    acc = accumulation_dtype(a.key.dtype)
    has_cells, has_gates = a.mode == "LSTM", a.mode in ("LSTM", "GRU")
    return (
        a.h0.new_empty(N, T, H),
        a.h0.new_empty(N, T, a.value.size(2)),
        a.h0.new_empty(N, T, Tk),
        a.h0.new_empty(N, H) if has_cells else a.h0.new_empty(0),
        a.h0.new_empty(N, T, a.key.size(2), dtype=acc),
        a.h0.new_empty(N, T, 4 * H) if has_gates else a.h0.new_empty(0),
        a.h0.new_empty(N, T, H) if has_cells else a.h0.new_empty(0),
    )


@torch.library.register_fake("seqkern::attention_decoder_inference", lib=_LIB)
def _inference_fake(*args):
    return _forward_fake(*args)[:GRADS]


@torch.library.register_fake("seqkern::attention_decoder_backward", lib=_LIB)
def _backward_fake(*args):
    a = reference.Arguments(*args[GRADS + SAVED :])
    N, T, n = a.gates_x.shape
    return (
        a.gates_x.new_empty(N, T, n),
        a.gates_x.new_empty(N, T, a.key.size(2) + n),
        a.h0.new_empty(a.h0.shape),
        a.h0.new_empty(0) if a.c0 is None else a.h0.new_empty(a.h0.shape),
        *(a.h0.new_empty(t.shape) for t in (a.key, a.value, a.v)),
    )


register(_LIB)


# ---- the public function ------------------------------------------------------------------

_training_op = torch.ops.seqkern.attention_decoder.default
_inference_op = torch.ops.seqkern.attention_decoder_inference.default


def attention_decoder(
    x: Tensor,
    state: Tensor | tuple[Tensor, Tensor],
    key: Tensor,
    value: Tensor,
    attention: tuple[Tensor, Tensor | None, Tensor],
    cell: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    *,
    mode: str = "GRU",
    k_lens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Any]:
    """All steps of a recurrent decoder that attends to a source before each of them.

    For i = 1 .. T, with the additive attention of Bahdanau, Cho and Bengio (2015, A.1.2)::

        e_ij = v . tanh(W_q s_{i-1} + b_q + key_j)      a_i = softmax over j < k_lens of e_ij
        c_i  = sum_j a_ij value_j
        s_i  = cell(W_ih [x_i ; c_i] + b_ih, W_hh s_{i-1} + b_hh, s_{i-1})

    Row n of the N = B*K rows reads the source n // K: K hypotheses of a beam, or K = 1. A single
    step of decoding is a call with T = 1.

    Args:
        x: (N, T, I), what is known of every step in advance; fp16, bf16, fp32 or fp64; T >= 1.
        state: s_0 (N, H); for LSTM the pair (s_0, c_0) of them, c_0 the state of the cell.
        key: (B, Tk, A), projected already (U h_j of the paper).
        value: (B, Tk, C).
        attention: W_q (A, H), b_q (A,) or None, v (A,).
        cell: W_ih (G*H, I + C), W_hh (G*H, H), b_ih and b_hh (G*H,) or None, in the order of
            torch.nn's cells; G is 3 for GRU, 4 for LSTM, else 1.
        mode: "GRU", "LSTM", "RNN_TANH" or "RNN_RELU".
        k_lens: (B,) int32 or int64: positions of each source that are read; what lies beyond is
            not, and a row with none has a = 0 and c = 0. None for all.

    Returns:
        s (N, T, H); contexts c (N, T, C); weights a (N, T, Tk); the state after the last step, as
        `state`. All but k_lens have a gradient, through every result.

    Under torch.autocast the tensors but float64 ones are cast to its dtype.

    Raises:
        TypeError: an argument is of the wrong type, or `state` does not suit the mode.
        ValueError: a size, dtype or device does not match; the message names it.
    """
    if _is_any_autocast_enabled() and isinstance(key, Tensor):
        given = (x, state, key, value, attention, cell)
        x, state, key, value, attention, cell = autocast(given, key)
    try:
        (w_q, b_q, v), (w_ih, w_hh, b_ih, b_hh) = attention, cell
        s_0, c_0 = state if mode == "LSTM" else (state, None)
        if k_lens is not None and k_lens.dtype == torch.int64:
            # A length beyond 32 bits must not wrap into a valid one.
            k_lens = k_lens.clamp(0, key.size(1)).int()
        # Not two slices: their gradients would be as large as w_ih each.
        w_x, w_c = w_ih.split([x.size(2), value.size(2)], 1)
        gates_x = _input_gates(x, w_x, b_ih)
        args = (gates_x, s_0, c_0, key, value, k_lens, w_q, b_q, v, w_c, w_hh, b_hh, mode)
        s, contexts, weights, c_n = _call(args)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        # The ops refuse what does not fit; only then is it worth finding out what it was. The
        # checks in advance would cost a single step as much as its arithmetic.
        check_public(x, state, key, value, attention, cell, mode, k_lens)
        raise
    last = s[:, -1]
    return s, contexts, weights, (last, c_n) if mode == "LSTM" else last


def _input_gates(x: Tensor, w_x: Tensor, b_ih: Tensor | None) -> Tensor:
    """W_x x_i + b_ih (N, T, G*H) in the accumulation dtype."""
    if b_ih is not None:  # F.linear would spread a smaller one
        check_shape("attention_decoder", "b_ih", "G*H", b_ih, (w_x.size(0),))
    acc = accumulation_dtype(x.dtype)
    if x.dtype == acc and not _is_any_autocast_enabled():
        return F.linear(x, w_x, b_ih)
    if w_x.dtype != x.dtype or (b_ih is not None and b_ih.dtype != x.dtype):
        raise ValueError("attention_decoder: w_ih and b_ih must have the dtype of x")
    with keep_dtypes(x.device):
        return F.linear(x.to(acc), w_x.to(acc), None if b_ih is None else b_ih.to(acc))


def _call(args: tuple) -> tuple[Tensor, ...]:
    """s, contexts, weights and c_n, recorded where a derivative may be asked for."""
    if only_plain_operations():
        check_decoder("attention_decoder", *args)
        return in_plain_operations(_training_op, reference.attention_decoder, *args)[:GRADS]
    # An exported graph may be trained whatever the grad mode is now, and only the training op has
    # an Autograd kernel.
    if not (exporting() or recorded(args[i] for i in DERIVED)):
        return _inference_op(*args)
    return (_training_op if takes_graph() else Decoder.apply)(*args)[:GRADS]


def choose(args: tuple) -> Choice:
    """The kernel that computes a decoder on the arguments of the op."""
    device = args[0].device.type
    if has_native_kernel("attention_decoder", device):
        return Choice("native", "seqkern's own kernel runs all steps in one call")
    return Choice("reference", f"no decoder kernel of seqkern is loaded for {device}")
