"""What NVIDIA's tools, which come with Triton, say of a compiled kernel."""

import hashlib
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

import triton
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
from triton.compiler import CompiledKernel
from triton.runtime.cache import get_cache_manager

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
OPCODE = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[0-9T]+\s+)?([A-Z][A-Z0-9_.]*)", re.M)


def _output(command: list[str], file: bytes) -> str:
    """What a tool prints of a file; kept in Triton's cache, since a run takes up to seconds."""
    words = [triton.__version__, *command]
    key = hashlib.sha256("\n".join(words).encode() + b"\n" + file).hexdigest()
    cache = get_cache_manager(key)
    kept = cache.get_file("output.txt")
    if kept:
        return Path(kept).read_text()
    with tempfile.NamedTemporaryFile() as input_file:
        Path(input_file.name).write_bytes(file)
        done = subprocess.run(
            [*command, input_file.name],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}")
    cache.put(done.stdout, "output.txt")
    return done.stdout


def resource_usage(cubin: bytes) -> dict[str, int]:
    """REG, STACK, SHARED and LOCAL of the one kernel of a binary, by cuobjdump."""
    printed = _output([str(TOOLS / "cuobjdump"), "-res-usage"], cubin)
    return {name: int(n) for name, n in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", printed)}


def opcodes(cubin: bytes) -> Counter[str]:
    """How often each instruction stands in a binary, by its name without modifiers."""
    printed = _output([str(TOOLS / "nvdisasm"), "-c"], cubin)
    return Counter(name.partition(".")[0] for name in OPCODE.findall(printed))


def assembler_log(kernel: CompiledKernel) -> str:
    """What ptxas says when it compiles the kernel once more: Triton does not keep it."""
    options = kernel.metadata
    arch = options.target.arch
    command = [get_ptxas(arch).path, "-v", f"--gpu-name={sm_arch_from_capability(arch)}"]
    command += [] if options.enable_fp_fusion else ["--fmad=false"]
    command += options.ptx_options.split() if options.ptx_options else []
    return _output([*command, "-o", "/dev/null"], kernel.asm["ptx"].encode())
