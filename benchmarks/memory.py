"""Peak memory of one training step, measured in a process of its own.

`python -m benchmarks.memory seqkern|torch CELL_AS_JSON` prints the bytes by which the resident
set rose above what weights, inputs and loaded libraries already took. The kernel's high-water
mark sees every allocation, also those that do not go through torch's allocator.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch

import seqkern.nn
from benchmarks.cells import Cell
from benchmarks.contestants import make_problem, module_contestant

NAMESPACES = {"seqkern": seqkern.nn, "torch": torch.nn}
ROOT = Path(__file__).resolve().parents[1]


def status_bytes(field: str) -> int:
    """A size field of /proc/self/status, such as VmRSS or VmHWM, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) << 10
    raise OSError(f"/proc/self/status has no {field}")


def rise(run: Callable[[], object]) -> int:
    """Bytes by which a call raises this process's resident set at its peak."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = status_bytes("VmRSS")
    results = run()
    peak = status_bytes("VmHWM") - before
    del results
    return peak


def step_peak(implementation: str, cell: Cell) -> int:
    """Bytes that one training step adds to this process at its peak."""
    torch.set_num_threads(cell.threads)
    namespace, dtype = NAMESPACES[implementation], getattr(torch, cell.dtype)
    small = replace(cell, B=2, T=2)
    # Libraries, thread pools and code caches come with the first call, whatever its size.
    module_contestant(implementation, small, make_problem(small), namespace, dtype).run()
    return rise(module_contestant(implementation, cell, make_problem(cell), namespace, dtype).run)


def in_fresh_process(module: str, name: str, case: dict) -> int:
    """What `python -m module name CASE_AS_JSON` prints."""
    command = [sys.executable, "-m", module, name, json.dumps(case)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return int(done.stdout)


def measure_step_peak(implementation: str, cell: Cell) -> int:
    """`step_peak` in a fresh process."""
    return in_fresh_process("benchmarks.memory", implementation, asdict(cell))


if __name__ == "__main__":
    print(step_peak(sys.argv[1], Cell(**json.loads(sys.argv[2]))))
