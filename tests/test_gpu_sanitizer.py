"""The kernels under compute-sanitizer: no access out of bounds, no race, no barrier that threads
miss. Apart from the other tests of a GPU, since each takes minutes."""

import os
import re
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
mask = torch.rand(2, 1, 97, 97, device="cuda") > 0.5
seqkern.attention(q, q, q, mask=mask, dropout_p=0.2).sum().backward()
x = torch.randn(150, 4, 40, device="cuda", dtype=torch.bfloat16, requires_grad=True)
ends = torch.tensor([0, 97, 97, 150], device="cuda", dtype=torch.int32)
seqkern.attention_varlen(x, x, x, ends, ends, 97, 97, causal="bottom_right").sum().backward()
torch.cuda.synchronize()
"""
DECODE = """
import torch, seqkern
q = torch.randn(3, 8, 3, 40, device="cuda", dtype=torch.bfloat16)
new = torch.randn(2, 3, 2, 3, 40, device="cuda", dtype=torch.bfloat16)
lens = torch.tensor([0, 37, 93], device="cuda", dtype=torch.int32)
for page in (0, 16):
    shape = (18, 2, page, 40) if page else (3, 2, 96, 40)
    caches = torch.randn(2, *shape, device="cuda", dtype=torch.bfloat16)
    table = torch.randperm(18, device="cuda").view(3, 6).int() if page else None
    for splits in (1, 3):
        given = {"k_lens": lens, "k_new": new[0], "v_new": new[1], "block_table": table}
        seqkern.attention_decode(q, *caches, **given, splits=splits)
torch.cuda.synchronize()
"""
ADDITIVE = """
import torch, seqkern
lens = torch.tensor([97, 13], device="cuda", dtype=torch.int32)
for Tq in (1, 33):
    x = torch.randn(2, Tq, 40, device="cuda", requires_grad=True)
    y = torch.randn(2, 97, 40, device="cuda", requires_grad=True)
    v = torch.randn(40, device="cuda", requires_grad=True)
    seqkern.additive_attention(x, y, y, v, k_lens=lens).sum().backward()
torch.cuda.synchronize()
"""
# H 17 is one block's, 24 is made to run step by step.
RECURRENT = """
import torch, seqkern
from torch.nn.utils.rnn import pack_padded_sequence
from seqkern.ops import _recurrent_block as block
room = block.room
for products, hidden in {sizes}.items():
    torch.backends.cudnn.allow_tf32 = products == "tf32"
    dtype = torch.bfloat16 if products == "bfloat16" else torch.float32
    for H in (17, *hidden, 24):
        block.room = room if H != 24 else lambda *of: ""
        layer = seqkern.nn.{mode}(8, H, bidirectional=True).to("cuda", dtype)
        x = torch.randn(4, 3, 8, device="cuda", dtype=dtype, requires_grad=True)
        layer(x)[0].sum().backward()
        layer(pack_padded_sequence(x, [4, 2, 1]))[0].data.sum().backward()
torch.cuda.synchronize()
"""
# Of each product, the sizes whose blocks are a cluster and a grid on a card like the H200, in the
# forward and in the backward. test_cuda_build.py holds them to it.
SIZES = {
    "LSTM": {"bfloat16": (280, 1000), "float32": (280, 500), "tf32": (280, 600)},
    "GRU": {"bfloat16": (280, 1000), "float32": (280, 500), "tf32": (280, 600)},
    "RNN": {"bfloat16": (280, 2056), "float32": (280, 1000), "tf32": (280, 2056)},
}
# Under three tools these are as many programs as benchmarks/gpu.sh runs at once.
PROGRAMS = {"attention": ATTENTION + DECODE + ADDITIVE}
PROGRAMS |= {mode: RECURRENT.format(mode=mode, sizes=sizes) for mode, sizes in SIZES.items()}


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
    if tool == "racecheck":
        options += ["--print-limit", "100000"]
    return subprocess.run(
        [command, *options, sys.executable, "-c", program],
        env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip


RACE = re.compile(r"^=+ (?:Error|Warning): Race reported between (.*)\n((?:=+ +and .*\n)+)", re.M)
REDUCTION = re.compile(r"Write access at \S+ in \S*triton/language/standard\.py:\d+")


def races(printed: str) -> list[str]:
    """What racecheck reports, but for Triton's own reductions: threads that hold the same sum store
    it to one word there, which is a race by the letter (triton-lang/triton, issue 7264)."""
    reports = RACE.findall(printed)
    found = []
    for first, others in reports:
        places = {re.sub(r" \[\d+ hazards?\]$", "", at) for at in re.findall("and (.*)", others)}
        if places != {first} or not REDUCTION.fullmatch(first):
            found.append(f"{first}\n{others}")
    summary = re.search(r"RACECHECK SUMMARY: (\d+) hazards? displayed", printed)
    if summary is None or int(summary[1]) != len(reports):
        found.append(f"{len(reports)} reports read of {printed[-3000:]}")
    return found


@pytest.mark.gpu
@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS.keys())
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_compute_sanitizer(tool: str, program: str) -> None:
    command = sanitizer()
    if command is None:  # it comes with the CUDA toolkit, which a GPU machine may lack
        pytest.skip("compute-sanitizer is not installed")
    done = sanitized(command, tool, program)
    if tool == "racecheck" and done.returncode == 9:
        assert not races(done.stdout)
        return
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


def test_only_races_of_tritons_reductions_are_passed_over() -> None:
    standard = "/site-packages/triton/language/standard.py"

    def report(kind: str, first: str, second: str) -> str:
        return (
            f"========= {kind}: Race reported between {first}\n"
            f"=========     and {second} [508 hazards]\n=========\n"
        )

    def printed(*reports: str) -> str:
        return "".join(reports) + f"========= RACECHECK SUMMARY: {len(reports)} hazards displayed\n"

    write = f"Write access at delta_kernel+0x5ad20 in {standard}:237"
    benign = report("Error", write, write)
    assert not races(printed(benign, benign))
    ours = "Write access at delta_kernel+0x10 in /seqkern/kernels/tile.py:12"
    read = write.replace("Write", "Read")
    for pair in (
        (write, write.replace("0x5ad20", "0x5ad30")), (write, read), (read, read), (ours, ours)
    ):  # fmt: skip
        assert len(races(printed(benign, report("Warning", *pair)))) == 1, pair
    assert len(races(benign)) == 1, "no summary"
    assert len(races(printed(benign, "========= Error: in other words\n"))) == 1
