"""cuDNN in the place of the recurrent kernels on CUDA, for layers where it was measured faster.

Which layers those are is the table of recurrent_cudnn.json. Results of the GPU benchmark become its
rows by `python -m benchmarks.recurrent_gpu_choice`, and nothing else is ever written there.

cuDNN is asked for the gradient's reserve space wherever a gradient is needed, whatever the mode of
the module, and is given a copy of the weights in its own layout, so that parameters stay where
they are. Graphs and torch.func's transforms hold seqkern::recurrent, whose results have known
shapes, where the reserve space is as large as cuDNN likes; see `refusal`.
"""

import functools
import json
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active, _len_torch_dispatch_stack

from seqkern.ops import _recurrent_block as block
from seqkern.ops._checks import check_batch_sizes
from seqkern.ops.choice import Sizes
from seqkern.reference.recurrent import keep_dtypes

# The numbers of cudnnRNNMode_t.
MODES = {"RNN_RELU": 0, "RNN_TANH": 1, "LSTM": 2, "GRU": 3}


class Row(NamedTuple):
    """Layers for which cuDNN was measured faster.

    device: the name of the card.
    dtype: "bfloat16", "float16", "float32", or "tf32" where float32 may multiply in that.
    training: a forward and a backward, else a forward without gradients.
    H: the hidden units, and the inputs: no other number of inputs is measured.
    B: the smallest and the largest batch.
    T: the shortest sequence, in a ragged batch the longest row's.
    ratio: how many times as fast, the least of the row.
    result: the files of the measurement.
    """

    device: str
    mode: str
    dtype: str
    directions: int
    ragged: bool
    training: bool
    H: int
    B: tuple[int, int]
    T: int
    ratio: float
    result: str

    def holds(self, sizes: Sizes) -> bool:
        """Whether sizes lie between those measured; in steps of 8 rows, as cuDNN has kernels for
        multiples of 8 alone."""
        low, high = self.B
        in_batch = low <= sizes.B <= high and (sizes.B - low) % 8 == 0
        return in_batch and sizes.I == self.H and sizes.T >= self.T

    @property
    def reason(self) -> str:
        """For `explain`."""
        graphs = "; a graph of torch.compile holds seqkern's own" if self.training else ""
        return (
            f"measured {self.ratio}x as fast as seqkern's on {self.device}, {self.result}{graphs}"
        )


@functools.cache
def table() -> tuple[Row, ...]:
    """All rows."""
    text = Path(__file__).with_name("recurrent_cudnn.json").read_text()
    return tuple(Row(**row) for row in json.loads(text))


def card(device: int) -> str:
    """Its name; "" of what is no GPU of this machine."""
    return torch.cuda.get_device_name(device) if 0 <= device < torch.cuda.device_count() else ""


@functools.cache
def _rows(device: int, *layer: str | int) -> tuple[Row, ...]:
    """Those of a layer: mode, dtype, directions, ragged, training, H."""
    return tuple(row for row in table() if row[:7] == (card(device), *layer))


def row(
    mode: str, dtype: torch.dtype, device: int, sizes: Sizes, ragged: bool, training: bool
) -> Row | None:
    """The row of a call, if there is one; `explain` and the ops ask here."""
    if not table():
        return None
    tf32 = dtype == torch.float32 and block.products(dtype) == "tf32"
    name = "tf32" if tf32 else str(dtype).removeprefix("torch.")
    rows = _rows(device, mode, name, sizes.D, ragged, training, sizes.H)
    return next((each for each in rows if each.holds(sizes)), None)


def refusal(training: bool) -> str | None:
    """Why cuDNN is not asked in this context; None where it may be."""
    if not (torch.backends.cudnn.enabled and torch.backends.cudnn.is_available()):
        return "torch.backends.cudnn is switched off or missing"
    if torch.backends.cudnn.deterministic or torch.are_deterministic_algorithms_enabled():
        return "deterministic algorithms are asked for, which its recurrent layers do not promise"
    if training and (_are_functorch_transforms_active() or _len_torch_dispatch_stack()):
        return "a transform or a mode of PyTorch takes seqkern::recurrent"
    return None


