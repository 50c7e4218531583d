"""The recurrent ops on CUDA where W_hh does not fit the thread blocks: for every step one product
in PyTorch and one launch for all the rest of it.

`forward` and `backward` stand where the launches of all steps do, in _recurrent_block.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from seqkern.ops._recurrent_block import product
from seqkern.reference.cells import GATES
from seqkern.reference.recurrent import steps

Step = Callable[..., None]


def _sizes(batch_sizes: Tensor | None, rows: int, batch: int) -> list[int]:
    if batch_sizes is None:
        return [batch] * (rows // batch) if batch else []
    return batch_sizes.tolist()


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
    width = GATES[mode] * hidden
    for d in range(directions):
        bias = (b_ih[d], b_hh[d]) if b_ih else (None, None)
        for b, at in steps(_sizes(batch_sizes, n, batch), backwards=d == 1):
            step(
                gx[at, d * width : (d + 1) * width],
                product(h[d, :b], w_hh[d].t()),
                *bias,
                h[d, :b],
                None if c is None else c[d, :b],
                y[at, d * hidden : (d + 1) * hidden],
                None if gates is None else gates[d, at],
                None if cells is None else cells[d, at],
                mode,
            )
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
    for d in range(directions):
        own = slice(d * hidden, (d + 1) * hidden)
        states, initial = (y[:, own], h0[d]) if c0 is None else (cells[d], c0[d])
        walk = steps(_sizes(batch_sizes, y.size(0), batch), backwards=d == 0)
        sums = dh.new_empty(0, hidden)
        for (b, at), (b_before, before) in pairwise([*walk, (0, slice(0, 0))]):
            if sums.size(0) > b:  # rows of the reverse direction that began there
                dh[d, b : sums.size(0)] += sums[b:]
            carried = slice(before.start, before.start + min(b, b_before))
            step(
                None if dy is None else dy[at, own],
                sums[:b],
                dh[d, :b],
                None if dc is None else dc[d, :b],
                None if rnn else gates[d, at],
                None if c0 is None else cells[d, at],
                None if rnn else states[carried],
                None if rnn else initial[:b],
                y[at, own] if rnn else None,
                dg[d, at],
                None if dah is None else dah[:b],
                mode,
            )
            sums = product(dg[d, at] if dah is None else dah[:b], w_hh[d])
        dh[d, : sums.size(0)] += sums
    dc0 = h0.new_empty(0) if dc is None else dc.to(h0.dtype)
    return dg, dh.to(h0.dtype), dc0


def _state(gradient: Tensor | None, like: Tensor) -> Tensor:
    """A float32 copy of the gradient of a last state, zeros where there is none."""
    if gradient is None:
        return torch.zeros_like(like, dtype=torch.float32)
    return gradient.to(torch.float32, copy=True)
