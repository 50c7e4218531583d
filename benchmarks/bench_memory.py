"""Peak memory of a training step, seqkern's and torch's, each in a process of its own."""

from dataclasses import asdict

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.cells import Cell, memory_cells
from benchmarks.memory import measure_step_peak


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test a cell."""
    cells = memory_cells(metafunc.config.option.grid)
    metafunc.parametrize("cell", cells, ids=str)


def test_peak_memory(benchmark: BenchmarkFixture, cell: Cell) -> None:
    benchmark.group = "peak memory of a training step"
    ours = benchmark.pedantic(measure_step_peak, args=("seqkern", cell), rounds=1)
    peaks = {"seqkern": ours, "torch": measure_step_peak("torch", cell)}
    benchmark.extra_info.update(row="memory", cell=asdict(cell), peak_bytes=peaks)
