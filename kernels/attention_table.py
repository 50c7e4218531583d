"""Launch choices of the attention kernels."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    block_m: int
    block_n: int
    num_warps: int = 4
    num_stages: int = 2
    descriptors: bool = False
    split: bool = False


def choose(kernel, D, DV, dtype, arch=None):
    return Config(64, 64)
