"""One recurrent layer over whole sequences, one or two directions, in plain PyTorch.

The definition of the ops seqkern::recurrent and seqkern::recurrent_backward, their kernel
where no faster one exists, and the oracle of their tests. The formulas of a single step are in
`cells.py`; this file is the loop over time around them:

    forward       a_t = W_ih x_t + b_ih          (for all t at once)
                  h_t, c_t = cell(a_t, W_hh h_{t-1} + b_hh, h_{t-1}, c_{t-1})
    backward      dh_{t-1} += W_hh^T da_t,       t downwards
                  dx_t = W_ih^T da_t,  dW_ih = sum_t da_t x_t^T,  dW_hh = sum_t da_t h_{t-1}^T

(back-propagation through time, Werbos 1990). Direction 1 swaps the direction of time (Schuster
& Paliwal 1997).

Sizes: T steps, B rows, I inputs, H hidden units, P = H or the size of the projection, D = 1 or
2 directions, G gates (LSTM 4, GRU 3, RNN 1), N = T*B rows in all. A ragged batch is packed as
by torch.nn.utils.rnn.pack_padded_sequence: rows sorted by length, x is (N, I) and
batch_sizes[t] rows are alive at step t. Walking forwards, rows leave at their end; walking
backwards, rows join, with their h0, at their last element. Every loop below treats a dense
batch as a ragged one with equal sizes.

Rounding: float64 stays float64. For float16 and bfloat16 all sums are float32, c stays float32
inside the sequence, and h is rounded to the storage dtype at every step, before the next
recurrent product reads it; the saved values are rounded as they are stored.

Both functions use only differentiable operations and no in-place ones, so that autograd, and
torch.func, can derive them again: this is how second derivatives are defined.
"""

from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from seqkern.reference.cells import BACKWARD, FORWARD

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


class DirectionWeights(NamedTuple):
    """The weights of one direction, in the accumulation dtype."""

    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None
    b_hh: Tensor | None
    w_hr: Tensor | None


def split_weights(weights: list[Tensor], directions: int, dtype: torch.dtype):
    """The flat list of torch.nn, one DirectionWeights for each direction, cast to `dtype`."""
    per_direction = len(weights) // directions
    bias, proj = per_direction >= 4, per_direction % 2 == 1
    split = []
    for d in range(directions):
        ws = [w.to(dtype) for w in weights[d * per_direction : (d + 1) * per_direction]]
        b_ih, b_hh = (ws[2], ws[3]) if bias else (None, None)
        split.append(DirectionWeights(ws[0], ws[1], b_ih, b_hh, ws[-1] if proj else None))
    return split


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


# Of the devices that tensors can be on. torch.amp.is_autocast_available would say it of any, but
# torch 2.11 does not compile code that asks it.
WITHOUT_AUTOCAST = frozenset({"meta", "lazy", "vulkan"})


def autocast_enabled(device: torch.device) -> bool:
    return device.type not in WITHOUT_AUTOCAST and torch.is_autocast_enabled(device.type)


def keep_dtypes(device: torch.device) -> AbstractContextManager:
    """Products in the accumulation dtype also where autocast, which reaches into ops, is on."""
    return torch.autocast(device.type, enabled=False) if autocast_enabled(device) else nullcontext()


class Rows:
    """A state of shape (rows, features) whose rows join and leave as the walk goes on.

    Rows are sorted by length, so those that are alive are always the first ones: a row that
    joins takes its value from `initial`, one that leaves is kept for `final()`.
    """

    def __init__(self, initial: Tensor):
        self.initial = initial
        self.alive = initial[:0]
        self.left: list[Tensor] = []

    def resize(self, rows: int) -> Tensor:
        now = self.alive.size(0)
        if rows > now:
            self.alive = torch.cat([self.alive, self.initial[now:rows]])
        elif rows < now:
            self.left.append(self.alive[rows:])
            self.alive = self.alive[:rows]
        return self.alive

    def final(self) -> Tensor:
        return torch.cat([self.alive, *reversed(self.left)])


def step_sizes(x: Tensor, batch_sizes: Tensor | None) -> list[int]:
    """The number of rows alive at each step."""
    return [x.size(1)] * x.size(0) if batch_sizes is None else batch_sizes.tolist()


