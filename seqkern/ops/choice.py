"""Which kernel computes a recurrent layer: one pure function, used to dispatch and to explain; and
what every such function asks.
"""

from dataclasses import dataclass
from importlib.util import find_spec

import torch

from seqkern._extension import cpu_capability

HAS_TRITON = find_spec("triton") is not None


@dataclass(frozen=True)
class Choice:
    """A kernel and why it was taken.

    kernel: "native" (C++ or CUDA), "triton", "onednn" (PyTorch's own LSTM), "torch" (PyTorch's own
    attention) or "reference" (PyTorch operations, one after another).
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


@dataclass(frozen=True)
class HandOver:
    """Dense LSTM shapes on the CPU for which oneDNN was measured faster, and the measurement."""

    dtype: torch.dtype
    grad: bool
    batch: tuple[int, int]
    hidden: tuple[int, int]
    reason: str

    def covers(self, dtype: torch.dtype, sizes: Sizes, grad: bool) -> bool:
        return (
            dtype == self.dtype
            and grad == self.grad
            and self.batch[0] <= sizes.B <= self.batch[1]
            and self.hidden[0] <= sizes.H <= self.hidden[1]
        )


_ANY = (1, 2**31)
# Measured with T 16 and 128, H 64 and 256, on one thread: oneDNN over ours.
_ON_AMX = (
    HandOver(
        torch.bfloat16,
        True,
        (16, 2**31),
        _ANY,
        "oneDNN's backward multiplies bf16 tiles (AMX), ours fp32: 1.0 to 2.1x faster in training",
    ),
)
ONEDNN: tuple[HandOver, ...] = _ON_AMX if cpu_capability() == "amx" else ()


def choose(
    mode: str,
    dtype: torch.dtype,
    sizes: Sizes,
    *,
    ragged: bool,
    proj: bool,
    grad: bool,
    deterministic: bool,
    native: bool,
    device: str = "cpu",
    refusal: str | None = None,
) -> Choice:
    """The kernel for one layer.

    Args:
        mode: "LSTM", "GRU", "RNN_TANH" or "RNN_RELU".
        dtype: of the tensors.
        sizes: of the layer's call; T is 0 where it is ragged.
        ragged: whether the input is packed with batch_sizes.
        proj: whether the layer projects its output.
        grad: whether a gradient will be taken.
        deterministic: whether torch.use_deterministic_algorithms is on; keeps our own kernel,
            whose bits depend neither on the batch nor on the number of threads.
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
    if mode == "LSTM" and not (ragged or proj or deterministic):
        for row in ONEDNN:
            if row.covers(dtype, sizes, grad):
                return Choice("onednn", row.reason)
    return Choice("native", "seqkern's own kernel is the fastest known for this shape")


def has_native_kernel(op: str, device: str) -> bool:
    """Whether a kernel other than the reference serves seqkern::`op` on this type of device."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"seqkern::{op}", device.upper())


def instructions(choice: Choice, device: str) -> str | None:
    """The instruction set that a native kernel runs on the CPU; None for every other one."""
    return cpu_capability() if choice.kernel == "native" and device == "cpu" else None
