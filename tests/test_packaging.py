"""The build and what comes out of it: the wheel, its clean install, the messages of setup.py."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
KERNELS = sorted(f"seqkern/kernels/{p.name}" for p in (ROOT / "kernels").glob("*.py"))

CORE = "int seqkern_answer() { return 42; }\n"
MODULE = """
#include <Python.h>
int seqkern_answer();
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() {
  static PyModuleDef def = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  PyObject* module = PyModule_Create(&def);
  PyModule_AddIntConstant(module, "answer", seqkern_answer());
  return module;
}
"""
CUDA = """
#include <cuda_runtime.h>
__global__ void twice(float* x) { x[threadIdx.x] *= 2; }
extern "C" int seqkern_twice(float* x) { twice<<<1, 32>>>(x); return cudaGetLastError(); }
"""

SMOKE = """
import sys, torch, seqkern, seqkern.kernels, seqkern._C, seqkern._stream
from seqkern.nn import LSTM
assert seqkern.__file__.startswith(sys.prefix), seqkern.__file__
torch.manual_seed(0)
theirs = torch.nn.LSTM(5, 7, num_layers=2, bidirectional=True)
ours = LSTM(5, 7, num_layers=2, bidirectional=True)
ours.load_state_dict(theirs.state_dict())
x = torch.randn(11, 3, 5)
for got, want in zip(ours(x)[1], theirs(x)[1]):
    torch.testing.assert_close(got, want)
torch.testing.assert_close(ours(x)[0], theirs(x)[0])
"""


def run(*command, cwd, **env) -> subprocess.CompletedProcess[str]:
    # As from a shell: a make or a pytest around this one would change how the inner one behaves.
    outer = ("MAKE", "MFLAGS", "PYTEST_")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(outer)}
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**clean, **env},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def load_setup():
    spec = importlib.util.spec_from_file_location("seqkern_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def small_project(tmp_path: Path) -> Path:
    """This project's setup.py over sources that compile in a second."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels")
    (tmp_path / "seqkern").mkdir()
    (tmp_path / "seqkern/__init__.py").write_text('__version__ = "0"\n')
    for name, text in (("torch/module.cpp", MODULE), ("core/cpu/core.cpp", CORE)):
        path = tmp_path / "csrc" / name
        path.parent.mkdir(parents=True)
        path.write_text(text)
    return tmp_path


@pytest.fixture
def small_cuda_project(small_project: Path) -> Path:
    path = small_project / "csrc/core/cuda/twice.cu"
    path.parent.mkdir()
    path.write_text(CUDA)
    return small_project


def build(project: Path, **env) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, "setup.py", "build_ext", "--inplace", cwd=project, **env)


def test_build_says_that_cuda_is_switched_off(small_cuda_project):
    done = build(small_cuda_project, SEQKERN_CUDA="0")
    assert done.returncode == 0, done.stderr
    assert "seqkern: CUDA kernels: not built (SEQKERN_CUDA=0)" in done.stdout.splitlines()
    answer = run(
        sys.executable, "-c", "import torch, seqkern._C as m; print(m.answer)",
        cwd=small_cuda_project,
    )  # fmt: skip
    assert answer.stdout == "42\n", answer.stderr


