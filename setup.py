"""Builds the two extensions: seqkern._C (torch ops, stable ABI) and seqkern._stream (pybind11).

One ninja graph holds both, so that csrc/core is compiled once, on every core, and rebuilt only
where a source, a header or a flag changed. Environment variables:

    SEQKERN_CUDA=auto|0|1    CUDA kernels: where nvcc and a CUDA torch are (default), never, always
    SEQKERN_SANITIZE=address AddressSanitizer build (`make asan`)
    TORCH_CUDA_ARCH_LIST     CUDA targets, as in PyTorch's own extensions
    CXX, MAX_JOBS            compiler and number of parallel jobs
"""

import fcntl
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
# No -march: the kernels carry code for several instruction sets and choose at run time.
CXX_FLAGS = ["-std=c++17", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-Wall"]
CXX_FLAGS += ["-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
# Python 3.11 and torch 2.11: the oldest that one binary of seqkern._C has to load in.
STABLE_ABI_FLAGS = ["-DPy_LIMITED_API=0x030B0000", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
OPTIMISE = {"": ["-O2", "-DNDEBUG"], "address": ["-O1", "-g", "-fsanitize=address"]}
CUDA_ARCHS = "8.0;9.0a;10.0+PTX"
OLDEST_ARCH = 8  # compute capability: cp.async, and tensor cores that take bf16 and TF32
CUDA_SOURCES = ["csrc/torch/*_cuda.cpp", "csrc/core/cuda/*.cu"]


def fail(message: str) -> SystemExit:
    return SystemExit(f"seqkern: {message}")


def choice(name: str, default: str, allowed: list[str]) -> str:
    """The value of an environment variable that must be one of `allowed`."""
    value = os.environ.get(name, "") or default
    if value not in allowed:
        expected = "|".join(a for a in allowed if a)
        raise fail(f"{name} must be one of {expected}, got {value!r}")
    return value


def sources(*patterns: str) -> list[str]:
    found = (path for pattern in patterns for path in ROOT.glob(pattern))
    return sorted(str(path.relative_to(ROOT)) for path in found)


def find_cuda_home() -> Path | None:
    """The toolkit folder that holds bin/nvcc and the runtime's headers."""
    nvcc = shutil.which("nvcc")
    candidates = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    candidates.append(str(Path(nvcc).resolve().parents[1]) if nvcc else None)
    for home in map(Path, filter(None, candidates)):
        if (home / "bin/nvcc").exists() and (home / "include/cuda_runtime.h").exists():
            return home
    return None


def plan_cuda(mode: str, cuda_sources: list[str], torch_cuda: str | None, home: Path | None):
    """Whether to compile the CUDA kernels, and the reason in words."""
    if mode == "0":
        return False, "SEQKERN_CUDA=0"
    if not cuda_sources:
        return False, "csrc/core/cuda holds no .cu file"
    if home is None:
        if mode == "1":
            raise fail("SEQKERN_CUDA=1, but no nvcc was found; install CUDA or set CUDA_HOME")
        return False, "no nvcc was found"
    if mode == "1":
        return True, f"SEQKERN_CUDA=1, {home}/bin/nvcc"
    if torch_cuda is None:
        return False, "this torch is a CPU build; SEQKERN_CUDA=1 compiles them all the same"
    return True, f"torch is built for CUDA {torch_cuda}, {home}/bin/nvcc"


def gencode_flags(arch_list: str) -> list[str]:
    """nvcc's -gencode flags for a list like "8.0;9.0a;10.0+PTX".

    Older cards than the kernels are written for are passed over: containers export long lists.
    """
    flags = []
    for arch in re.split(r"[;,\s]+", arch_list.strip("; ")):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", arch)
        if match is None:
            raise fail(f"TORCH_CUDA_ARCH_LIST: expected items like 9.0a or 8.0+PTX, got {arch!r}")
        if int(match[1]) < OLDEST_ARCH:
            print(f"seqkern: CUDA kernels: not for {arch}, they need {OLDEST_ARCH}.0", flush=True)
            continue
        number = match[1] + match[2] + match[3]
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if match[4]:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    if not flags:
        raise fail(f"TORCH_CUDA_ARCH_LIST: expected {OLDEST_ARCH}.0 or newer in {arch_list!r}")
    return flags


@dataclass
class Toolchain:
    """Programs and flags of one build; `cuda_home` is None where CUDA kernels are left out."""

    cxx: str
    torch_dir: Path
    pybind_include: str
    sanitize: str
    cuda_home: Path | None

    @property
    def cxx_flags(self) -> list[str]:
        return [*CXX_FLAGS, *OPTIMISE[self.sanitize], "-Icsrc"]

    @property
    def torch_flags(self) -> list[str]:
        include = self.torch_dir / "include"
        flags = [*STABLE_ABI_FLAGS, f"-isystem{include}"]
        if self.cuda_home:
            flags += ["-DSEQKERN_WITH_CUDA", "-DUSE_CUDA", f"-isystem{self.cuda_home / 'include'}"]
        return [*flags, f"-isystem{sysconfig.get_paths()['include']}"]

    @property
    def stream_flags(self) -> list[str]:
        return [f"-isystem{self.pybind_include}", f"-isystem{sysconfig.get_paths()['include']}"]

    @property
    def nvcc_flags(self) -> list[str]:
        archs = os.environ.get("TORCH_CUDA_ARCH_LIST", "") or CUDA_ARCHS
        host = "-fPIC,-fvisibility=hidden,-Wall"
        flags = ["-O3", "-std=c++17", "-Icsrc", "-ccbin", self.cxx]
        return [*flags, "-Xcompiler", host, *gencode_flags(archs)]

    @property
    def link_flags(self) -> list[str]:
        return ["-fopenmp", *(["-fsanitize=address"] if self.sanitize else [])]

    @property
    def torch_link_flags(self) -> list[str]:
        flags = [f"-L{self.torch_dir / 'lib'}", "-ltorch_cpu"]
        if self.cuda_home:
            # The binding's CUDA symbols are weak, so the linker would drop libtorch.so, the only
            # way to libtorch_cuda.so, and they would stay null at run time.
            flags += ["-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed"]
            flags += [f"-L{self.cuda_home / 'lib64'}", "-lcudart_static"]
            flags += ["-ldl", "-lrt", "-lpthread"]
        return flags


def find_toolchain() -> Toolchain:
    """Looks for everything the build needs; what is missing ends it with one line."""
    sanitize = choice("SEQKERN_SANITIZE", "", ["", "address"])
    mode = choice("SEQKERN_CUDA", "auto", ["auto", "0", "1"])
    cxx = shutil.which(os.environ.get("CXX", "g++"))
    if cxx is None:
        wanted = os.environ.get("CXX", "g++")
        raise fail(f"no C++ compiler: {wanted!r} was not found; install g++ or set CXX")
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        raise fail("Python.h was not found; install Python's headers (python3-dev)")
    try:
        import pybind11
        import torch
    except ImportError as error:
        raise fail(f"the build needs torch and pybind11 installed first ({error})") from None
    home = find_cuda_home()
    built, reason = plan_cuda(mode, sources("csrc/core/cuda/*.cu"), torch.version.cuda, home)
    print(f"seqkern: CUDA kernels: {'built' if built else 'not built'} ({reason})", flush=True)
    torch_dir = Path(torch.__file__).parent
    return Toolchain(cxx, torch_dir, pybind11.get_include(), sanitize, home if built else None)


class Graph:
    """The lines of a ninja file; every source is compiled at most once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.objects: set[str] = set()
        self.lines = [
            "ninja_required_version = 1.8",
            f"builddir = {folder}",
            "rule compile",
            "  command = $program -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = compile $in",
            "rule link",
            "  command = $program -shared $in -o $out $libraries",
            "  description = link $out",
        ]

    def compile(self, source: str, command: list[str]) -> str:
        target = str(self.folder / f"{source}.o")
        if target not in self.objects:
            self.objects.add(target)
            self._edge("compile", target, [source], program=command)
        return target

    def link(self, target: str, objects: list[str], command: list[str], libraries: list[str]):
        self._edge("link", target, objects, program=command, libraries=libraries)

    def _edge(self, rule: str, target: str, inputs: list[str], **variables: list[str]) -> None:
        def path(name: str) -> str:
            return re.sub(r"([$ :])", r"$\1", name)

        self.lines.append(f"build {path(target)}: {rule} {' '.join(map(path, inputs))}")
        for name, words in variables.items():
            self.lines.append(f"  {name} = {shlex.join(words).replace('$', '$$')}")

    def run(self) -> None:
        # The package's own program first: a venv's folder of programs need not be on the PATH.
        spec = importlib.util.find_spec("ninja")
        folder = importlib.import_module("ninja").BIN_DIR if spec else None
        ninja = shutil.which("ninja", path=folder) if folder else shutil.which("ninja")
        if ninja is None:
            raise fail("ninja was not found; pip install ninja")
        self.folder.mkdir(parents=True, exist_ok=True)
        jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
        with open(self.folder / "lock", "w") as lock:  # two builds at once would share objects
            fcntl.flock(lock, fcntl.LOCK_EX)
            file = self.folder / "build.ninja"
            file.write_text("\n".join(self.lines) + "\n")
            if subprocess.run([ninja, "-f", str(file), "-j", jobs], cwd=ROOT).returncode:
                raise fail("the extensions did not compile; the compiler's messages stand above")


class BuildExtensions(build_ext):
    """Builds every extension through one ninja graph, kept between builds."""

    def build_extensions(self) -> None:
        tools = find_toolchain()
        tag = f"{self.plat_name}-{sys.implementation.cache_tag}"
        folder = Path("build", f"{tools.sanitize or 'release'}-{tag}")
        graph = Graph(folder)
        built = {}
        for extension in self.extensions:
            name = Path(self.get_ext_filename(extension.name)).name
            target = built[extension.name] = str(folder / name)
            files, libraries = list(extension.sources), []
            if extension.name == "seqkern._C":
                libraries = tools.torch_link_flags
                files += sources(*CUDA_SOURCES) if tools.cuda_home else []
            objects = [self.add_source(graph, tools, file) for file in files]
            graph.link(target, objects, [tools.cxx, *tools.link_flags], libraries)
        graph.run()
        for name, target in built.items():
            destination = Path(self.get_ext_fullpath(name))
            destination.parent.mkdir(parents=True, exist_ok=True)
            self.copy_file(str(ROOT / target), str(destination))

    def copy_file(self, infile, outfile, *args, **kwargs):
        """Copies whole files only, and always: one cut short by an interruption would crash whoever
        imports it, and as the newer of the two it would stay."""
        unfinished = f"{outfile}.{os.getpid()}"
        shutil.copy2(infile, unfinished)
        os.replace(unfinished, outfile)
        return outfile, True

    @staticmethod
    def add_source(graph: Graph, tools: Toolchain, source: str) -> str:
        cxx = [tools.cxx, *tools.cxx_flags]
        if source.endswith(".cu"):
            return graph.compile(source, [f"{tools.cuda_home}/bin/nvcc", *tools.nvcc_flags])
        if source.startswith("csrc/torch/"):
            return graph.compile(source, [*cxx, *tools.torch_flags])
        if source.startswith("csrc/stream/"):
            return graph.compile(source, [*cxx, *tools.stream_flags])
        return graph.compile(source, cxx)


def extensions() -> list[Extension]:
    """The extensions whose binding files exist; CUDA sources join when the build decides so."""
    core = sources("csrc/core/cpu/*.cpp")
    ops = [f for f in sources("csrc/torch/*.cpp") if not f.endswith("_cuda.cpp")]
    stream = sources("csrc/stream/*.cpp")
    found = [Extension("seqkern._C", ops + core, py_limited_api=True)] if ops else []
    return found + ([Extension("seqkern._stream", stream + core)] if stream else [])


if __name__ == "__main__":
    setup(
        packages=[*find_packages(include=["seqkern", "seqkern.*"]), "seqkern.kernels"],
        package_dir={"seqkern": "seqkern", "seqkern.kernels": "kernels"},
        package_data={"": ["py.typed", "*.html", "*.json"]},
        ext_modules=extensions(),
        cmdclass={"build_ext": BuildExtensions},
    )
