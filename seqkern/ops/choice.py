"""What the functions that choose a kernel say and ask: a kernel and why, sizes, what is loaded."""

from dataclasses import dataclass
from importlib.util import find_spec

import torch

from seqkern._extension import cpu_capability

HAS_TRITON = find_spec("triton") is not None


@dataclass(frozen=True)
class Choice:
    """A kernel and why it was taken.

    kernel: "native" (C++ or CUDA), "triton", "cudnn" (a recurrent layer for which a benchmark found
    cuDNN faster), "torch" (PyTorch's own attention) or "reference" (PyTorch operations, one after
    another).
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


def has_native_kernel(op: str, device: str) -> bool:
    """Whether a kernel other than the reference serves seqkern::`op` on this type of device."""
    if device == "meta":  # the kernel there is a shape function
        return False
    key = torch._C._dispatch_key_for_device(device)
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"seqkern::{op}", key)


def instructions(choice: Choice, device: str) -> str | None:
    """The instruction set that a native kernel runs on the CPU; None for every other one."""
    return cpu_capability() if choice.kernel == "native" and device == "cpu" else None
