"""The records of a run: a line of JSON for each case, in the file of --records at once, so that a
run that hangs later, or is ended, leaves them behind."""

import json
import time
from pathlib import Path

import pytest

START = time.monotonic()


def keep(config: pytest.Config, record: dict) -> None:
    """Adds a record to the file, where there is one."""
    if config.option.records:
        with Path(config.option.records).open("a") as file:
            file.write(json.dumps(record, separators=(",", ":")) + "\n")


def leave_out(config: pytest.Config, record: dict, reason: str) -> None:
    """Ends a test whose case is not timed, with a record that says why."""
    keep(config, record | {"left_out": reason})
    pytest.skip(reason)


def leave_out_if_late(config: pytest.Config, record: dict) -> None:
    """The same for a case that begins after the seconds of --within."""
    if time.monotonic() - START > config.option.within:
        leave_out(config, record, f"not begun within {config.option.within:g} s")


def load(path: Path) -> list[dict]:
    """The records of such a file, of pytest-benchmark's JSON, or of a file of results/."""
    text = path.read_text()
    if path.suffix != ".json":
        return [json.loads(line) for line in text.splitlines()]
    data = json.loads(text)
    return data["records"] if "records" in data else [b["extra_info"] for b in data["benchmarks"]]