def test_a_copy_that_was_cut_short_does_not_stay(small_project):
    """It is newer than what it is a copy of, and whoever imports it crashes."""
    assert build(small_project, SEQKERN_CUDA="0").returncode == 0
    (extension,) = (small_project / "seqkern").glob("_C*.so")
    whole = extension.read_bytes()
    extension.write_bytes(whole[: len(whole) // 2])
    assert build(small_project, SEQKERN_CUDA="0").returncode == 0
    assert extension.read_bytes() == whole
    assert [extension] == list((small_project / "seqkern").glob("_C*"))


def test_build_says_why_it_decided_about_cuda(small_cuda_project):
    done = build(small_cuda_project)
    assert done.returncode == 0, done.stderr
    lines = [x for x in done.stdout.splitlines() if x.startswith("seqkern: CUDA kernels: ")]
    assert len(lines) == 1
    assert "built (" in lines[0]


@pytest.mark.skipif(load_setup().find_cuda_home() is None, reason="no nvcc on this machine")
def test_build_compiles_cuda_on_demand(small_cuda_project):
    done = build(small_cuda_project, SEQKERN_CUDA="1", TORCH_CUDA_ARCH_LIST="8.0+PTX")
    assert done.returncode == 0, done.stderr
    assert "seqkern: CUDA kernels: built (SEQKERN_CUDA=1" in done.stdout
    library = next((small_cuda_project / "seqkern").glob("_C*.so"))
    assert b"seqkern_twice" in library.read_bytes()


CUDA_OPS = """
import torch, seqkern._C
has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
for op in ("recurrent_block", "recurrent_block_backward", "recurrent_step"):
    assert has_kernel(f"seqkern::{op}", "CUDA")
ops = torch.ops.seqkern
# No driver at all is one that is older than the CUDA of the build.
assert ops.recurrent_step_built(0) == torch.cuda.is_available()
try:
    assert ops.recurrent_block_room("LSTM", "16 bit", 64, False, 0)
except RuntimeError as error:
    assert not torch.cuda.is_available() and "cuda:0 does not say" in str(error)
x = torch.zeros(2, 16)
try:
    torch.ops.seqkern.recurrent_block(
        x, None, x[None], x[None], [x], [], [], "LSTM", False, False
    )
except NotImplementedError as error:
    assert "'CPU' backend" in str(error)
else:
    raise AssertionError("a tensor on the CPU was taken")
"""


@pytest.mark.skipif(load_setup().find_cuda_home() is None, reason="no nvcc on this machine")
def test_the_cuda_kernels_load_where_torch_has_no_cuda(small_project):
    """The kernels and the binding as they ship, for one card, since each takes half a minute."""
    shutil.copytree(ROOT / "csrc/core/cuda", small_project / "csrc/core/cuda")
    for name in (
        "core/recurrent.h",
        "core/cpu/types.h",
        "torch/arguments.h",
        "torch/cuda_stream.h",
    ):
        shutil.copy(ROOT / "csrc" / name, small_project / "csrc" / name)
    for binding in (ROOT / "csrc/torch").glob("*_cuda.cpp"):
        shutil.copy(binding, small_project / "csrc/torch")
    done = build(small_project, SEQKERN_CUDA="1", TORCH_CUDA_ARCH_LIST="8.0")
    assert done.returncode == 0, done.stdout + done.stderr
    loaded = run(sys.executable, "-c", CUDA_OPS, cwd=small_project)
    assert loaded.returncode == 0, loaded.stderr


def test_cuda_on_demand_without_sources_is_said(small_project):
    done = build(small_project, SEQKERN_CUDA="1")
    assert done.returncode == 0, done.stderr
    line = "seqkern: CUDA kernels: not built (csrc/core/cuda holds no .cu file)"
    assert line in done.stdout.splitlines()


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"SEQKERN_CUDA": "yes"}, "SEQKERN_CUDA must be one of auto|0|1, got 'yes'"),
        ({"SEQKERN_SANITIZE": "thread"}, "SEQKERN_SANITIZE must be one of address, got 'thread'"),
        ({"CXX": "no-such-compiler"}, "no C++ compiler: 'no-such-compiler' was not found"),
    ],
)
def test_build_refuses_in_one_line(small_project, env, message):
    done = build(small_project, **env)
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1].startswith(f"seqkern: {message}")
    assert "Traceback" not in done.stderr


def test_cuda_plan():
    plan_cuda = load_setup().plan_cuda
    home = Path("/cuda")
    assert plan_cuda("auto", ["a.cu"], "13.0", home)[0] is True
    assert plan_cuda("auto", ["a.cu"], None, home)[0] is False
    assert plan_cuda("auto", ["a.cu"], "13.0", None) == (False, "no nvcc was found")
    assert plan_cuda("auto", [], "13.0", home)[0] is False
    assert plan_cuda("1", ["a.cu"], None, home)[0] is True
    assert plan_cuda("0", ["a.cu"], "13.0", home) == (False, "SEQKERN_CUDA=0")
    with pytest.raises(SystemExit, match="SEQKERN_CUDA=1, but no nvcc was found"):
        plan_cuda("1", ["a.cu"], "13.0", None)


def test_cuda_architectures():
    flags = load_setup().gencode_flags
    assert flags("8.0;9.0a+PTX") == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_90a,code=compute_90a",
    ]
    assert flags("8.0 10.0") == flags("8.0;10.0;") == flags("8.0, 10.0")
    with pytest.raises(SystemExit, match=r"expected items like 9.0a or 8.0\+PTX, got 'hopper'"):
        flags("8.0;hopper")


def test_older_architectures_are_passed_over(capsys):
    flags = load_setup().gencode_flags
    assert flags("6.1;7.5+PTX;8.0") == flags("8.0")
    assert "not for 7.5+PTX, they need 8.0" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"expected 8.0 or newer in '7.0 7.5'"):
        flags("7.0 7.5")


