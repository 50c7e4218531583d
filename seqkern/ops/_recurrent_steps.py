"""The recurrent ops on CUDA where W_hh does not fit the thread blocks: for every step one product
in PyTorch and one launch for all the rest of it.

`forward` and `backward` stand where the launches of all steps do, in _recurrent_block.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from seqkern.ops._recurrent_block import product
from seqkern.reference.cells import GATES

Step = Callable[..., None]


def _sizes(batch_sizes: Tensor | None, rows: int, batch: int) -> list[int]:
    if batch_sizes is None:
        return [batch] * (rows // batch) if batch else []
    return batch_sizes.tolist()


def _of_steps(t: Tensor | None, sizes: list[int]) -> Sequence[Tensor | None]:
    """The rows of each step."""
    return [None] * len(sizes) if t is None else t.split(sizes)


def forward(
    step: Step,
    gx: Tensor,
    batch_sizes: Tensor | None,
    h0: Tensor,
    c0: Tensor | None,
    w_hh: list[Tensor],
    b_ih: list[Tensor],
    b_hh: list[Tensor],
    mode: str,
    save: bool,
    tf32: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """seqkern::recurrent_block by `step`, seqkern::recurrent_step. The products follow
    PyTorch's switch for products, so `tf32` says nothing here."""
    (directions, batch, hidden), n = h0.shape, gx.size(0)
    y, h = h0.new_empty(n, directions * hidden), h0.clone()
    c = None if c0 is None else c0.to(torch.float32, copy=True)
    gates = h0.new_empty(directions, n, 4 * hidden) if save and mode in ("LSTM", "GRU") else None
    cells = h0.new_empty(directions, n, hidden) if save and c is not None else None
    width, sizes = GATES[mode] * hidden, _sizes(batch_sizes, n, batch)
    for d in range(directions):
        bias, w = (b_ih[d], b_hh[d]) if b_ih else (None, None), w_hh[d].t()
        state, cell = h[d], None if c is None else c[d]
        # Cut up before the loop, whose steps are short.
        x_of = _of_steps(gx[:, d * width : (d + 1) * width], sizes)
        y_of = _of_steps(y[:, d * hidden : (d + 1) * hidden], sizes)
        gates_of, cells_of = (_of_steps(None if k is None else k[d], sizes) for k in (gates, cells))
        for t in reversed(range(len(sizes))) if d == 1 else range(len(sizes)):
            h_t = state[: sizes[t]]
            c_t = None if cell is None else cell[: sizes[t]]
            products = product(h_t, w)
            step(x_of[t], products, *bias, h_t, c_t, y_of[t], gates_of[t], cells_of[t], mode)
    c_n, gates, cells = (h0.new_empty(0) if t is None else t for t in (c, gates, cells))
    return y, h, c_n.to(h0.dtype), gates, cells


def backward(
    step: Step,
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    batch_sizes: Tensor | None,
    h0: Tensor,
    c0: Tensor | None,
    w_hh: list[Tensor],
    y: Tensor,
    gates: Tensor,
    cells: Tensor,
    mode: str,
    tf32: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """seqkern::recurrent_block_backward by `step`, seqkern::recurrent_step_backward."""
    directions, batch, hidden = h0.shape
    gru, rnn = mode == "GRU", mode.startswith("RNN")
    dg = h0.new_empty(directions, y.size(0), hidden * (1 if rnn else 4))
    dh = _state(dh_n, h0)
    dc = None if c0 is None else _state(dc_n, h0)
    # The GRU's product with W_hh has the columns r, z and nh of r z nx nh, side by side.
    dah = h0.new_empty(batch, 3 * hidden) if gru else None
    sizes = _sizes(batch_sizes, y.size(0), batch)
    for d in range(directions):
        w, own = w_hh[d], y[:, d * hidden : (d + 1) * hidden]
        states, initial = (own, h0[d]) if c0 is None else (cells[d], c0[d])
        dstate, dcell = dh[d], None if dc is None else dc[d]
        # What the cell of each step reads.
        dy_of = _of_steps(None if dy is None else dy[:, d * hidden : (d + 1) * hidden], sizes)
        gates_of = _of_steps(None if rnn else gates[d], sizes)
        cells_of = _of_steps(None if c0 is None else cells[d], sizes)
        states_of = _of_steps(None if rnn else states, sizes)
        y_of, dg_of = _of_steps(own if rnn else None, sizes), dg[d].split(sizes)
        order = list(range(len(sizes)))[:: 1 if d == 1 else -1]
        sums, none = dh.new_empty(0, hidden), states[:0]
        for t, before in zip(order, [*order, None][1:], strict=True):
            b = sizes[t]
            if sums.size(0) > b:  # rows of the reverse direction that began there
                dstate[b : sums.size(0)] += sums[b:]
            carried = none if before is None or rnn else states_of[before][:b]
            dah_t = None if dah is None else dah[:b]
            step(
                dy_of[t],
                sums[:b],
                dstate[:b],
                None if dcell is None else dcell[:b],
                gates_of[t],
                cells_of[t],
                None if rnn else carried,
                None if rnn else initial[:b],
                y_of[t],
                dg_of[t],
                dah_t,
                mode,
            )
            sums = product(dg_of[t] if dah_t is None else dah_t, w)
        dstate[: sums.size(0)] += sums
    dc0 = h0.new_empty(0) if dc is None else dc.to(h0.dtype)
    return dg, dh.to(h0.dtype), dc0


def _state(gradient: Tensor | None, like: Tensor) -> Tensor:
    """A float32 copy of the gradient of a last state, zeros where there is none."""
    if gradient is None:
        return torch.zeros_like(like, dtype=torch.float32)
    return gradient.to(torch.float32, copy=True)
