"""Launch choices of the attention kernels: data, found by compiling ahead of time.

Each row is the largest of the tried tiles that ptxas (12.8, Triton 3.6; 12.9 for sm_100) compiles
without a spill, within the shared memory, and for sm_90 without waiting for every single product
(its C7515), for a causal call with key lengths and grouped heads. How fast the rows are has not
been measured. On sm_90 a row has as many stages as fit: with two, a tile is asked for only when the
last product of the one before is under way. A comment gives the registers of a thread where they
are at the limit of 255, or what was wrong with the next larger tile.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton


@dataclass(frozen=True)
class Config:
    """How to launch one kernel.

    Attributes:
        block_m, block_n: queries and keys of a tile, powers of two of at least 16.
        num_warps, num_stages: of the program, and of its pipeline of loads.
        descriptors: load by the tensor memory accelerator where the strides allow it.
        split: dK and dV by a launch each.
    """

    block_m: int
    block_n: int
    num_warps: int = 4
    num_stages: int = 2
    descriptors: bool = False
    split: bool = False


Rows = dict[int, Config]


def tma(*sizes: int) -> Config:
    return Config(*sizes, descriptors=True)


# By kernel, then by the largest head dimension that the row serves.
HOPPER: dict[str, Rows] = {
    "forward": {
        32: tma(128, 128, 8, 4),  # 183; 4 warps spill 32 bytes
        64: tma(128, 128, 8, 4),  # 201
        128: tma(128, 128, 8, 3),  # 225
        256: tma(128, 64, 8, 2),  # 245
        512: tma(32, 32, 8, 1),  # 170; 64 x 32 spills 20 bytes
    },
    "dkdv": {
        32: tma(64, 128, 8, 3),  # 220
        64: tma(64, 128, 8, 3),  # 242
        128: tma(32, 128, 8, 3),  # 252; 64 x 128 spills 52 bytes with two stages
        # Two sums are too many registers for one launch in tiles large enough to keep the tensor
        # cores busy; of 512 columns, by descriptors with one stage, ptxas spills kilobytes.
        256: replace(tma(32, 128, 8, 2), split=True),  # 255; 32 x 64 in one spills 8 bytes
        512: Config(32, 32, 8, 1, split=True),  # 254
    },
    "dq": {
        32: tma(128, 128, 8, 3),  # 243
        64: tma(128, 128, 8, 3),  # 246
        128: tma(128, 64, 8, 3),  # 177
        256: tma(128, 32, 8, 2),  # 255
        512: tma(32, 32, 8, 1),  # 244; 64 x 32 spills 2496 bytes
    },
    "dbias": {
        32: Config(128, 64, 8, 2),  # 250
        64: Config(128, 64, 8, 2),  # 250
        128: Config(64, 64, 8, 2),  # 215; 4 warps spill 124 bytes
        256: Config(64, 64, 8, 1),  # 233
        512: Config(16, 32, 4, 1),  # 252; 32 x 32 spills 2 KB
    },
}
AMPERE: dict[str, Rows] = {
    "forward": {
        32: Config(128, 128, 8, 3),  # 217
        64: Config(128, 64, 8, 3),  # 194; 128 x 128 spills 8 bytes
        128: Config(128, 64, 8, 2),  # 221; a third stage spills 40 bytes
        256: Config(64, 64, 8, 2),  # 255
        512: Config(32, 32, 8, 1),  # 251; 64 x 32 spills 84 bytes
    },
    "dkdv": {
        32: Config(64, 128, 8, 2),  # 255
        64: Config(32, 64, 8, 2),  # 255 and 4 bytes; 64 x 64 spills 16
        128: Config(64, 64, 8, 2),  # 185; 32 x 128 spills 32 bytes
        256: Config(32, 64, 8, 1),  # 255
        512: Config(32, 32, 8, 1, split=True),  # 252
    },
    "dq": {
        32: Config(128, 64, 8, 2),  # 181; 128 x 128 spills 44 bytes
        64: Config(128, 64, 8, 2),  # 184; 128 x 128 spills 100 bytes
        128: Config(128, 32, 8, 2),  # 204; 128 x 64 spills 84 bytes
        256: Config(64, 64, 8, 1),  # 231
        512: Config(32, 32, 8, 1),  # 248
    },
    "dbias": {
        32: Config(64, 64, 8, 2),  # 254
        64: Config(64, 64, 8, 2),  # 254; 128 x 64 spills 12 bytes
        128: Config(64, 32, 4, 2),  # 203; 64 x 64 spills 76 bytes
        256: Config(32, 16, 4, 1),  # 255; 32 x 32 spills 468 bytes
        512: Config(16, 32, 4, 1),  # 254; 32 x 32 spills 2 KB
    },
}
# As sm_80 but for what needs more than 99 KB of shared memory.
ADA: dict[str, Rows] = {
    "forward": AMPERE["forward"] | {256: Config(64, 32, 8, 2)},  # 187
    "dkdv": AMPERE["dkdv"]
    | {
        256: Config(32, 32, 8, 1),  # 158
        512: Config(16, 16, 4, 1, split=True),  # 166; 16 x 32 spills 12 bytes
    },
    "dq": AMPERE["dq"]
    | {
        256: Config(64, 32, 8, 1),  # 182
        512: Config(16, 32, 8, 1),  # 179
    },
    "dbias": AMPERE["dbias"],
}
# As sm_90 but where the tensor memory takes sums out of the registers: 512 columns at most.
BLACKWELL: dict[str, Rows] = {
    "forward": HOPPER["forward"] | {512: tma(64, 32, 8, 2)},  # 205; 64 x 64 spills 12 bytes
    "dkdv": HOPPER["dkdv"]
    | {
        128: tma(64, 128, 8, 2),  # 210
        256: tma(32, 64, 8, 1),  # 178; a second stage spills 8 bytes
    },
    "dq": HOPPER["dq"],
    "dbias": HOPPER["dbias"],
}
# A product of fp32 in full precision is made of fused multiply-adds on operands in shared memory:
# what counts is how many of them a thread unrolls. The figures are those of sm_80; on sm_90 and
# sm_100 dbias keeps up to 48 bytes in memory more.
FP32: dict[str, Rows] = {
    "forward": {
        32: Config(64, 64, 8, 1),  # 118
        64: Config(64, 32, 8, 1),  # 110; 64 x 64 spills 328 bytes on sm_90
        128: Config(16, 32, 8, 1),  # 75; 32 x 32 spills 16 bytes
        256: Config(16, 32, 8, 1),  # 105
    },
    "dkdv": {
        32: Config(32, 32, 4, 1),  # 153
        64: Config(32, 32, 8, 1),  # 90
        128: Config(16, 32, 8, 1),  # 79; 32 x 32 spills 16 bytes
        256: Config(16, 32, 8, 1),  # 136
    },
    "dq": {
        32: Config(32, 32, 4, 1),  # 106
        64: Config(32, 32, 4, 1),  # 113
        128: Config(32, 16, 8, 1),  # 74
        256: Config(32, 16, 8, 1),  # 116
    },
    "dbias": {
        32: Config(32, 32, 4, 1),  # 128 and 24 bytes, as in the smaller tiles
        64: Config(32, 32, 4, 1),  # 128
        128: Config(32, 32, 8, 1),  # 80
        256: Config(16, 32, 8, 1),  # 124
    },
}
# Registers here are vector registers, of which a thread may have 512.
CDNA: dict[str, Rows] = {
    "forward": {
        64: Config(64, 64, 4, 1),  # 228
        128: Config(64, 32, 4, 1),  # 224
        256: Config(32, 32, 4, 1),  # 260
        512: Config(16, 16, 4, 1),  # 260
    },
    "dkdv": {
        64: Config(32, 64, 4, 1),  # 220
        128: Config(32, 32, 4, 1),  # 280
        256: Config(16, 32, 8, 1),  # 204
        512: Config(16, 16, 4, 1, split=True),  # 336
    },
    "dq": {
        64: Config(64, 64, 4, 1),  # 240
        128: Config(64, 32, 4, 1),  # 236
        256: Config(32, 16, 4, 1),  # 192
        512: Config(16, 16, 4, 1),  # 325
    },
    "dbias": {
        64: Config(64, 64, 4, 1),  # 180
        128: Config(32, 32, 4, 1),  # 236
        256: Config(16, 16, 4, 1),  # 176; 32 x 32 spills 62 registers
        512: Config(16, 16, 4, 1),  # 300
    },
}
CDNA_FP32: dict[str, Rows] = {
    "forward": {
        128: Config(32, 32, 4, 1),  # 220
        256: Config(32, 16, 4, 1),  # 256
    },
    "dkdv": {
        64: Config(32, 32, 4, 1),  # 303
        128: Config(16, 32, 4, 1),  # 244
        256: Config(16, 16, 4, 1),  # 357
    },
    "dq": {
        128: Config(32, 16, 4, 1),  # 216
        256: Config(16, 16, 4, 1),  # 334
    },
    "dbias": {
        128: Config(32, 32, 4, 1),  # 366
        256: Config(16, 16, 4, 1),  # 337
    },
}


def rows_of(backend: str, arch: int | str, dtype: torch.dtype) -> dict[str, Rows]:
    """The rows for a target as Triton names it, ("cuda", 90) or ("hip", "gfx942").

    Raises:
        ValueError: a GPU before compute capability 8.0.
    """
    full = dtype == torch.float32
    if backend != "cuda" or isinstance(arch, str):
        return CDNA_FP32 if full else CDNA
    if arch < 80:
        raise ValueError(
            f"attention: the device must be of compute capability 8.0 or later, got {arch / 10}"
        )
    if full:
        return FP32
    # Consumer parts (8.6, 8.9, 12.0) have 99 KB of shared memory, however new they are; of a part
    # that is not known no more is expected.
    known = {80: AMPERE, 87: AMPERE, 90: HOPPER, 100: BLACKWELL, 103: BLACKWELL}
    return known.get(arch, ADA)


def choose(
    kernel: str,
    width: int,
    dtype: torch.dtype,
    *,
    costly: bool = False,
    target: tuple[str, int | str] | None = None,
) -> Config:
    """The launch choice for a kernel.

    Args:
        kernel: "forward", "dkdv", "dq" or "dbias".
        width: the larger of the head dimensions, at most 512, and 256 in float32.
        dtype: of q, k and v.
        costly: whether scores take more than their place to tell (a mask, a bias, ALiBi, a
            softcap, dropout). Then the tile is half as wide along the loop.
        target: backend and architecture; None asks the active Triton driver.

    Raises:
        ValueError: the target is too old, or the width has no row.
    """
    if target is None:
        driver: Any = triton.runtime.driver
        active = driver.active.get_current_target()
        target = active.backend, active.arch
    rows = rows_of(*target, dtype)[kernel]
    if width > max(rows):
        raise ValueError(
            f"attention: the {kernel} kernel takes head dimensions up to {max(rows)} in {dtype} "
            f"on {target}, got {width}"
        )
    config = rows[min(limit for limit in rows if limit >= width)]
    if not costly or kernel == "dbias":
        return config
    # The loop of dK and dV runs over queries, the others' over keys.
    step = "block_m" if kernel == "dkdv" else "block_n"
    return replace(config, **{step: max(16, getattr(config, step) // 2)})
