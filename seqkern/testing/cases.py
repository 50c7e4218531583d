"""What a generic test needs to know of an op, and the list of all cases."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class OpCase:
    """One op on inputs of one shape.

    name: unique, fit for a test id.
    small: whether numerical differentiation of this case is quick.
    tensors: dtype -> the inputs that can take a gradient, the same numbers for every dtype up
        to rounding.
    op: the public function of those inputs; returns its results as a tuple.
    forward: the same in plain PyTorch operations, which autograd can derive.
    reference: (inputs, gradients of the results) -> (results, gradients of the inputs), in plain
        PyTorch, in the inputs' dtype.
    raw: inputs -> the torch.library ops behind the public function, each with its arguments.
    autocast: how many of the inputs, from the first on, autocast casts; None for all.
    """

    name: str
    small: bool
    tensors: Callable[[torch.dtype], Tensors]
    op: Callable[..., Tensors]
    forward: Callable[..., Tensors]
    reference: Callable[[Tensors, Tensors], tuple[Tensors, Tensors]]
    raw: Callable[[Tensors], list[tuple[Any, tuple]]]
    autocast: int | None = None


def all_cases() -> list[OpCase]:
    """Every case of every op."""
    from seqkern.testing.additive import additive_cases
    from seqkern.testing.attention import attention_cases
    from seqkern.testing.decoder import decoder_cases
    from seqkern.testing.recurrent import recurrent_cases

    return recurrent_cases() + attention_cases() + additive_cases() + decoder_cases()
