"""Times additive attention: seqkern, eager PyTorch and torch.compile, interleaved in one process.

`--grid tiny` takes small sizes, which show that the suite works. `python -m
benchmarks.additive_table FILE` makes the table of what `--records FILE` wrote; `--within SECONDS`
leaves out what has not begun by then.
"""

from dataclasses import asdict
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks import additive_cases, device, records
from benchmarks.additive_cases import EAGER, OURS, Case, Problem, exact, forwards, make_problem
from benchmarks.bench_recurrent import race
from benchmarks.contestants import Contestant
from benchmarks.device import DEVICE, GPU, repeated, wait

# What PyTorch warns of in a peer, as its compiler does of TF32, is printed and fails nothing.
QUIET = pytest.mark.filterwarnings("default")
pytestmark = [QUIET, pytest.mark.gpu] if GPU else [QUIET]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test a case of the device and grid."""
    cases = additive_cases.gpu_cases() if GPU else additive_cases.cpu_cases()
    if metafunc.config.option.grid == "tiny":
        cases = additive_cases.tiny_cases()
    metafunc.parametrize("case", cases, ids=str)


def check(p: Problem, results: dict[str, dict[str, Tensor]]) -> float:
    """Our largest error over the one allowed: twice the largest of the formula's own results, in
    the same dtype, and a rounding; each relative to the largest exact value."""
    expected = exact(p)

    def error(name: str) -> float:
        return max(
            ((results[name][key] - value).abs().max() / value.abs().max()).item()
            for key, value in expected.items()
        )

    return error(OURS) / (2 * error(EAGER) + torch.finfo(p.query.dtype).eps)


def assert_one_formula(results: dict[str, dict[str, Tensor]]) -> None:
    """Raises unless all computed the same as eager. Relative to the largest element: in a sum of
    many terms what is near zero is eager's own rounding."""
    for name, result in results.items():
        for key, value in results[EAGER].items():
            error = (result[key] - value).abs().max().item()
            most = 0.05 * value.abs().max().item()
            assert error <= most, f"{name}: {key} is {error:.2e} from eager's, over {most:.2e}"


def peaks(p: Problem) -> dict[str, int]:
    """Peak extra bytes of ours and of eager's."""
    if not GPU:
        return {name: additive_cases.peak_on_cpu(name, p.case) for name in (OURS, EAGER)}
    calls = forwards(p)
    return {name: additive_cases.peak_on_gpu(p, calls[name]) for name in (OURS, EAGER)}


@pytest.fixture(scope="session")
def tanh_rate() -> float:
    return additive_cases.tanh_rate(DEVICE)


def test_case(
    benchmark: BenchmarkFixture, case: Case, tanh_rate: float, pytestconfig: pytest.Config
) -> None:
    record: dict[str, Any] = {"case": asdict(case), "device": device.name()}
    records.leave_out_if_late(pytestconfig, record)
    torch.compiler.reset()
    if not GPU:
        torch.set_num_threads(1)
    p = make_problem(case, DEVICE)
    with torch.set_grad_enabled(case.backward):
        calls = forwards(p)
        results = {name: additive_cases.outputs(p, f) for name, f in calls.items()}
        error = check(p, results)
        assert error <= 1, f"error {error:.2f} times the budget"
        assert_one_formula(results)
        del results
        wait()
        entries, times = [], {}
        for name, forward in calls.items():
            run, times[name] = repeated(additive_cases.step(p, forward))
            entries.append(Contestant(name, run, lambda f=forward: {"o": f()}))
        samples = race(benchmark, entries, pytestconfig.option.budget)
    benchmark.group = "additive attention"
    record |= {
        "tanhs": case.tanhs,
        "tanh_rate": tanh_rate,
        "error_over_budget": round(error, 3),
        "peak_bytes": peaks(p),
        "samples": {
            entry.name: {
                "wall_us": [1e6 * s / times[entry.name] for s in sample.wall],
                "cpu_us": [1e6 * s / times[entry.name] for s in sample.cpu],
            }
            for entry, sample in zip(entries, samples, strict=True)
        },
    }
    records.keep(pytestconfig, record)
    benchmark.extra_info.update(record)
