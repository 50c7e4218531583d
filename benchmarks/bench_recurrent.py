"""Times every cell of the grid: seqkern's layer and its peers, interleaved, on the same inputs.

pytest-benchmark runs the rounds and times seqkern's call; its setup and teardown hooks give the
peers their turn inside the same round, in a shuffled order. The samples of all, seqkern's
included, are taken by one clock and stored in `extra_info`, from which report.py makes the table.
"""

from dataclasses import asdict

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import paired
from benchmarks.cells import ROWS, Cell, Row, cells_of
from benchmarks.check import check
from benchmarks.contestants import Contestant, contestants, make_problem
from benchmarks.limits import Limits, cell_limit

# torch says so of every LSTM with proj_size, the very thing that is compared.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test a cell of the chosen rows and grid."""
    options = metafunc.config.option
    rows = [row for row in ROWS if not options.row or row.key in options.row]
    cases = [(row, cell) for row in rows for cell in cells_of(row, options.grid, options.longest)]
    metafunc.parametrize(("row", "cell"), cases, ids=[f"{row.key}:{cell}" for row, cell in cases])


def race(
    benchmark: BenchmarkFixture, entries: list[Contestant], budget: float
) -> list[paired.Samples]:
    """Interleaved samples of every contestant, the first of which pytest-benchmark times."""
    seconds = [paired.seconds_of_one_call(entry.run) for entry in entries]
    samples = [paired.Samples(paired.calls_per_sample(s)) for s in seconds]
    orders = paired.shuffled_orders(len(entries))
    order: list[int] = []

    def take(indices: list[int]) -> None:
        for index in indices:
            samples[index].take(entries[index].run)

    def before() -> None:
        order[:] = next(orders)
        take(order[: order.index(0)])

    benchmark.pedantic(
        lambda: take([0]),
        setup=before,
        teardown=lambda: take(order[order.index(0) + 1 :]),
        rounds=paired.rounds_within(budget, seconds),
    )
    return samples


def test_cell(
    benchmark: BenchmarkFixture,
    row: Row,
    cell: Cell,
    limits: Limits,
    pytestconfig: pytest.Config,
) -> None:
    torch.set_num_threads(cell.threads)
    problem = make_problem(cell)
    entries = contestants(cell, problem, row.peers)
    error = check(cell, problem, entries)
    benchmark.group = row.title
    with torch.set_grad_enabled(cell.kind == "training"):
        samples = race(benchmark, entries, pytestconfig.option.budget)
    benchmark.extra_info.update(
        row=row.key,
        cell=asdict(cell),
        error_over_budget=round(error, 3),
        limit_us=round(1e6 * cell_limit(cell, limits).total, 3),
        samples={e.name: s.as_microseconds() for e, s in zip(entries, samples, strict=True)},
    )
