"""Launch choices of the additive attention kernels: data, found by compiling ahead of time (ptxas
12.8, Triton 3.6; 12.9 for sm_100). How fast the rows are has not been measured.

How tanh is taken was chosen by the instructions of one element in the forward's loop on sm_90. A
multiprocessor issues 128 of them a clock and starts 16 special functions (MUFU):

    tanh        instructions  MUFU  clocks  error of tanh at most
    shared               5.3   0.5   0.041  6e-7
    single               5.2   1.0   0.063  4e-7
    hardware             4.6   1.0   0.063  2^-11, relative: too coarse for fp32

The errors of the first two, found in numpy, allow every exponential 1.1 * 2^-23 of itself (see
additive_tile.exponential) and every reciprocal a unit in its last place; where both are rounded
they are 3.5e-7 and 1.8e-7. So "shared" serves every dtype. The kernel for few queries, of which
exponentials err by 2^-22, is within 4e-7. benchmarks/bench_additive.py times all three
on a GPU, where it has not run yet.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton

# The widest key and value: offsets within a row of exponentials have 32 bits.
MAX_WIDTH = 2**16


@dataclass(frozen=True)
class Config:
    """How to launch one kernel.

    Attributes:
        block_m: rows of a tile; it has 32 num_warps columns, see additive_tile.
        num_warps: of the program.
        block_c: elements of a value that a product takes at a time.
        ptx: whether reciprocals are the one instruction that NVIDIA's GPUs have for them.
        tanh: "shared" takes one reciprocal for two elements, "single" one for each, and
            "hardware" the instruction tanh.approx of NVIDIA's GPUs, in the forward alone.
    """

    block_m: int = 16
    num_warps: int = 4
    block_c: int = 64
    ptx: bool = True
    tanh: str = "shared"

    @property
    def block_n(self) -> int:
        return 32 * self.num_warps


# Of every target: the tiles are what gives the layout that additive_tile describes, and what is
# left to choose is how much of the products with values a thread unrolls.
HALF = {
    "forward": Config(block_c=32),  # 236 registers on sm_89, 241 on sm_90
    "queries": Config(block_c=32),  # 228 on sm_90, 255 on sm_80
    "keys": Config(block_c=16),  # 255 on sm_80; parts of 32 spill 136 bytes there
}
# A product of fp32 is made of fused multiply-adds, of which a thread unrolls the more.
FULL = {
    "forward": Config(block_c=16),  # 128 registers and 52 bytes on sm_90; parts of 32 spill 844
    "queries": Config(block_c=16),  # 238; parts of 32 spill 136 bytes
    "keys": Config(block_c=16),  # 255 and 24 bytes, the least; parts of 32 spill 1316
}


def choose(kernel: str, dtype: torch.dtype, target: tuple[str, int | str] | None = None) -> Config:
    """The launch choice for a kernel.

    Args:
        kernel: "forward", "queries" (gradients of queries and v, of the bias, and row sums) or
            "keys" (gradients of keys and values).
        dtype: of the tensors.
        target: as Triton names it, ("cuda", 90) or ("hip", "gfx942"); None asks the active driver.

    Raises:
        ValueError: a GPU before compute capability 8.0.
    """
    if target is None:
        driver: Any = triton.runtime.driver
        active = driver.active.get_current_target()
        target = active.backend, active.arch
    backend, arch = target
    rows = FULL if dtype == torch.float32 else HALF
    if backend != "cuda" or isinstance(arch, str):
        return replace(rows[kernel], ptx=False)
    if arch < 80:
        raise ValueError(
            "additive_attention: the device must be of compute capability 8.0 or later, "
            f"got {arch / 10}"
        )
    return rows[kernel]
