"""Which kernel computes a recurrent layer, for those who ask; and what every such function asks."""

from dataclasses import dataclass
from importlib.util import find_spec

import torch

from seqkern._extension import cpu_capability

HAS_TRITON = find_spec("triton") is not None


@dataclass(frozen=True)
class Choice:
    """A kernel and why it was taken.

    kernel: "native" (C++ or CUDA), "triton", "torch" (PyTorch's own attention) or "reference"
    (PyTorch operations, one after another).
    """

    kernel: str
    reason: str


@dataclass(frozen=True)
class Sizes:
    """T steps, B rows, I inputs, H hidden units, D directions."""

    T: int
    B: int
    I: int
    H: int
    D: int


def choose(*, native: bool, device: str = "cpu", refusal: str | None = None) -> Choice:
    """The kernel for one recurrent layer.

    Args:
        native: whether a kernel of seqkern's own is registered for the device.
        device: the type of the device.
        refusal: why that kernel does not take this layer; None where it does.
    """
    if not native:
        return Choice("reference", "no kernel of seqkern is loaded for this device")
    if refusal is not None:
        return Choice("reference", refusal)
    if device != "cpu":
        return Choice("native", "all steps run in one launch, W_hh stays in the thread blocks")
    return Choice("native", "seqkern's own kernel serves every shape")


def has_native_kernel(op: str, device: str) -> bool:
    """Whether a kernel other than the reference serves seqkern::`op` on this type of device."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"seqkern::{op}", device.upper())


def instructions(choice: Choice, device: str) -> str | None:
    """The instruction set that a native kernel runs on the CPU; None for every other one."""
    return cpu_capability() if choice.kernel == "native" and device == "cpu" else None
