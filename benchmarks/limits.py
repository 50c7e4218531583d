"""What this machine can do, measured in the run that uses it, and the least time of a cell.

The model, per time step on `threads` cores, with s bytes a weight and G gates:

    t_weights = the recurrent weights of one core, read once: the part that fits its L2 at the L2
                rate, the rest at the L3 rate
    t_product = 2 G H out B flops at the rate of torch.mm
    t_step    = max(t_weights, t_product) + t_pointwise

and the products outside the recurrence (input projection, weight gradients, dx) run at the rate
of torch.mm. Reaching 1.0 means that nothing is left but a product faster than torch.mm's.
"""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.cells import GATES, Cell

# About 60 clocks for the activations and the state of one vector of LSTM cells, in flops a cell:
# two FMA units make 4 flops a lane and clock, of which torch.mm reaches about three quarters.
LSTM_POINTWISE_FLOPS = 180
# exp evaluations of one cell over those of an LSTM cell (three sigmoids, two tanh).
POINTWISE_SHARE = {"LSTM": 1.0, "GRU": 0.6, "RNN_TANH": 0.2, "RNN_RELU": 0.0}
BYTES = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}
# Sizes that sit well inside an L2 of 1 MiB or more, and well outside any.
L2_BYTES_SMALL, L2_BYTES_LARGE, L3_BYTES = 256 << 10, 768 << 10, 24 << 20


@dataclass(frozen=True)
class Limits:
    """Rates of one core: products in GFLOP/s by dtype, reads in GB/s, and its L2 in bytes."""

    gemm: dict[str, float]
    l2: float
    l3: float
    l2_bytes: int

    def as_dict(self) -> dict[str, object]:
        """Rounded for the results file."""
        rounded = {name: round(rate, 1) for name, rate in self.gemm.items()}
        return asdict(self) | {"gemm": rounded, "l2": round(self.l2, 1), "l3": round(self.l3, 1)}


def best_seconds(
    run: Callable[[], object],
    seconds: float,
    clock: Callable[[], float] = time.process_time,
    calls: int = 1,
) -> float:
    """The fastest call within a time budget: the nearest to what the hardware allows.

    CPU time by default, which on one thread leaves out what other processes take. `calls` are
    timed together and averaged: some systems count CPU time in steps longer than one short call.
    """
    best, end = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < end or best == math.inf:
        start = clock()
        for _ in range(calls):
            run()
        best = min(best, (clock() - start) / calls) or best
    return best


def gemm_rate(dtype: torch.dtype, size: int = 1024, seconds: float = 0.3) -> float:
    """GFLOP/s of torch.mm on square matrices, one thread."""
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2e-9 * size**3 / best_seconds(lambda: torch.mm(a, b, out=out), seconds)


def read_seconds(size: int, seconds: float) -> float:
    """Seconds to read `size` bytes once, by a dot product of two halves."""
    half = size // 8
    data = torch.ones(2 * half)
    first, second = data[:half], data[half:]
    return best_seconds(lambda: torch.dot(first, second), seconds, calls=max(1, L3_BYTES // size))


def l2_size(default: int = 1 << 20) -> int:
    """Bytes of one core's L2, from the kernel's description of cpu0."""
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        level, size = index / "level", index / "size"
        # Some virtual machines list a cache and leave its size out.
        if size.exists() and level.exists() and level.read_text().strip() == "2":
            return int(size.read_text().strip().removesuffix("K")) << 10
    return default


def measure(budget: float = 0.3) -> Limits:
    """Measures the limits of one core; about six times `budget` seconds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        gemm = {name: gemm_rate(getattr(torch, name), seconds=budget) for name in BYTES}
        # The difference of two sizes leaves the cost of the call out. On a machine disturbed while
        # one of them was read it may come out at nothing or less, so it has a floor.
        large, small = (read_seconds(n, budget) for n in (L2_BYTES_LARGE, L2_BYTES_SMALL))
        l2 = 1e-9 * (L2_BYTES_LARGE - L2_BYTES_SMALL) / max(large - small, large / 3)
        l3 = 1e-9 * L3_BYTES / read_seconds(L3_BYTES, budget)
    finally:
        torch.set_num_threads(threads)
    return Limits(gemm, l2, l3, l2_size())


@dataclass(frozen=True)
class CellLimit:
    """The least seconds of one call of a cell, by part.

    `read` and `product` overlap, so the larger counts; bound says which one that is.
    """

    read: float
    product: float
    pointwise: float
    outside: float

    @property
    def total(self) -> float:
        return max(self.read, self.product) + self.pointwise + self.outside

    @property
    def bound(self) -> str:
        return "weight reads" if self.read > self.product else "products"


def cell_limit(cell: Cell, limits: Limits) -> CellLimit:
    """The least time of one call of a cell on this machine, by the model above."""
    G, out, calls = GATES[cell.mode], cell.P or cell.H, sum(cell.lengths) * cell.directions
    gemm = 1e9 * limits.gemm[cell.dtype] * cell.threads
    pointwise_rate = 1e9 * limits.gemm["float32"] * cell.threads
    weights = G * cell.H * out + cell.P * cell.H
    size = BYTES[cell.dtype] * weights / cell.threads
    resident = min(size, limits.l2_bytes)
    read_once = resident / (1e9 * limits.l2) + (size - resident) / (1e9 * limits.l3)
    read = cell.T * cell.directions * read_once
    product = 2 * weights * calls / gemm
    pointwise = LSTM_POINTWISE_FLOPS * POINTWISE_SHARE[cell.mode] * cell.H * calls / pointwise_rate
    outside = 2 * G * cell.H * cell.H * calls / gemm
    if cell.kind != "training":
        return CellLimit(read, product, pointwise, outside)
    # Backward: the transposed recurrence, one more tanh a cell, dx, and the weight gradients.
    return CellLimit(2 * read, 2 * product, 1.2 * pointwise, 3 * outside + product)
