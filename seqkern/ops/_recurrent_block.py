"""The recurrent ops on CUDA: the large products in PyTorch, all time steps in one launch where
thread blocks hold W_hh for the whole sequence, else step by step (_recurrent_steps).

The launches are arguments, so that the same code runs around the kernels on a GPU and around the
emulated ones in the tests.
"""

import functools
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from seqkern.reference.cells import GATES
from seqkern.reference.recurrent import keep_dtypes

Forward = Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]
Backward = Callable[..., tuple[Tensor, Tensor, Tensor]]


class BlockWeights(NamedTuple):
    """The weights of every direction by kind; the biases are empty lists where there are none."""

    w_ih: list[Tensor]
    w_hh: list[Tensor]
    b_ih: list[Tensor]
    b_hh: list[Tensor]


def by_kind(weights: list[Tensor], directions: int) -> BlockWeights:
    each = len(weights) // directions
    kinds = [[w.contiguous() for w in weights[k::each]] for k in range(each)]
    return BlockWeights(*kinds, *([] for _ in range(4 - each)))


@functools.cache
def built(device: int) -> bool:
    """Whether the kernels were compiled for a device and its driver runs them."""
    ops = torch.ops.seqkern
    return hasattr(ops, "recurrent_step_built") and ops.recurrent_step_built(device)


def refusal(dtype: torch.dtype, proj: bool, device: int) -> str | None:
    """Why CUDA has no kernel for a layer on a device; None where it has one."""
    if proj:
        return "the CUDA kernels have no projection"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the CUDA kernels take float32, bfloat16 and float16, not {dtype}"
    if not built(device):
        return (
            "no CUDA kernel was compiled for this GPU (they need compute capability 8.0), or its "
            "driver is older than the CUDA they were compiled with"
        )
    return None


def products(dtype: torch.dtype) -> str:
    """How the steps multiply: "16 bit", "tf32" where cuDNN's recurrent layers may (PyTorch's
    default: torch.backends.cudnn.rnn.fp32_precision), else "float32"."""
    if dtype != torch.float32:
        return "16 bit"
    allowed = torch.backends.cudnn.rnn.fp32_precision  # pyright: ignore[reportAttributeAccessIssue]
    return "tf32" if allowed == "tf32" else "float32"


@functools.cache
def room(mode: str, products: str, hidden: int, backward: bool, device: int) -> str:
    """How a pass is spread over a device that holds all of W_hh, in words such as "cluster of 12";
    "" where it does not hold it. The answer does not change, and asking for it takes
    microseconds; an error, as of full memory, is none, and not kept."""
    return torch.ops.seqkern.recurrent_block_room(mode, products, hidden, backward, device)


def fits(mode: str, dtype: torch.dtype, hidden: int, backward: bool, device: int) -> bool:
    """Whether all steps of a pass run in one launch; else each takes one, by _recurrent_steps."""
    return bool(room(mode, products(dtype), hidden, backward, device))


