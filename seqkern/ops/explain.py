"""Says which kernel a layer or a function takes for an input, and why."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from seqkern.ops import _recurrent_block as block
from seqkern.ops import _recurrent_cudnn as cudnn
from seqkern.ops._attention_explain import AttentionExplanation, explain_attention
from seqkern.ops._checks import compute_dtype
from seqkern.ops._derivatives import only_plain_operations
from seqkern.ops.choice import Choice, Sizes, has_native_kernel, instructions
from seqkern.ops.recurrent import needs_grad


@dataclass(frozen=True)
class Explanation:
    """What one layer of a stack runs; str() gives it in one line.

    op: the torch.library op, or cuDNN's of PyTorch, that is called.
    kernel, reason: see `seqkern.ops.choice.Choice`.
    instructions: the instruction set of a native CPU kernel, else None.
    """

    layer: int
    op: str
    mode: str
    dtype: torch.dtype
    device: str
    sizes: Sizes
    kernel: str
    reason: str
    instructions: str | None

    def __str__(self) -> str:
        s = self.sizes
        shape = f"T={s.T or 'ragged'} B={s.B} I={s.I} H={s.H} D={s.D}"
        dtype = str(self.dtype).removeprefix("torch.")
        kernel = f"{self.kernel} ({self.instructions})" if self.instructions else self.kernel
        return (
            f"layer {self.layer}: {self.mode} {dtype} {shape} on {self.device}: "
            f"{kernel} through {self.op}; {self.reason}"
        )


class Explanations(tuple[Explanation | AttentionExplanation, ...]):
    """One for each layer of a stack, or for each attention; str() gives one line for each."""

    def __str__(self) -> str:
        return "\n".join(map(str, self))


def explain(layer: Any, *inputs: Any, **options: Any) -> Explanations:
    """Which kernel computes `layer(*inputs, **options)` as things stand now, and why.

    The answer holds for the present grad mode and autocast settings; nothing is run.

    Args:
        layer: a recurrent layer or cell of seqkern.nn, or of torch.nn, for which the answer is
            what seqkern.nn's of its sizes would run; or a module or a function that attends, such
            as seqkern.attention, seqkern.additive_attention or seqkern.nn.MultiheadAttention.
        inputs: what it would be called with. A recurrent layer needs no states: (T, B, I),
            (B, T, I) if batch_first, (T, I) or a PackedSequence; a cell (B, I) or (I,).
        options: keywords of the call.

    Returns:
        One Explanation for each layer of the stack, or one AttentionExplanation for each attention
        in the order of the calls: a tuple whose str() is readable.

    Raises:
        TypeError: `layer` is not recurrent and does not attend, or the input of a recurrent one
            is neither a Tensor nor a PackedSequence.
        ValueError: `input` has the wrong number of dimensions.
    """
    if isinstance(layer, torch.nn.RNNCellBase | torch.nn.RNNBase):
        if not inputs:
            raise TypeError("explain: input must be given after the layer")
        return _explain_recurrent(layer, inputs[0])
    if not callable(layer):
        raise TypeError(f"explain: layer must be a module or function, got {type(layer).__name__}")
    if not (calls := explain_attention(layer, inputs, options)):
        name = getattr(layer, "__name__", type(layer).__name__)
        raise TypeError(f"explain: layer must be recurrent or attend, and {name} does neither")
    return Explanations(calls)


def _explain_recurrent(layer: Any, input: Tensor | PackedSequence) -> Explanations:
    cell = isinstance(layer, torch.nn.RNNCellBase)
    x = input.data if isinstance(input, PackedSequence) else input
    if not isinstance(x, Tensor):
        raise TypeError(f"explain: input must be a Tensor, got {type(input).__name__}")
    ragged = isinstance(input, PackedSequence)
    if ragged:
        T, B = len(input.batch_sizes), int(input.batch_sizes[0])
    else:
        T, B = _steps_and_rows(layer, x, cell)
    mode, weights = _mode_of(layer, cell), list(layer.parameters())
    directions = 1 + bool(getattr(layer, "bidirectional", False))
    proj = getattr(layer, "proj_size", 0)
    dtype, device = compute_dtype(x), x.device.type
    grad = needs_grad(x, x, None, weights)
    op = "recurrent" if grad else "recurrent_inference"
    snapshot = not grad and getattr(layer, "_packed", None) is not None
    if not cell and snapshot and layer._is_direct(input):
        op = "recurrent_prepacked"
    notes = "; in the place of torch.nn's own" * type(layer).__module__.startswith("torch.nn")
    notes += "; on the weights of prepack()" * snapshot
    lines = []
    for i in range(getattr(layer, "num_layers", 1)):
        inputs = x.size(-1) if i == 0 else directions * (proj or layer.hidden_size)
        sizes = Sizes(T, B, inputs, layer.hidden_size, directions)
        choice = _recurrent_choice(op, mode, x, dtype, sizes, ragged, bool(proj))
        reason, cpu = choice.reason + notes, instructions(choice, device)
        sizes = replace(sizes, T=0) if ragged else sizes
        direct = choice.kernel == "cudnn" and op == "recurrent"
        called = "aten::_cudnn_rnn" if direct else f"seqkern::{op}"
        lines.append(Explanation(i, called, mode, dtype, device, sizes, choice.kernel, reason, cpu))
    return Explanations(lines)


def _recurrent_choice(
    op: str, mode: str, x: Tensor, dtype: torch.dtype, sizes: Sizes, ragged: bool, proj: bool
) -> Choice:
    device = x.device.type
    if op == "recurrent" and only_plain_operations():
        return Choice("reference", "only PyTorch's own operations are derived in this context")
    if not has_native_kernel(op, device):
        return Choice("reference", "no kernel of seqkern is loaded for this device")
    if device != "cuda":
        return Choice("native", "seqkern's own kernel serves every shape")
    if refusal := block.refusal(dtype, proj, x.get_device()):
        return Choice("reference", refusal)
    training = op == "recurrent"
    reason = block.reason(mode, dtype, sizes.H, training, x.get_device())
    if row := cudnn.row(mode, dtype, x.get_device(), sizes, ragged, training):
        if (why_not := cudnn.refusal(training)) is None:
            return Choice("cudnn", row.reason)
        reason = f"{reason}; not cuDNN, {row.reason}: {why_not}"
    return Choice("native", reason)


def _steps_and_rows(layer: Any, x: Tensor, cell: bool) -> tuple[int, int]:
    dims = (1, 2) if cell else (2, 3)
    if x.dim() not in dims:
        raise ValueError(f"explain: input must be {dims[0]}D or {dims[1]}D, got {x.dim()}D")
    if cell:
        return 1, x.size(0) if x.dim() == 2 else 1
    if x.dim() == 2:
        return x.size(0), 1
    t, b = x.size(0), x.size(1)
    return (b, t) if getattr(layer, "batch_first", False) else (t, b)


def _mode_of(layer: Any, cell: bool) -> str:
    if not cell:
        return str(layer.mode)
    gates = {4: "LSTM", 3: "GRU", 1: "RNN_" + str(getattr(layer, "nonlinearity", "")).upper()}
    return gates[layer.weight_ih.size(0) // layer.hidden_size]