def test_kernels_package_refuses_another_name():
    path = ROOT / "kernels/__init__.py"
    spec = importlib.util.spec_from_file_location("kernels", path)
    assert spec is not None
    assert spec.loader is not None
    with pytest.raises(ImportError, match=re.escape(f"'kernels': {ROOT} must not be on sys.path")):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert importlib.import_module("seqkern.kernels").__file__ == str(path)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the tree; the objects compiled already travel with it."""
    project = tmp_path_factory.mktemp("project")
    names = run(
        "git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT
    ).stdout.split("\0")
    files = [ROOT / name for name in names if name]
    files += [p for d in ROOT.glob("build/release-*") for p in d.rglob("*")]
    for file in filter(Path.is_file, files):
        target = project / file.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(file, target)
    done = run(
        sys.executable, "-m", "pip", "wheel", ".", "--no-build-isolation", "--no-deps",
        "--wheel-dir", "dist", cwd=project,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return next((project / "dist").glob("seqkern-*.whl"))


@pytest.mark.xdist_group("wheel")
def test_wheel_holds_everything(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    modules = [str(p.relative_to(ROOT)) for p in (ROOT / "seqkern").rglob("*.py")]
    table = "seqkern/ops/recurrent_cudnn.json"
    assert {*modules, *KERNELS, "seqkern/py.typed", table} <= set(names)
    assert sorted(n for n in names if n.endswith(".py")) == sorted({*modules, *KERNELS})
    libraries = sorted(n.partition(".")[0] for n in names if n.endswith(".so"))
    assert libraries == ["seqkern/_C", "seqkern/_stream"]
    assert "seqkern/_C.abi3.so" in names
    assert any(n.endswith("licenses/LICENSE") for n in names)


@pytest.mark.xdist_group("wheel")
def test_wheel_installs_and_runs_elsewhere(wheel, tmp_path):
    # The packages that the wheel needs come from this environment by a .pth line, which does not
    # run the .pth files of that folder: its own seqkern stays out of sight.
    clean = tmp_path / "venv"
    venv.create(clean)
    python = clean / "bin/python"
    site = run(python, "-c", "import site; print(site.getsitepackages()[0])", cwd=tmp_path)
    Path(site.stdout.strip(), "packages.pth").write_text(sysconfig.get_path("purelib") + "\n")
    absent = run(python, "-c", "import torch, seqkern", cwd=tmp_path)
    assert "No module named 'seqkern'" in absent.stderr
    done = run(
        sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index",
        wheel, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    smoke = run(python, "-W", "error", "-c", SMOKE, cwd=tmp_path, OMP_NUM_THREADS="1")
    assert smoke.returncode == 0, smoke.stderr
    doctor = run(clean / "bin/seqkern", "doctor", cwd=tmp_path)
    assert doctor.returncode == 0, doctor.stderr
    assert "seqkern::recurrent" in doctor.stdout


GPU_PARTS = (
    "build", "test", "sanitize", "bench-attention", "bench-additive", "bench-recurrent"
)  # fmt: skip


def test_gpu_script_runs_dry(tmp_path):
    script, out = ROOT / "benchmarks/gpu.sh", tmp_path / "out"
    done = run(script, "--dry-run", out, cwd=tmp_path, PYTHON=sys.executable)
    assert done.returncode == 0, done.stdout + done.stderr
    for part in GPU_PARTS:
        result = json.loads((out / f"{part}.json").read_text())
        assert result["status"] in {"passed", "nothing selected"}, part
        assert result["dry_run"] is True
    measured = json.loads((out / "lstm-f32-inference-step.json").read_text())
    assert measured["benchmarks"]
    assert "decode-full" in (out / "bench-attention.log").read_text()
    assert "of the tanh rate" in (out / "bench-additive.log").read_text()
    assert "A dry run" in (out / "bench-recurrent.log").read_text()
    assert (out / "recurrent_cudnn.json").read_text() == "[]\n"
    done = run(
        script, "--dry-run", out, "bench-recurrent=2/12", cwd=tmp_path, PYTHON=sys.executable
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((out / "bench-recurrent-2-of-12.json").read_text())["counts"]["tests"] == 2
    assert len((out / "recurrent-2-of-12.jsonl").read_text().splitlines()) == 2
    assert "seqkern::recurrent " in (out / "build.log").read_text()

    # A part that is out of time still has the report of its tests.
    (tmp_path / "endless.py").write_text(
        "import time\ndef pytest_runtest_setup():\n    time.sleep(600)\n"
    )
    done = run(
        script, "--dry-run", out, "bench-attention", cwd=tmp_path, PYTHON=sys.executable,
        PYTHONPATH=str(tmp_path), PYTEST_ADDOPTS="-p endless", LIMIT="25",
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    result = json.loads((out / "bench-attention.json").read_text())
    assert result["status"] == "out of time"
    assert "counts" in result


def test_gpu_script_refuses_an_unknown_part(tmp_path):
    for part in ("everything", "bench-recurrent=0/3", "bench-recurrent=1/2/3"):
        done = run(ROOT / "benchmarks/gpu.sh", tmp_path, part, cwd=tmp_path)
        assert done.returncode == 2, part
        assert all(part in done.stderr for part in GPU_PARTS)


@pytest.fixture
def bare_path(tmp_path: Path) -> Path:
    """A PATH folder with a shell's needs and a compiler, and no Python."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("bash", "find", "g++"):
        (folder / name).symlink_to(shutil.which(name) or f"{name} is missing")
    shutil.copy(ROOT / "Makefile", tmp_path)
    return folder


def make(folder: Path) -> str:
    program = shutil.which("make")
    assert program
    done = run(program, ".venv/bin/python", cwd=folder.parent, PATH=str(folder), CXX="g++")
    assert done.returncode != 0
    return done.stdout.strip()


def test_make_says_that_python_is_missing(bare_path):
    assert make(bare_path).startswith("seqkern: no Python 3.11 or later")


def test_make_says_that_the_compiler_is_missing(bare_path):
    (bare_path / "g++").unlink()
    assert make(bare_path).startswith("seqkern: no C++ compiler")
