"""How the tests of the benchmarks run one."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run(*command: str, path: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """A Python module in a process of its own, with one thread and no GPU, as in a dry run.

    Args:
        path: where it finds modules besides the installed ones.
    """
    return subprocess.run(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env={
            "OMP_NUM_THREADS": "1",
            "PATH": "/usr/bin:/bin",
            "PYTHONPATH": str(path),
            "CUDA_VISIBLE_DEVICES": "",
        },
        capture_output=True,
        text=True,
        check=False,
    )
