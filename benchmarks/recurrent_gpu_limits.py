"""The least time of a recurrent layer on a GPU, by a model of its parts, of which each is measured.

A slice of the batch is the work of n thread blocks that hold the recurrent weights between them and
exchange h (in the backward the gradients of the gates, or in a cluster the parts of that of h) once
a step. Of a step:

    t_product   2 G H^2 max(B_c, 8) flops on n of the multiprocessors, at torch.mm's rate
    t_weights   the weights beyond what registers hold, from shared memory; or, where the blocks
                cannot hold them, from the L2 cache or from memory
    t_traffic   what a step reads and writes of the whole sequence, at the rate of a copy
    t_exchange  by exchange.cu, for n blocks and as many bytes
    t_step      max(t_product, t_weights, t_traffic) + t_exchange + t_pointwise

with B_c the rows of one slice when all slices run side by side, and the least t_step over all ways
to place the layer. Products outside of the steps run at torch.mm's rate, and each layer has a
launch. Reaching 1.0 means that nothing is left but a better placement than the model knows.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import device
from benchmarks.cells import GATES
from benchmarks.limits import BYTES
from benchmarks.recurrent_gpu_cases import GpuCell

# Of the 256 KB of registers of a multiprocessor, those that weights can have; and of its shared
# memory, what else than weights stands there.
REGISTER_BYTES = 130 << 10
SHARED_BESIDES = 27 << 10
SHARED_BYTES_A_CLOCK = 128
# Dependent latency of the cell: two functions of the special function unit and some products.
POINTWISE_SECONDS = 1e-7
SMALLEST_TILE = 8  # rows of the batch in a product of tensor cores


@dataclass(frozen=True)
class Rates:
    """Of a GPU: torch.mm in flops a second by dtype, copies beyond the L2 cache and within it in
    bytes a second, seconds of a launch, multiprocessors, their clock in Hz and the shared memory of
    each in bytes, and the bytes of the L2 cache."""

    gemm: dict[str, float]
    copy: float
    l2: float
    launch: float
    multiprocessors: int
    clock: float
    shared: int
    l2_bytes: int


def gemm_rate(dtype: str, size: int = 4096) -> float:
    """Flops a second of torch.mm on square matrices; float32 without TF32, PyTorch's default."""
    a, b = (torch.randn(size, size, device=device.DEVICE).to(getattr(torch, dtype)) for _ in "ab")
    out = torch.empty_like(a)
    return 2 * size**3 / device.seconds_each(lambda: torch.mm(a, b, out=out))