def chosen(mode: str, x: Tensor, batch_sizes: Tensor | None, h0: Tensor, training: bool) -> bool:
    """Whether cuDNN computes a call that seqkern's kernels do not refuse."""
    if not table():
        return False
    # Also of arguments that are not checked yet: what does not unpack is a ValueError.
    (D, B, H), (T, *_, I) = h0.shape, x.shape
    sizes = Sizes(T if batch_sizes is None else len(batch_sizes), B, I, H, D)
    found = row(mode, x.dtype, x.get_device(), sizes, batch_sizes is not None, training)
    return found is not None and refusal(training) is None


def weight_buffer(weights: list[Tensor], directions: int) -> Tensor:
    """The weights in cuDNN's layout: all matrices, then all biases, zeros where there are none."""
    flat = [w.reshape(-1) for dim in (2, 1) for w in weights if w.dim() == dim]
    if len(weights) == 2 * directions:
        flat.append(weights[0].new_zeros(2 * directions * weights[0].size(0)))
    return torch.cat(flat)


def _arguments(x, batch_sizes, h0, c0, weights, mode, train):
    """What both of cuDNN's ops take first, tensors, and what they take later, sizes."""
    directions, batch, hidden = h0.shape
    sizes = []
    if batch_sizes is not None:
        check_batch_sizes("recurrent", batch_sizes, x.size(0), batch)
        sizes = batch_sizes.tolist()
    layout = len(weights) // directions, weight_buffer(weights, directions)
    states = h0.contiguous(), None if c0 is None else c0.contiguous()
    # No projection, one layer, not batch_first, no dropout.
    layer = MODES[mode], hidden, 0, 1, False, 0.0, train, directions == 2, sizes, None
    return (x, weights, *layout, *states), layer


def forward(
    x: Tensor,
    batch_sizes: Tensor | None,
    h0: Tensor,
    c0: Tensor | None,
    weights: list[Tensor],
    mode: str,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """seqkern::recurrent of checked arguments, with cuDNN's reserve space, which is of uint8, in
    the place of the gates, and no cells."""
    with keep_dtypes(x.device):  # under autocast cuDNN would make float16 of everything
        tensors, layer = _arguments(x, batch_sizes, h0, c0, weights, mode, save)
        y, h_n, c_n, reserve, _ = torch.ops.aten._cudnn_rnn.default(*tensors, *layer)
    return y, h_n, c_n, reserve, x.new_empty(0)


def backward(
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
    x: Tensor,
    batch_sizes: Tensor | None,
    h0: Tensor,
    c0: Tensor | None,
    weights: list[Tensor],
    saved: tuple[Tensor, Tensor],
    mode: str,
    need_dx: bool,
    need_dw: bool,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """seqkern::recurrent_backward from the y and the reserve space of `forward`."""
    y, reserve = saved
    if reserve.device != x.device:
        raise ValueError(
            f"recurrent_backward: gates must be on the device of x, {x.device}, "
            f"got {reserve.device}"
        )
    dstates = grads[1], None if c0 is None else grads[2]
    needed = [need_dx, True, c0 is not None, need_dw]
    with keep_dtypes(x.device):
        tensors, layer = _arguments(x, batch_sizes, h0, c0, weights, mode, True)
        # cuDNN writes to the reserve space, and a graph may be walked again.
        kept = reserve.clone(), needed
        dx, dh0, dc0, dweights = torch.ops.aten._cudnn_rnn_backward.default(
            *tensors, y.contiguous(), grads[0], *dstates, *layer, *kept
        )
    empty = x.new_empty(0)
    return dx if need_dx else empty, dh0, empty if c0 is None else dc0, dweights
