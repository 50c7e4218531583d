"""Says which kernels the attentions of a function or a module take."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from seqkern.ops import _additive_ops, _attention_ops, decode, decoder
from seqkern.ops._derivatives import in_plain_operations
from seqkern.ops.attention_weights import attention_with_weights
from seqkern.ops.choice import Choice, instructions

_FIRST = (0, 1, 2)
# Of each op: what chooses its kernel, and which of its arguments are shown as q, k and v. Those of
# a decoder are its state, the keys and the values.
_CHOICES = {
    torch.ops.seqkern.attention.default: (_attention_ops.choose, _FIRST),
    torch.ops.seqkern.attention_decode.default: (decode.choose, _FIRST),
    torch.ops.seqkern.additive_attention.default: (_additive_ops.choose, _FIRST),
    torch.ops.seqkern.attention_decoder.default: (decoder.choose, (1, 3, 4)),
    torch.ops.seqkern.attention_decoder_inference.default: (decoder.choose, (1, 3, 4)),
}
# Attention has no kernels for matrix tiles or 16-bit products on the CPU.
_SETS = {"amx": "avx512", "avx512_bf16": "avx512"}
_BY_PYTORCH = Choice("torch", "PyTorch's own function means the same and serves without a seed")
_FORWARD_MODE = Choice("reference", "only PyTorch's own operations carry tangents")
_WITH_WEIGHTS = Choice("reference", "weights are asked for, which no fused kernel holds")


@dataclass(frozen=True)
class AttentionExplanation:
    """What one attention runs; str() gives it in one line.

    op: the operator that is called, or stood for by PyTorch operations; or
        "attention_with_weights", which is made of them.
    q, k, v: the shapes, in the order of the op.
    kernel, reason: see `seqkern.ops.choice.Choice`.
    instructions: the instruction set of a native CPU kernel, else None.
    """

    op: str
    dtype: torch.dtype
    device: str
    q: tuple[int, ...]
    k: tuple[int, ...]
    v: tuple[int, ...]
    kernel: str
    reason: str
    instructions: str | None

    def __str__(self) -> str:
        shapes = " ".join(f"{n} {getattr(self, n)}" for n in "qkv")
        dtype = str(self.dtype).removeprefix("torch.")
        kernel = f"{self.kernel} ({self.instructions})" if self.instructions else self.kernel
        return (
            f"attention: {dtype} {shapes} on {self.device}: {kernel} through {self.op}; "
            f"{self.reason}"
        )


class _Ops(TorchDispatchMode):
    """Sees seqkern's ops, which autograd and functions of PyTorch have come down to."""

    def __init__(self, calls: list[AttentionExplanation]) -> None:
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in _CHOICES:
            choose, places = _CHOICES[func]
            shown = [args[i] for i in places]
            self.calls.append(_explanation(func._schema.name, shown, choose(args)))
        return func(*args, **(kwargs or {}))


class _Functions(TorchFunctionMode):
    """Sees functions of PyTorch operations, its own and seqkern's, before they are taken apart."""

    def __init__(self, calls: list[AttentionExplanation]) -> None:
        super().__init__()
        self.calls = calls

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            op = "aten::scaled_dot_product_attention"
            given = dict(zip(("query", "key", "value"), args)) | (kwargs or {})
            shown = [given[name] for name in ("query", "key", "value")]
            self.calls.append(_explanation(op, shown, _BY_PYTORCH))
        elif func is attention_with_weights:
            self.calls.append(_explanation(func.__name__, args[:3], _WITH_WEIGHTS))
        elif func is in_plain_operations:
            op, _, *tensors = args
            shown = [tensors[i] for i in _CHOICES[op][1]]
            self.calls.append(_explanation(op._schema.name, shown, _FORWARD_MODE))
        return func(*args, **(kwargs or {}))


def _explanation(op: str, tensors, choice: Choice) -> AttentionExplanation:
    q, k, v = (tuple(t.shape) for t in tensors)
    dtype, device = tensors[0].dtype, tensors[0].device.type
    name = instructions(choice, device)
    chosen = choice.kernel, choice.reason, _SETS.get(name, name) if name else None
    return AttentionExplanation(op, dtype, device, q, k, v, *chosen)


def explain_attention(
    function: Callable[..., Any], args: tuple, kwargs: dict
) -> list[AttentionExplanation]:
    """The attentions of function(*args, **kwargs), in order; shapes are followed, nothing is
    computed and nothing is changed.

    Raises:
        ValueError: a nested tensor is not of the jagged layout, the only one whose shapes can be
            followed.
    """
    # Slow to import, and needed here alone.
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    for t in tree_leaves((args, kwargs)):
        if isinstance(t, Tensor) and t.is_nested and t.layout != torch.jagged:
            raise ValueError(
                f"explain: nested tensors must be of the jagged layout, got {t.layout}"
            )
    calls: list[AttentionExplanation] = []
    # The lengths of nested tensors are symbols.
    fake = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    with fake, _Ops(calls), _Functions(calls):
        function(*args, **kwargs)
    return calls
