"""The CUDA kernels compiled for each card, and what the assembler and the disassembler say of them.

One front end for all cards (PTX for the oldest that has the kernels) and one assembler each. Kept
under build/ by the contents of everything that goes in, since a compilation takes half a minute.
"""

import fcntl
import hashlib
import json
import re
import subprocess
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build/assembled"
ARCHS = ("sm_80", "sm_90a", "sm_100", "sm_120")
LABEL = re.compile(r"^\.text\.(\w+):", re.M)
# A call of a place in the same kernel is how sm_80 leaves some loops: a jump.
JUMP = re.compile(r"\bCALL[.A-Z]*(?= `\(\.L_)")
OPCODE = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[0-9T]+\s+)?([A-Z][A-Z0-9_.]*)", re.M)
USAGE = re.compile(
    r"entry function '(\w+)' for '\w+'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
    r"(\d+) bytes spill loads.*?Used (\d+) registers",
    re.S,
)


@dataclass(frozen=True)
class Usage:
    """One kernel for one card: what it takes, and how often its instructions stand in it."""

    registers: int
    stack: int
    spilled: int
    instructions: dict[str, int]

    def count(self, name: str) -> int:
        """Of one instruction with any modifiers, or with those named."""
        return sum(n for x, n in self.instructions.items() if f"{x}.".startswith(f"{name}."))


def usage(
    source: Path, cuda_home: Path, nvdisasm: Path, archs: tuple[str, ...] = ARCHS
) -> dict[str, dict[str, Usage]]:
    """By card and by (mangled) name, every kernel of a .cu file; the oldest card first."""
    folder = BUILD / _digest(source, cuda_home)
    folder.mkdir(parents=True, exist_ok=True)
    result = folder / "usage.json"
    with open(BUILD / "lock", "w") as lock:  # other workers of the same run wait here
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not result.exists():
            found = _compile(source, cuda_home, nvdisasm, folder, archs)
            result.write_text(json.dumps(found))
    kept = json.loads(result.read_text())
    return {arch: {name: Usage(**u) for name, u in of.items()} for arch, of in kept.items()}


def _digest(source: Path, cuda_home: Path) -> str:
    digest = hashlib.sha256(Path(__file__).read_bytes() + str(cuda_home).encode())
    headers = [p for p in (ROOT / "csrc/core").rglob("*") if p.suffix in {".h", ".cuh"}]
    for path in sorted([*headers, source]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _run(*command: object) -> str:
    done = subprocess.run(
        [str(word) for word in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def _compile(source: Path, cuda_home: Path, nvdisasm: Path, folder: Path, archs: tuple[str, ...]):
    ptx = folder / "kernels.ptx"
    flags = ["-O3", "-std=c++17", f"-I{ROOT / 'csrc'}", f"-arch=compute_{archs[0][3:5]}"]
    said = _run(cuda_home / "bin/nvcc", *flags, "-ptx", source, "-o", ptx)
    assert "warning" not in said, said
    found = {}
    for arch in archs:
        cubin = folder / f"{arch}.cubin"
        log = _run(cuda_home / "bin/ptxas", "-v", f"--gpu-name={arch}", ptx, "-o", cubin)
        codes = _instructions(_run(nvdisasm, "-c", cubin))
        found[arch] = {
            name: asdict(Usage(int(r), int(stack), int(a) + int(b), codes[name]))
            for name, stack, a, b, r in USAGE.findall(log)
        }
    return found


def _instructions(text: str) -> dict[str, dict[str, int]]:
    pieces = LABEL.split(text)[1:]
    named = zip(pieces[::2], pieces[1::2], strict=True)
    return {name: dict(Counter(OPCODE.findall(JUMP.sub("BRA", code)))) for name, code in named}
