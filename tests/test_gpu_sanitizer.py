"""The kernels under compute-sanitizer: no access out of bounds, no race, no barrier that threads
miss. Apart from the other tests of a GPU, since each takes minutes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ATTENTION = """
import torch, seqkern
q = torch.randn(2, 4, 97, 40, device="cuda", dtype=torch.bfloat16, requires_grad=True)
lens = torch.tensor([97, 13], device="cuda", dtype=torch.int32)
bias = torch.randn(1, 4, 1, 97, device="cuda", requires_grad=True)
seqkern.attention(q, q, q, k_lens=lens, bias=bias, causal="top_left").sum().backward()
for Tq in (1, 33):
    x = torch.randn(2, Tq, 40, device="cuda", requires_grad=True)
    y = torch.randn(2, 97, 40, device="cuda", requires_grad=True)
    v = torch.randn(40, device="cuda", requires_grad=True)
    seqkern.additive_attention(x, y, y, v, k_lens=lens).sum().backward()
"""
RECURRENT = """
import torch, seqkern
from seqkern.ops import _recurrent_block as block
room = block.room
for dtype in (torch.bfloat16, torch.float32):
    for H in (17, 300, 500, 24):
        block.room = room if H != 24 else lambda *of: ""  # the last one step by step
        layer = seqkern.nn.LSTM(8, H, bidirectional=True).to("cuda", dtype)
        x = torch.randn(3, 9, 8, device="cuda", dtype=dtype, requires_grad=True)
        layer(x)[0].sum().backward()
"""


def sanitizer() -> str | None:
    """Where compute-sanitizer is, which often is not on the PATH."""
    homes = os.environ.get("CUDA_HOME"), "/usr/local/cuda"
    folders = [str(Path(home, "bin")) for home in homes if home]
    return shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ["PATH"], *folders]))


def sanitized(command: str, tool: str, program: str) -> subprocess.CompletedProcess[str]:
    """A Python program under one of the sanitizer's tools. PyTorch gives each tensor memory of its
    own there: within a block that it caches, nothing is out of bounds."""
    options = ["--tool", tool, "--error-exitcode", "9"]
    if tool == "memcheck":
        # The launchers ask CUDA for more than it has on purpose, to learn what it refuses.
        options += ["--report-api-errors", "no"]
    return subprocess.run(
        [command, *options, sys.executable, "-c", program],
        env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("program", [ATTENTION, RECURRENT], ids=["attention", "recurrent"])
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_compute_sanitizer(tool: str, program: str) -> None:
    command = sanitizer()
    if command is None:  # it comes with the CUDA toolkit, which a GPU machine may lack
        pytest.skip("compute-sanitizer is not installed")
    done = sanitized(command, tool, program)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


def test_the_sanitizer_is_found_and_sees_every_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "compute-sanitizer").write_text(
        '#!/bin/sh\necho "$PYTORCH_NO_CUDA_MEMORY_CACHING" "$@"\n'
    )
    (folder / "compute-sanitizer").chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "/nowhere")
    command = sanitizer()
    assert command is not None
    assert Path(command) == folder / "compute-sanitizer"
    done = sanitized(command, "memcheck", "pass")
    assert done.stdout.startswith("1 --tool memcheck --error-exitcode 9 --report-api-errors no")
    assert "api-errors" not in sanitized(command, "racecheck", "pass").stdout
