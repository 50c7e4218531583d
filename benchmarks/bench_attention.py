"""Times attention: seqkern and everyone else, interleaved in one process, on the same inputs.

On a GPU the whole list; without one a dry run of small sizes, which shows that the suite works and
nothing about the kernels. `python -m benchmarks.attention_table FILE` makes the table of what
`--records FILE` wrote; `--within SECONDS` leaves out what has not begun by then.
"""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks import device, records
from benchmarks.attention_cases import (
    EAGER,
    OURS,
    Case,
    Problem,
    cpu_cases,
    exact,
    forwards,
    gpu_cases,
    make_problem,
    on_backend,
    step,
)
from benchmarks.bench_recurrent import race
from benchmarks.contestants import Contestant
from benchmarks.device import DEVICE, GPU, repeated

CASES = gpu_cases() if GPU else cpu_cases()

# What PyTorch warns of in a peer is printed and does not fail the case.
QUIET = pytest.mark.filterwarnings("default")
pytestmark = [QUIET, pytest.mark.gpu] if GPU else [QUIET]


def under(name: str, call: Callable[[], Any]) -> Callable[[], Any]:
    """The same call with a contestant's kernel chosen, around all of its repeats."""

    def switched() -> Any:
        with on_backend(name):
            return call()

    return switched


def entrants(p: Problem) -> tuple[dict[str, Contestant], dict[str, int], dict[str, str]]:
    """Those who compute the case, how many calls make up a run of each, and who refuses it with
    what words. An error of seqkern's own is not caught."""
    entries, calls, refused = {}, {}, {}
    for name, forward in forwards(p).items():
        run = step(p, forward)
        try:
            under(name, run)()
        except (RuntimeError, torch.cuda.OutOfMemoryError) as error:
            if name == OURS:
                raise
            refused[name] = str(error).strip().splitlines()[0][:200]
            continue
        with on_backend(name):
            repeat, calls[name] = repeated(run)
        outputs = under(name, lambda forward=forward: {"o": forward()})
        entries[name] = Contestant(name, under(name, repeat), outputs)
    return entries, calls, refused


def check(p: Problem, entries: dict[str, Contestant]) -> float:
    """Our error over the largest allowed: twice that of the formula in the same dtype."""
    expected = exact(p)

    def error(o: Tensor) -> float:
        difference = (o.detach().float() - expected).abs()
        if p.lens is not None and p.mask is not None:
            # The others compute something for queries beyond the end; we give zeros.
            beyond = torch.arange(p.case.T, device=o.device) >= p.lens[:, None]
            difference = difference.masked_fill(beyond[:, None, :, None], 0)
        return difference.max().item()

    peer = EAGER if EAGER in entries else next(name for name in entries if name != OURS)
    rounding = torch.finfo(p.q.dtype).eps * expected.abs().max().item()
    budget = 2 * error(entries[peer].outputs()["o"]) + rounding
    return error(entries[OURS].outputs()["o"]) / budget


@pytest.fixture(scope="session")
def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a copy that no cache holds."""
    return device.copy_rate(2**30 if GPU else 2**24)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(
    benchmark: BenchmarkFixture,
    case: Case,
    copy_bandwidth: float,
    pytestconfig: pytest.Config,
) -> None:
    record: dict[str, Any] = {"case": asdict(case), "device": device.name()}
    records.leave_out_if_late(pytestconfig, record)
    torch.compiler.reset()
    p = make_problem(case, DEVICE)
    entries, calls, refused = entrants(p)
    error = check(p, entries)
    assert error <= 1, f"error {error:.2f} times the budget"
    benchmark.group = case.kind
    names = [OURS, *(name for name in entries if name != OURS)]
    samples = race(benchmark, [entries[n] for n in names], pytestconfig.option.budget)
    record |= {
        "flop": case.flop,
        "cache_bytes": case.cache_bytes,
        "copy_bandwidth": copy_bandwidth,
        "error_over_budget": round(error, 3),
        "refused": refused,
        "samples": {
            name: {"wall_us": [1e6 * s / calls[name] for s in sample.wall]}
            for name, sample in zip(names, samples, strict=True)
        },
    }
    records.keep(pytestconfig, record)
    benchmark.extra_info.update(record)
