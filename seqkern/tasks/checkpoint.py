"""Checkpoints: one file, written whole or not at all, loaded without running code from it."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

FORMAT = "seqkern-2"
KEYS = {
    "format",
    "spec",  # keyword arguments of tasks.job.JobSpec
    "data",  # fingerprint of the training examples
    "vocabularies",  # by name
    "options",  # keyword arguments of TrainOptions
    "model",
    "optimizer",
    "step",
    "best",  # fields of training.Best, or None
    "recent",  # weights of the last evaluations, where they are to be averaged
    "random",  # of each process: its random state, and what its job carries
}


def write_atomically(path: Path, write) -> None:
    """Calls write(file) on a temporary neighbour of `path`, then renames it to `path`.

    The bytes are on the disk before the rename, so a crash at any moment leaves the old file or
    the new one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def save(path: Path, content: dict[str, Any]) -> None:
    """Writes a checkpoint; `content` holds KEYS without "format", in plain types and tensors."""
    write_atomically(path, lambda file: torch.save({"format": FORMAT, **content}, file))


def load(path: Path) -> dict[str, Any]:
    """Reads what `save` wrote.

    Raises:
        ValueError: the file is cut short, is not a checkpoint, or is one of another format.
        OSError: the file cannot be read.
    """
    file = io.BytesIO(path.read_bytes())
    try:
        with zipfile.ZipFile(file) as archive:  # torch.load does not compare the checksums
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(f"{damaged} is damaged")
        file.seek(0)
        content = torch.load(file, map_location="cpu", weights_only=True)
    except (zipfile.BadZipFile, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).strip().split("\n")[0][:120]
        raise ValueError(f"{path}: not a whole checkpoint ({reason})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{path}: expected a checkpoint of format {FORMAT!r}, got {found!r}")
    if missing := KEYS - content.keys():
        raise ValueError(f"{path}: the checkpoint lacks {sorted(missing)}")
    return content