def reason(mode: str, dtype: torch.dtype, hidden: int, training: bool, device: int) -> str:
    """How a layer that is not refused runs on a device, for `explain`."""
    how = products(dtype)
    passes = {"forward": False} | ({"backward": True} if training else {})
    rooms = {name: room(mode, how, hidden, which, device) for name, which in passes.items()}

    def told(words: str) -> str:
        if words:
            words = f"{words}, in TF32" if how == "tf32" else words
            return f"all steps run in one launch, W_hh stays in the thread blocks: {words}"
        return (
            f"a product and a launch for each step: W_hh of {hidden} units does not fit the thread "
            "blocks that this GPU runs together"
        )

    if all(rooms.values()) or not any(rooms.values()):
        return told(", ".join(filter(None, rooms.values())))
    return "; ".join(f"{name}: {told(words)}" for name, words in rooms.items())


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b in float32, also of 16-bit matrices: rounding it before more is added would cost bits.
    Autocast has to be off."""
    if a.dtype == torch.float32:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def forward(
    launch: Forward,
    x: Tensor,
    batch_sizes: Tensor | None,
    h0: Tensor,
    c0: Tensor | None,
    weights: list[Tensor],
    mode: str,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """seqkern::recurrent: y, h_n, c_n, gates and cells; the last two empty without `save`."""
    directions = h0.size(0)
    w = by_kind(weights, directions)
    w_ih = w.w_ih[0] if directions == 1 else torch.cat(w.w_ih)
    states = h0.contiguous(), None if c0 is None else c0.contiguous()
    tf32 = products(x.dtype) == "tf32"
    with keep_dtypes(x.device):
        gx = product(x.flatten(0, -2), w_ih.t())
        y, h_n, c_n, gates, cells = launch(
            gx, batch_sizes, *states, w.w_hh, w.b_ih, w.b_hh, mode, save, tf32
        )
    return y.view(*x.shape[:-1], y.size(-1)), h_n, c_n, gates, cells


def backward(
    launch: Backward,
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
    x: Tensor,
    batch_sizes: Tensor | None,
    h0: Tensor,
    c0: Tensor | None,
    weights: list[Tensor],
    saved: tuple[Tensor, Tensor, Tensor],
    mode: str,
    need_dx: bool,
    need_dw: bool,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """seqkern::recurrent_backward: dx, dh0, dc0 and the gradients of the weights."""
    directions, _, hidden = h0.shape
    w = by_kind(weights, directions)
    inputs = x.flatten(0, -2)
    y = saved[0].reshape(-1, directions * hidden).contiguous()
    dy = None if grads[0] is None else grads[0].contiguous().view_as(y)
    dstates = [None if g is None else g.contiguous() for g in grads[1:]]
    states = h0.contiguous(), None if c0 is None else c0.contiguous()
    kept = (y, saved[1].contiguous(), saved[2].contiguous())
    tf32 = products(x.dtype) == "tf32"
    with keep_dtypes(x.device):
        dg, dh0, dc0 = launch(dy, *dstates, batch_sizes, *states, w.w_hh, *kept, mode, tf32)
        n = GATES[mode] * hidden
        dax = dg[..., :n]
        # Of the GRU's four columns r z nx nh the recurrent product has r z nh.
        dah = torch.cat([dg[..., : n - hidden], dg[..., n:]], -1) if mode == "GRU" else dg
        dx = x.new_empty(0)
        if need_dx:
            total = product(dax[0], w.w_ih[0])
            if directions == 2:
                total = total + product(dax[1], w.w_ih[1])
            dx = total.to(x.dtype).view(x.shape)
        dweights: list[Tensor] = []
        for d in range(directions) if need_dw else ():
            h_prev = previous(y[:, d * hidden : (d + 1) * hidden], h0[d], batch_sizes, d == 1)
            dweights += [product(dax[d].t(), inputs), product(dah[d].t(), h_prev)]
            if w.b_ih:
                db = dg[d].sum(0, dtype=torch.float32)
                of_h = torch.cat([db[: n - hidden], db[n:]]) if mode == "GRU" else db.clone()
                dweights += [db[:n], of_h]
    return dx, dh0, dc0, [g.to(x.dtype) for g in dweights]


def previous(y: Tensor, h0: Tensor, batch_sizes: Tensor | None, backwards: bool) -> Tensor:
    """(N, H): the state that each step of one direction started from."""
    batch = h0.size(0)
    if batch_sizes is None:
        pieces = [y[batch:], h0] if backwards else [h0, y[: y.size(0) - batch]]
        return torch.cat(pieces)
    rows, sizes = torch.arange(y.size(0)), batch_sizes
    of_row = partial(torch.repeat_interleave, repeats=sizes)
    # Places in [y; h0]: of the step before in the walk, or of the initial state.
    b = rows - of_row(sizes.cumsum(0) - sizes)
    if backwards:
        carried, before = b < of_row(F.pad(sizes[1:], (0, 1))), rows + of_row(sizes)
    else:
        carried, before = rows >= batch, rows - of_row(F.pad(sizes[:-1], (1, 0)))
    places = torch.where(carried, before, b + y.size(0))
    return torch.cat([y, h0])[places.to(y.device)]