def measure() -> Rates:
    """Measures the GPU of this process, which takes a second or two."""
    properties = torch.cuda.get_device_properties(0)
    one = torch.zeros(1, device=device.DEVICE)
    return Rates(
        {dtype: gemm_rate(dtype) for dtype in ("float32", "bfloat16", "float16")},
        copy=device.copy_rate(2**30),
        # Both ends of it within the cache, and long enough to hide its launch.
        l2=device.copy_rate(properties.L2_cache_size // 3),
        launch=device.seconds_each(lambda: one.add_(1)),
        multiprocessors=properties.multi_processor_count,
        clock=device.clock(),
        shared=properties.shared_memory_per_multiprocessor,
        l2_bytes=properties.L2_cache_size,
    )


@dataclass(frozen=True)
class Exchange:
    """A measured exchange: "block", "cluster" or "grid", the blocks that take part, the bytes that
    each has after it, and its seconds."""

    kind: str
    members: int
    bytes: int
    seconds: float


def load_exchanges(path: Path) -> list[Exchange]:
    """What exchange.cu printed, without what the device refused."""
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    return [
        Exchange(x["exchange"], x["members"], x["bytes"], 1e-9 * x["ns_per_step"])
        for x in lines
        if "ns_per_step" in x
    ]


def exchange_seconds(measured: list[Exchange], size: float) -> float:
    """For `size` bytes, from measurements of one kind and number of members: linear between them
    and beyond the largest, and never less than the smallest. A barrier in a block passes nothing
    on, and its fastest counts."""
    if measured[0].kind == "block":
        return min(x.seconds for x in measured)
    points = sorted({(x.bytes, x.seconds) for x in measured})
    if len(points) == 1 or size <= points[0][0]:
        return points[0][1]
    above = next((i for i, (n, _) in enumerate(points) if n >= size and i), len(points) - 1)
    (n0, t0), (n1, t1) = points[above - 1 : above + 1]
    return max(t0, t0 + (size - n0) * (t1 - t0) / (n1 - n0))


@dataclass(frozen=True)
class Step:
    """One layer's step: `jobs` directions (or layers) that can run side by side, of `rows` rows."""

    cell: GpuCell
    rows: int
    jobs: int
    backward: bool

    @property
    def traffic(self) -> float:
        """Bytes that it reads and writes of tensors of the whole sequence: the input projection,
        h, and in training the gates and c; backward those, dy and the gradients of the gates."""
        G = GATES[self.cell.mode]
        values = G + 1 + (G + 1 if self.cell.kind == "training" else 0)
        if self.backward:
            values = 2 * G + 2
        return self.rows * self.jobs * values * self.cell.H * BYTES[self.cell.dtype]


def placed_seconds(step: Step, rates: Rates, measured: list[Exchange], largest: int) -> float:
    """A step on as many blocks as `measured` was taken with; inf where they cannot hold it."""
    cell, n, sms = step.cell, measured[0].members, rates.multiprocessors
    G, H, size = GATES[cell.mode], cell.H, BYTES[cell.dtype]
    groups = sms // n
    if groups == 0:
        return math.inf
    rounds = math.ceil(step.jobs / groups)
    rows = math.ceil(step.rows / max(1, groups // step.jobs))
    product = 2 * G * H * H * max(rows, SMALLEST_TILE) * sms / n / rates.gemm[cell.dtype]
    weights = G * H * H * size
    if weights / n <= rates.shared - SHARED_BESIDES + REGISTER_BYTES:
        shared = max(0, weights / n - REGISTER_BYTES)
        read = shared / (SHARED_BYTES_A_CLOCK * rates.clock)
    elif n == largest:
        read = weights / (rates.l2 if weights <= rates.l2_bytes else rates.copy)
    else:
        return math.inf
    value = size * (G if step.backward else 1)
    if step.backward and measured[0].kind == "cluster":
        value = 4  # bytes of a part, whatever the dtype
    passed = exchange_seconds(measured, rows * H * value)
    traffic = step.traffic / rates.copy / rounds
    return rounds * (max(product, read, traffic) + passed + POINTWISE_SECONDS)


def step_seconds(step: Step, rates: Rates, exchanges: list[Exchange]) -> float:
    """The least over all placements that were measured."""
    kinds: dict[tuple[str, int], list[Exchange]] = {}
    for x in exchanges:
        kinds.setdefault((x.kind, x.members), []).append(x)
    largest = max(x.members for x in exchanges)
    return min(placed_seconds(step, rates, of, largest) for of in kinds.values())


def pass_seconds(
    cell: GpuCell, rates: Rates, exchanges: list[Exchange], backward: bool, layers: int
) -> float:
    """All layers of one pass. Layers of one direction may run side by side, each a step behind the
    one below it; those of two directions have to wait for each other."""
    G, H, D, N = GATES[cell.mode], cell.H, cell.directions, sum(cell.lengths)
    rows = math.ceil(N / cell.T)

    def steps(jobs: int) -> float:
        return step_seconds(Step(cell, rows, jobs, backward), rates, exchanges)

    in_turn = layers * cell.T * steps(D)
    if D == 1 and layers > 1:
        in_turn = min(in_turn, (cell.T + layers - 1) * steps(layers))
    inputs = [H] + [D * H] * (layers - 1)
    # The input projection; backward dx and dW, and the gradient of the recurrent weights.
    flops = sum(2 * N * D * G * H * ((2 * I + H) if backward else I) for I in inputs)
    return in_turn + flops / rates.gemm[cell.dtype] + layers * rates.launch


def limit_seconds(cell: GpuCell, rates: Rates, exchanges: list[Exchange]) -> float:
    """The least time of one call of a cell by the model above.

    Raises:
        ValueError: `exchanges` is empty.
    """
    if not exchanges:
        raise ValueError("exchanges must hold at least one measurement, got none")
    # A layer that keeps nothing writes nothing for a backward.
    seconds = pass_seconds(cell, rates, exchanges, False, cell.layers)
    if cell.kind == "training":
        seconds += pass_seconds(cell, rates, exchanges, True, cell.layers)
    return seconds
