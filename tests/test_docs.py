"""Every Python block of the README and of the documentation runs as it stands."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks() -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        for number, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.S)):
            found.append((f"{page.relative_to(ROOT)}-{number}", code))
    return found


@pytest.mark.parametrize(("name", "code"), blocks(), ids=[name for name, _ in blocks()])
def test_block_runs(name, code):
    exec(compile(code, name, "exec"), {"__name__": "__main__"})


def test_links_between_pages_exist():
    missing = []
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#]+?\.md)\)", page.read_text()):
            missing += [f"{page.name}: {link}"] * (not (page.parent / link).exists())
    assert not missing


def test_the_table_of_results_is_that_of_the_result_files():
    done = subprocess.run(
        [sys.executable, "-P", "-m", "benchmarks.models_table"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    page = (ROOT / "docs" / "models.md").read_text()
    shown = page.split("<!-- results -->")[1].split("<!-- end of results -->")[0]
    assert shown.strip() == done.stdout.strip()
