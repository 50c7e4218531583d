"""A recurrent decoder that attends at every step, over whole sequences, in plain PyTorch.

The definition of the ops seqkern::attention_decoder and seqkern::attention_decoder_backward, their
kernel where no faster one exists, and the oracle of their tests. With the additive attention of
Bahdanau, Cho and Bengio (2015, appendix A.1.2) before any of the cells in `cells.py`:

    forward       q_i  = W_q s_{i-1} + b_q                                       i = 1 .. T
                  e_ij = v . tanh(q_i + key_j)
                  a_ij = exp(e_ij) / sum_l exp(e_il)        over j, l < k_lens
                  c_i  = sum_j a_ij value_j
                  s_i, cell_i = cell(ax_i + W_c c_i, W_hh s_{i-1} + b_hh, s_{i-1}, cell_{i-1})
    backward      (dax_i, dah_i, direct) = the cell's, of ds_i
                  dc_i += W_c^T dax_i
                  dp_ij = dc_i . value_j + da_ij            de_ij = a_ij (dp_ij - sum_l a_il dp_il)
                  dq_i = sum_j de_ij v (1 - t_ij^2)         t_ij = tanh(q_i + key_j)
                  dkey_j += de_ij v (1 - t_ij^2)            dvalue_j += a_ij dc_i
                  dv += de_ij t_ij
                  ds_{i-1} += direct + W_hh^T dah_i + W_q^T dq_i

ax_i = W_x x_i + b_ih, the part of the gates that no state enters, is an argument: one product for
all steps. The gradients of the weights are products over all steps too, and made of what the
backward returns: see `weight_gradients`.

Sizes: B sources of Tk positions, N = B*K rows of which row n reads source n // K, T steps, H hidden
units, G gates, A units of the attention, C features of a value. A row without any position to
attend to has a = 0 and c = 0. Keys and values beyond k_lens are not read.

Rounding: float64 stays float64. For float16 and bfloat16 all sums are float32 and so are ax and
the cell states inside the sequence; s and c are rounded to the storage dtype at every step, before
the next product reads them; the attention's weights are rounded as they are returned, the saved
gates and cell states as they are stored.

All functions use only differentiable operations and no in-place ones, so that autograd, and
torch.func, can derive them again: this is how second derivatives are defined.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from seqkern.reference.cells import BACKWARD, FORWARD
from seqkern.reference.recurrent import accumulation_dtype, keep_dtypes, linear


class Arguments(NamedTuple):
    """The arguments of both ops, in their order.

    gates_x: ax (N, T, G*H) in the accumulation dtype; the rest in the storage dtype.
    h0: (N, H); c0: (N, H) for LSTM, else None.
    key: (B, Tk, A); value: (B, Tk, C); k_lens: (B,) int32, or None where all positions are read.
    w_q: (A, H); b_q: (A,) or None; v: (A,).
    w_c: (G*H, C); w_hh: (G*H, H); b_hh: (G*H,) or None.
    mode: "LSTM", "GRU", "RNN_TANH" or "RNN_RELU".
    """

    gates_x: Tensor
    h0: Tensor
    c0: Tensor | None
    key: Tensor
    value: Tensor
    k_lens: Tensor | None
    w_q: Tensor
    b_q: Tensor | None
    v: Tensor
    w_c: Tensor
    w_hh: Tensor
    b_hh: Tensor | None
    mode: str


class Saved(NamedTuple):
    """What the backward reads of the forward's results.

    s (N, T, H); contexts (N, T, C); weights (N, T, Tk); queries (N, T, A) in the accumulation
    dtype; gates (N, T, 4H) and cells (N, T, H) as `recurrent` saves them, (0,) where the mode has
    none.
    """

    s: Tensor
    contexts: Tensor
    weights: Tensor
    queries: Tensor
    gates: Tensor
    cells: Tensor


class _Source(NamedTuple):
    """What is read of the sources: key (B, Tk, A), value (B, Tk, C), both with zeros where a
    position is not read, and live (B, Tk), False there; None where all positions are read."""

    key: Tensor
    value: Tensor
    live: Tensor | None


def _source(a: Arguments, acc: torch.dtype) -> _Source:
    key, value = a.key.to(acc), a.value.to(acc)
    if a.k_lens is None:
        return _Source(key, value, None)
    live = torch.arange(key.size(1), device=key.device) < a.k_lens[:, None]
    key, value = (torch.where(live[..., None], t, 0.0) for t in (key, value))
    return _Source(key, value, live)


def _by_source(rows: Tensor, sources: int) -> Tensor:
    """(N, ...) as (B, K, ...)."""
    return rows.reshape(sources, rows.size(0) // max(sources, 1), *rows.shape[1:])


def _tanh(q: Tensor, source: _Source) -> Tensor:
    """t (B, K, Tk, A) of queries (N, A)."""
    return torch.tanh(_by_source(q, source.key.size(0))[:, :, None] + source.key[:, None])


def _attend(q: Tensor, source: _Source, v: Tensor) -> Tensor:
    """a (B, K, Tk) of queries (N, A)."""
    e = _tanh(q, source) @ v
    if source.live is None:
        return e.softmax(-1)
    # A row without any position keeps finite scores for a softmax whose result is not used.
    live = source.live[:, None]
    e = torch.where(live | ~live.any(-1, keepdim=True), e, -torch.inf)
    return torch.where(live, e.softmax(-1), 0.0)


class _Weights(NamedTuple):
    """The weights in the accumulation dtype."""

    w_q: Tensor
    b_q: Tensor | None
    v: Tensor
    w_c: Tensor
    w_hh: Tensor
    b_hh: Tensor | None


def _weights(a: Arguments, acc: torch.dtype) -> _Weights:
    b_q, b_hh = (None if b is None else b.to(acc) for b in (a.b_q, a.b_hh))
    return _Weights(a.w_q.to(acc), b_q, a.v.to(acc), a.w_c.to(acc), a.w_hh.to(acc), b_hh)


def attention_decoder(*arguments: Any) -> tuple[Tensor, ...]:
    """All steps.

    Args:
        arguments: those of `Arguments`, in order.

    Returns:
        s, contexts, weights; c_n (N, H), the last cell state, or (0,) but for LSTM; then queries,
        gates and cells. See `Saved`.
    """
    a = Arguments(*arguments)
    dtype, acc = a.key.dtype, accumulation_dtype(a.key.dtype)
    pieces: list[tuple[Tensor, ...]] = []
    with keep_dtypes(a.key.device):
        source, w = _source(a, acc), _weights(a, acc)
        h = a.h0.to(acc)
        c = h[:, :0] if a.c0 is None else a.c0.to(acc)
        for ax in a.gates_x.unbind(1):
            q = linear(h, w.w_q, w.b_q)
            weights = _attend(q, source, w.v)
            context = (weights @ source.value).flatten(0, 1).to(dtype)
            ax = ax + linear(context.to(acc), w.w_c, None)
            s, c, gates = FORWARD[a.mode](ax, linear(h, w.w_hh, w.b_hh), h, c)
            s = s.to(dtype)
            h = s.to(acc)
            weights = weights.flatten(0, 1).to(dtype)
            pieces.append((s, context, weights, q, gates.to(dtype), c.to(dtype)))
    s, contexts, weights, queries, gates, cells = (
        torch.stack(piece, 1) for piece in zip(*pieces, strict=True)
    )
    lstm = a.mode == "LSTM"
    return (
        s,
        contexts,
        weights,
        c.to(dtype) if lstm else s.new_empty(0),
        queries,
        gates if a.mode in ("LSTM", "GRU") else s.new_empty(0),
        cells if lstm else s.new_empty(0),
    )


def attention_decoder_backward(
    ds: Tensor | None,
    dcontexts: Tensor | None,
    dweights: Tensor | None,
    dc_n: Tensor | None,
    saved: Saved,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    """The gradients of all that is not a product with one row for every step.

    Args:
        ds, dcontexts, dweights, dc_n: the gradients of s, contexts, weights and c_n; None stands
            for zeros.
        saved: what `attention_decoder` returned.
        arguments: as given to it.

    Returns:
        dgates_x (N, T, G*H) and dproducts (N, T, A + G*H), the gradients of ax_i and of
        [q_i, W_hh s_{i-1} + b_hh], in the accumulation dtype; dh0; dc0, (0,) but for LSTM; dkey;
        dvalue; dv.
    """
    a = Arguments(*arguments)
    dtype, acc = a.key.dtype, accumulation_dtype(a.key.dtype)
    steps = a.gates_x.size(1)
    with keep_dtypes(a.key.device):
        source, w = _source(a, acc), _weights(a, acc)
        states = _states(a, saved, acc)
        dh = torch.zeros_like(states[0][1])
        dc = states[0][3][:, :0] if a.c0 is None else torch.zeros_like(states[0][3])
        dc = dc if dc_n is None or a.c0 is None else dc_n.to(acc)
        dkey, dvalue = torch.zeros_like(source.key), torch.zeros_like(source.value)
        dv = torch.zeros_like(w.v)
        pieces = []
        for i in reversed(range(steps)):
            gates, h_prev, c, c_prev = states[i]
            dh = dh if ds is None else dh + ds[:, i].to(acc)
            s = saved.s[:, i].to(acc)
            dax, dah, dc, direct = BACKWARD[a.mode](dh, dc, gates, s, c, h_prev, c_prev)
            dcontext = dax @ w.w_c
            dcontext = dcontext if dcontexts is None else dcontext + dcontexts[:, i].to(acc)
            given = None if dweights is None else dweights[:, i].to(acc)
            weights = saved.weights[:, i].to(acc)
            dq, *added = _attend_backward(
                dcontext, given, weights, saved.queries[:, i], source, w.v
            )
            dkey, dvalue, dv = (x + y for x, y in zip((dkey, dvalue, dv), added, strict=True))
            dh = direct + dq @ w.w_q + dah @ w.w_hh
            pieces.append((dax, torch.cat([dq, dah], -1)))
    dgates_x, dproducts = (torch.stack(p[::-1], 1) for p in zip(*pieces, strict=True))
    dc0 = a.h0.new_empty(0) if a.c0 is None else dc.to(dtype)
    results = (dh.to(dtype), dc0, dkey.to(dtype), dvalue.to(dtype), dv.to(dtype))
    return dgates_x, dproducts, *results


def _states(a: Arguments, saved: Saved, acc: torch.dtype) -> list[tuple[Tensor, ...]]:
    """For every step the saved gates, and s_{i-1}, cell_i, cell_{i-1}; without columns where the
    mode has none."""
    none = a.h0.new_empty(a.h0.size(0), a.gates_x.size(1), 0, dtype=acc)
    gates = saved.gates.to(acc) if a.mode in ("LSTM", "GRU") else none
    cells = none if a.c0 is None else saved.cells.to(acc)
    c0 = none[:, 0] if a.c0 is None else a.c0.to(acc)
    hs = torch.cat([a.h0[:, None], saved.s[:, :-1]], 1).to(acc)
    cs = torch.cat([c0[:, None], cells[:, :-1]], 1)
    steps = (t.unbind(1) for t in (gates, hs, cells, cs))
    return list(zip(*steps, strict=True))


def _attend_backward(
    dcontext: Tensor,
    dweights: Tensor | None,
    weights: Tensor,
    q: Tensor,
    source: _Source,
    v: Tensor,
) -> tuple[Tensor, ...]:
    """dq, and what one step adds to dkey, dvalue and dv, of rows (N, ...)."""
    B = source.key.size(0)
    a, dc = _by_source(weights, B), _by_source(dcontext, B)
    dp = dc @ source.value.mT
    dp = dp if dweights is None else dp + _by_source(dweights, B)
    de = a * (dp - (a * dp).sum(-1, keepdim=True))
    t = _tanh(q, source)
    through = de[..., None] * (1 - t * t) * v
    dq = through.sum(2).flatten(0, 1)
    return dq, through.sum(1), a.mT @ dc, (de[..., None] * t).sum((0, 1, 2))


def weight_gradients(
    dgates_x: Tensor, dproducts: Tensor, h0: Tensor, s: Tensor, contexts: Tensor
) -> tuple[Tensor, ...]:
    """The gradients of [W_q; W_hh] (A + G*H, H), of [b_q; b_hh] and of W_c (G*H, C).

    Args:
        dgates_x, dproducts: of the backward.
        h0: as given to the forward; s and contexts: its results.
    """
    dtype = s.dtype
    with keep_dtypes(s.device):
        before = torch.cat([h0[:, None], s[:, :-1]], 1).flatten(0, 1).to(dproducts.dtype)
        products, gates = (t.reshape(-1, t.size(2)) for t in (dproducts, dgates_x))
        results = (
            products.t() @ before,
            products.sum(0),
            gates.t() @ contexts.flatten(0, 1).to(gates.dtype),
        )
    return tuple(r.to(dtype) for r in results)
