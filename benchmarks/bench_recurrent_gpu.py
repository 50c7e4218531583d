"""Times the recurrent layers on a GPU: seqkern, cuDNN in the same dtype and in float16, PyTorch's
own step by step, and a loop of cells; interleaved in one process, on the same inputs.

`--grid quick` is what minutes allow; `--grid full --slice I/N` one of N parts of everything, and
`--within SECONDS` leaves out what has not begun by then. Without a GPU it is a dry run of tiny
sizes, which shows that the suite works and nothing about the kernels. `--records FILE` appends a
line for every cell as it is done, of which `python -m benchmarks.recurrent_gpu_table` makes the
table.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch.nn.utils.rnn import PackedSequence

import seqkern
import seqkern.nn
from benchmarks import device, records, recurrent_gpu_cases
from benchmarks.bench_recurrent import race
from benchmarks.cells import Cell, Row
from benchmarks.check import check
from benchmarks.contestants import (
    Contestant,
    Outputs,
    Problem,
    contestant_of,
    make_problem,
    module_contestant,
    torch_module,
)
from benchmarks.recurrent_gpu_cases import (
    CELLS,
    HALF,
    OURS,
    OURS_TF32,
    TF32,
    TORCH,
    CellLoop,
    peers_of,
)
from benchmarks.recurrent_gpu_limits import Rates, measure

# The reference runs a kernel for every operation of every step, so it is timed on short sequences.
LONGEST_REFERENCE = 128

# What PyTorch warns of in a peer is printed and does not fail the cell.
QUIET = pytest.mark.filterwarnings("default")
pytestmark = [QUIET, pytest.mark.gpu] if device.GPU else [QUIET]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test a cell of the chosen rows, grid and slice."""
    options = metafunc.config.option
    part = recurrent_gpu_cases.parse_slice(options.slice)
    grid = options.grid if device.GPU else "tiny"
    cases = recurrent_gpu_cases.cases(grid, options.row, part)
    metafunc.parametrize(("row", "cell"), cases, ids=[f"{row.key}:{cell}" for row, cell in cases])


@pytest.fixture(scope="session")
def rates() -> Rates | None:
    """What the GPU reaches, measured once in this run."""
    return measure() if device.GPU else None


@contextmanager
def flags_of(name: str) -> Iterator[None]:
    """PyTorch's switches for a contestant: of recurrent layers, which seqkern's follow too, and of
    the products beside them. Without cuDNN seqkern runs its own kernels where the table of those
    for which cuDNN was faster has a row, so that the next table does not compare it with itself."""
    enabled, tf32 = name in (TORCH, TF32, HALF), name in (TF32, OURS_TF32)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        with torch.backends.cudnn.flags(enabled=enabled, allow_tf32=tf32):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def under(name: str, call: Callable[[], Any]) -> Callable[[], Any]:
    """The same call with a contestant's switches."""

    def switched() -> Any:
        with flags_of(name):
            return call()

    return switched


def contestant(name: str, cell: Cell, problem: Problem) -> Contestant:
    """One of those that are timed."""
    dtype = torch.float16 if name == HALF else getattr(torch, cell.dtype)
    if name == CELLS:
        return cell_loop(cell, problem, dtype)
    namespace = seqkern.nn if name in (OURS, OURS_TF32) else torch.nn
    entry = module_contestant(name, cell, problem, namespace, dtype)
    # TF32 keeps as many bits of a factor as float16.
    return replace(entry, dtype="float16") if name in (HALF, TF32, OURS_TF32) else entry


def cell_loop(cell: Cell, problem: Problem, dtype: torch.dtype) -> Contestant:
    """A Python loop over the steps."""
    module = CellLoop(cell.H, cell.H, device=problem.x.device)
    state = problem.module.state_dict()
    module.load_state_dict({name.removesuffix("_l0"): w for name, w in state.items()})
    entry = contestant_of(CELLS, cell, problem, module.to(dtype), dtype)

    def outputs() -> Outputs:
        found = entry.outputs()
        return {f"{n}_l0" if n.startswith(("dweight", "dbias")) else n: v for n, v in found.items()}

    return replace(entry, outputs=outputs)


def entrants(
    row: Row, cell: Cell, problem: Problem
) -> tuple[list[Contestant], dict[str, int], dict[str, str]]:
    """Those who compute the cell, ours first, how many calls make up a run of each, and who refuses
    it with what words. An error of seqkern's own is not caught."""
    entries, calls, refused = [], {}, {}
    for name in (OURS, *peers_of(row, cell)):
        try:
            with flags_of(name):
                entry = contestant(name, cell, problem)
                repeat, calls[name] = device.repeated(entry.run)
        except RuntimeError as error:  # out of memory among others
            if name in (OURS, OURS_TF32):
                raise
            refused[name] = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            continue
        outputs = under(name, entry.outputs)
        entries.append(replace(entry, run=under(name, repeat), outputs=outputs))
    return entries, calls, refused


def explained(cell: Cell, problem: Problem) -> tuple[list[str], list[str]]:
    """Each layer's kernel, and why it is that one, in the words of seqkern.explain."""
    dtype = getattr(torch, cell.dtype)
    layer = torch_module(cell, seqkern.nn, device.DEVICE).to(dtype)
    x = problem.x.to(dtype)
    sizes = problem.batch_sizes
    with flags_of(OURS):
        told = seqkern.explain(layer, x if sizes is None else PackedSequence(x, sizes))
    return [line.kernel for line in told], [line.reason for line in told]


def reason_to_leave_out(cell: Cell, kernels: list[str]) -> str | None:
    """Why a cell is not timed, or None."""
    if "reference" in kernels and cell.T > LONGEST_REFERENCE:
        return f"the reference is not timed beyond T {LONGEST_REFERENCE}"
    return None


def test_cell(
    benchmark: BenchmarkFixture,
    row: Row,
    cell: Cell,
    rates: Rates | None,
    pytestconfig: pytest.Config,
) -> None:
    record: dict[str, Any] = {"row": row.key, "cell": asdict(cell), "device": device.name()}
    records.leave_out_if_late(pytestconfig, record)
    problem = make_problem(cell, device=device.DEVICE)
    with torch.set_grad_enabled(cell.kind == "training"):
        kernels, reasons = explained(cell, problem)
        record |= {"kernels": kernels, "reasons": reasons}
        if reason := reason_to_leave_out(cell, kernels):
            records.leave_out(pytestconfig, record, reason)
        entries, calls, refused = entrants(row, cell, problem)
        with flags_of(TORCH):  # also of the yardstick that check adds where torch.nn refused
            error = check(cell, problem, entries)
        device.wait()
        samples = race(benchmark, entries, pytestconfig.option.budget)
    benchmark.group = row.title
    record |= {
        "error_over_budget": round(error, 3),
        "rates": asdict(rates) if rates else None,
        "refused": refused,
        "samples": {
            entry.name: {"wall_us": [round(1e6 * s / calls[entry.name], 3) for s in sample.wall]}
            for entry, sample in zip(entries, samples, strict=True)
        },
    }
    records.keep(pytestconfig, record)
    benchmark.extra_info.update(record)
