"""Times attention: seqkern and everyone else, interleaved in one process, on the same inputs.

On a GPU the whole list; without one a dry run of small sizes, which shows that the suite works and
nothing about the kernels. `python -m benchmarks.attention_table RESULTS.json` makes the table.
"""

from dataclasses import asdict

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks import device
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
    step,
)
from benchmarks.bench_recurrent import race
from benchmarks.contestants import Contestant
from benchmarks.device import DEVICE, GPU, repeated

CASES = gpu_cases() if GPU else cpu_cases()

pytestmark = [pytest.mark.gpu] if GPU else []


def entrants(p: Problem) -> tuple[dict[str, Contestant], dict[str, int], dict[str, str]]:
    """Those who compute the case, how many calls make up a run of each, and who refuses it with
    what words. An error of seqkern's own is not caught."""
    entries, calls, refused = {}, {}, {}
    for name, forward in forwards(p).items():
        run = step(p, forward)
        try:
            run()
        except (RuntimeError, torch.cuda.OutOfMemoryError) as error:
            if name == OURS:
                raise
            refused[name] = str(error).strip().splitlines()[0][:200]
            continue
        repeat, calls[name] = repeated(run)
        entries[name] = Contestant(name, repeat, lambda forward=forward: {"o": forward()})
    return entries, calls, refused


def check(p: Problem, entries: dict[str, Contestant]) -> float:
    """Our error over the largest allowed: twice that of the formula in the same dtype."""
    expected = exact(p)

    def error(o: Tensor) -> float:
        difference = (o.detach().float() - expected).abs()
        if p.lens is not None:
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
    torch.compiler.reset()
    p = make_problem(case, DEVICE)
    entries, calls, refused = entrants(p)
    error = check(p, entries)
    assert error <= 1, f"error {error:.2f} times the budget"
    benchmark.group = case.kind
    names = [OURS, *(name for name in entries if name != OURS)]
    samples = race(benchmark, [entries[n] for n in names], pytestconfig.option.budget)
    benchmark.extra_info.update(
        case=asdict(case),
        flop=case.flop,
        cache_bytes=case.cache_bytes,
        copy_bandwidth=copy_bandwidth,
        error_over_budget=round(error, 3),
        device=device.name(),
        refused=refused,
        samples={
            name: {"wall_us": [1e6 * s / calls[name] for s in sample.wall]}
            for name, sample in zip(names, samples, strict=True)
        },
    )