def steps(sizes: list[int], backwards: bool):
    """(number of rows, their slice of the N packed rows) for each step of the walk."""
    walk = [(b, slice(end - b, end)) for b, end in zip(sizes, accumulate(sizes), strict=True)]
    return walk[::-1] if backwards else walk


def in_time_order(pieces: list[Tensor], backwards: bool) -> Tensor:
    return torch.cat(pieces[::-1] if backwards else pieces)


def linear(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    return x @ w.t() if b is None else x @ w.t() + b


def recurrent(
    x: Tensor,
    batch_sizes: Tensor | None,
    h0: Tensor,
    c0: Tensor | None,
    weights: list[Tensor],
    mode: str,
) -> Outputs:
    """All steps of one layer.

    Args:
        x: (T, B, I), or (N, I) with `batch_sizes`.
        batch_sizes: (T,) int64 on the CPU, non-increasing, of sum N; None for a dense batch.
        h0: (D, B, P).
        c0: (D, B, H) for LSTM, else None.
        weights: for each direction w_ih (G*H, I), w_hh (G*H, P), then b_ih and b_hh (G*H,) if
            the layer has biases, then w_hr (P, H) if it has a projection.
        mode: "LSTM", "GRU", "RNN_TANH" or "RNN_RELU".

    Returns:
        y (T, B, D*P) or (N, D*P); h_n (D, B, P); c_n (D, B, H), or (0,) but for LSTM;
        gates (D, N, 4H) and cells (D, N, H), the values the backward reads, in x's dtype: for
        LSTM i f g o and c_t, for GRU r z n W_hh h_{t-1} + b_hh (its last third) and (0,), for
        RNN (0,) and (0,).
    """
    directions, batch, _ = h0.shape
    dtype, acc = x.dtype, accumulation_dtype(x.dtype)
    sizes = step_sizes(x, batch_sizes)
    rows = x.reshape(sum(sizes), x.size(-1)).to(acc)
    ys, h_ns, c_ns, gates, cells = [], [], [], [], []
    with keep_dtypes(x.device):
        for d, w in enumerate(split_weights(weights, directions, acc)):
            ax = linear(rows, w.w_ih, w.b_ih)
            h = Rows(h0[d].to(acc))
            c = Rows(h0.new_empty(batch, 0, dtype=acc) if c0 is None else c0[d].to(acc))
            ms, cs, saved = [], [], []
            for b, at in steps(sizes, backwards=d == 1):
                ah = linear(h.resize(b), w.w_hh, w.b_hh)
                m, c.alive, s = FORWARD[mode](ax[at], ah, h.alive, c.resize(b))
                m = m.to(dtype)
                if w.w_hr is not None:
                    m = linear(m.to(acc), w.w_hr, None).to(dtype)
                h.alive = m.to(acc)
                ms.append(m)
                cs.append(c.alive)
                saved.append(s)
            ys.append(in_time_order(ms, d == 1))
            h_ns.append(h.final().to(dtype))
            c_ns.append(c.final().to(dtype))
            cells.append(in_time_order(cs, d == 1).to(dtype))
            gates.append(in_time_order(saved, d == 1).to(dtype))
    y = torch.cat(ys, -1).view(*x.shape[:-1], directions * h0.size(2))
    has_cells, has_gates = mode == "LSTM", mode in ("LSTM", "GRU")
    return (
        y,
        torch.stack(h_ns),
        torch.stack(c_ns) if has_cells else x.new_empty(0),
        torch.stack(gates) if has_gates else x.new_empty(0),
        torch.stack(cells) if has_cells else x.new_empty(0),
    )


def recurrent_backward(
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
    x: Tensor,
    batch_sizes: Tensor | None,
    h0: Tensor,
    c0: Tensor | None,
    weights: list[Tensor],
    saved: tuple[Tensor, Tensor, Tensor],
    mode: str,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """The gradients of `recurrent` with respect to its tensors.

    Args:
        grads: the gradients of y, h_n and c_n; None stands for zeros.
        x, batch_sizes, h0, c0, weights, mode: as given to `recurrent`.
        saved: y, gates and cells as `recurrent` returned them.

    Returns:
        dx, dh0, dc0 ((0,) without c0) and the list of the weights' gradients, in x's dtype.
    """
    directions, batch, _ = h0.shape
    dtype, acc = x.dtype, accumulation_dtype(x.dtype)
    sizes = step_sizes(x, batch_sizes)
    rows = x.reshape(sum(sizes), x.size(-1)).to(acc)
    n, p = rows.size(0), h0.size(2)
    y, gates, cells = saved
    dy, dh_n, dc_n = grads
    y = y.reshape(n, directions * p)
    dy = torch.zeros_like(y) if dy is None else dy.reshape(n, directions * p)

    def of(d: int, t: Tensor | None, otherwise: Tensor) -> Tensor:
        return otherwise if t is None else t[d].to(acc)

    dx, dh0, dc0, dweights = rows.new_zeros(()), [], [], []
    no_rows, no_batch = rows.new_empty(n, 0), rows.new_empty(batch, 0)
    with keep_dtypes(x.device):
        for d, w in enumerate(split_weights(weights, directions, acc)):
            c0_d = of(d, c0, no_batch)
            states = States(
                h0[d].to(acc),
                c0_d,
                y[:, d * p : (d + 1) * p].to(acc),
                of(d, gates if mode in ("LSTM", "GRU") else None, no_rows),
                of(d, cells if c0 is not None else None, no_rows),
            )
            grads_d = (
                dy[:, d * p : (d + 1) * p].to(acc),
                of(d, dh_n, rows.new_zeros(batch, p)),
                of(d, dc_n if c0 is not None else None, torch.zeros_like(c0_d)),
            )
            dax, dah, h, m, dh, dh0_d, dc0_d = through_time(mode, w, sizes, d == 1, states, grads_d)
            dx = dx + dax @ w.w_ih
            dh0.append(dh0_d)
            dc0.append(dc0_d)
            dweights += [dax.t() @ rows, dah.t() @ h]
            dweights += [] if w.b_ih is None else [dax.sum(0), dah.sum(0)]
            dweights += [] if w.w_hr is None else [dh.t() @ m.to(dtype).to(acc)]
    return (
        dx.to(dtype).view(x.shape),
        torch.stack(dh0).to(dtype),
        x.new_empty(0) if c0 is None else torch.stack(dc0).to(dtype),
        [dw.to(dtype) for dw in dweights],
    )


class States(NamedTuple):
    """What one direction saved, in the accumulation dtype, (N, ...) but for h0 and c0."""

    h0: Tensor
    c0: Tensor
    y: Tensor
    gates: Tensor
    cells: Tensor


def through_time(
    mode: str,
    w: DirectionWeights,
    sizes: list[int],
    backwards: bool,
    states: States,
    grads: tuple[Tensor, Tensor, Tensor],
) -> tuple[Tensor, ...]:
    """The walk of one direction's backward, against the order of its forward.

    Returns, for all N rows in the order of x: the gradients of W_ih x + b_ih and of
    W_hh h + b_hh, the h that each step started from, the output before projection m, the
    gradient of the output; and the gradients of h0 and c0.
    """
    walk = steps(sizes, backwards)
    h_starts = previous(states.y, states.h0, walk)
    c_starts = previous(states.cells, states.c0, walk)
    dy, dh_n, dc_n = grads
    dh, dc = Rows(dh_n), Rows(dc_n)
    pieces = []
    for (b, at), h, c_prev in zip(walk[::-1], h_starts[::-1], c_starts[::-1], strict=True):
        dh_t, saved, c, m = dh.resize(b) + dy[at], states.gates[at], states.cells[at], states.y[at]
        dm = dh_t
        if w.w_hr is not None:
            m = saved.chunk(4, -1)[3] * c.tanh()
            dm = dh_t @ w.w_hr
        dax, dah, dc.alive, direct = BACKWARD[mode](dm, dc.resize(b), saved, m, c, h, c_prev)
        dh.alive = direct + dah @ w.w_hh
        pieces.append((dax, dah, h, m, dh_t))
    by_row = (in_time_order(list(p), not backwards) for p in zip(*pieces, strict=True))
    return *by_row, dh.final(), dc.final()


def previous(values: Tensor, initial: Tensor, walk: list[tuple[int, slice]]) -> list[Tensor]:
    """The state that each step of the walk starts from, given the one that each ends with."""
    state, starts = Rows(initial), []
    for b, at in walk:
        starts.append(state.resize(b))
        state.alive = values[at]
    return starts
