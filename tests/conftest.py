"""Fixtures of the whole suite: one seed, one thread, no TF32, and the GPU marker."""

import os
import random
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

torch.set_num_threads(1)
# Of recurrent layers on CUDA, where PyTorch allows it unless told otherwise.
torch.backends.cudnn.allow_tf32 = False


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Every test draws the same numbers, alone or in any order."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def capability(request: pytest.FixtureRequest) -> Iterator[str]:
    """The instruction set that a test runs on, an indirect parameter, if the processor has it."""
    if request.param in ("any", "reference"):
        yield request.param
        return
    before = torch.ops.seqkern.cpu_capability()
    try:
        torch.ops.seqkern.set_cpu_capability(request.param)
    except ValueError:
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    torch.ops.seqkern.set_cpu_capability(before)


@pytest.fixture
def example(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Runs an example with arguments, and returns what it prints."""

    def run(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(Path(__file__).parent.parent / "examples" / name), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.fixture(scope="session")
def run_ranks() -> Callable[[str, int, Path], None]:
    """Runs `SCRIPT RANK FOLDER` for every rank at once; fails with what a failed one printed."""

    def run(script: str, count: int, folder: Path) -> None:
        processes = [
            subprocess.Popen(
                [sys.executable, script, str(rank), str(folder)],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(count)
        ]
        try:
            logs = [process.communicate(timeout=150)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
        for process, log in zip(processes, logs, strict=True):
            assert process.returncode == 0, log

    return run


@pytest.fixture
def corpora() -> Path:
    """The folder of the real corpora, which are not part of this repository."""
    folder = os.environ.get("SEQKERN_DATA")
    if folder is None:
        pytest.skip("needs the corpora: SEQKERN_DATA names no folder")
    return Path(folder)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    absent = pytest.mark.skip(reason="needs a CUDA device, and torch sees none")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(absent)
