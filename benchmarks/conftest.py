"""The suites' options, the machine's limits, and what pytest-benchmark's JSON gets from both."""

import math
import os
import platform
from importlib.metadata import version
from pathlib import Path

import pytest

import seqkern
from benchmarks import limits as machine_limits
from benchmarks import recurrent_gpu_cases
from benchmarks.cells import GRIDS, ROWS

LIMITS = pytest.StashKey[machine_limits.Limits]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("seqkern benchmarks")
    group.addoption("--grid", choices=sorted(GRIDS), default="quick", help="which cells")
    rows = [row.key for row in (*ROWS, *recurrent_gpu_cases.ROWS)]
    group.addoption("--row", choices=rows, action="append", help="only these rows")
    group.addoption("--slice", default="1/1", help="part I of N of the cells on a GPU: I/N")
    group.addoption("--within", type=float, default=math.inf, help="seconds to begin cases in")
    group.addoption("--records", help="file to add a line for each case to")
    group.addoption(
        "--longest",
        type=float,
        default=math.inf,
        help="leave out cells that take more seconds a call at 100 GFLOP/s",
    )
    group.addoption("--budget", type=float, default=1.5, help="seconds of timing a cell")


@pytest.fixture(scope="session")
def limits(pytestconfig: pytest.Config) -> machine_limits.Limits:
    """What this machine reaches, measured once in this run."""
    measured = machine_limits.measure(min(0.3, pytestconfig.option.budget))
    pytestconfig.stash[LIMITS] = measured
    return measured


def cpu_description() -> dict[str, object]:
    """The CPU's name, its vector extensions that matter here, and the number of cores."""
    fields: dict[str, str] = {}
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().split("\n\n")[0].splitlines():
            name, _, value = line.partition(":")
            fields[name.strip()] = value.strip()
    flags = fields.get("flags", "").split()
    relevant = [f for f in flags if f.startswith(("avx", "amx", "fma"))]
    return {
        "cpu": fields.get("model name", platform.processor() or platform.machine()),
        "model": f"family {fields.get('cpu family', '?')} model {fields.get('model', '?')}",
        "flags": relevant,
        "cores": len(os.sched_getaffinity(0)),
        "system": f"{platform.system()} {platform.machine()}",
    }


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict) -> None:
    """Adds the machine, versions and limits that the report needs."""
    packages = ("torch", "onnxruntime", "onnx", "numpy", "pytest-benchmark")
    measured = config.stash.get(LIMITS, None)
    output_json["seqkern"] = {
        "grid": config.option.grid,
        "longest": config.option.longest if math.isfinite(config.option.longest) else None,
        "machine": cpu_description(),
        "versions": {"python": platform.python_version(), "seqkern": seqkern.__version__}
        | {name: version(name) for name in packages},
        "limits": measured.as_dict() if measured else None,
        "load": round(os.getloadavg()[0], 1),
    }
