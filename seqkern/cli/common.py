"""What the commands share: their errors, their progress bar and their kinds of option."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

USER_ERROR, INTERRUPTED = 2, 130

Checkpoint = Annotated[Path, typer.Argument(help="folder of a run, or a checkpoint in it")]
Data = Annotated[
    str,
    typer.Option(help="folder of the corpora, or your file; none for generated data and cmudict"),
]
Device = Annotated[str, typer.Option(help="cpu, or cuda")]
Beam = Annotated[int, typer.Option(help="hypotheses kept, where a model decodes; 1 is greedy")]
Layers = Annotated[
    str | None, typer.Option(help="layers of the model: seqkern or torch; seqkern for a new run")
]
TrainedLayers = Annotated[
    str | None, typer.Option(help="layers of the model: seqkern or torch; else as it was trained")
]


@contextmanager
def user_errors() -> Iterator[None]:
    """Ends the command with one line on what is wrong with its input, and status 2."""
    try:
        yield
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"seqkern: {error}", file=sys.stderr)
        raise typer.Exit(USER_ERROR) from error


def expect_device(name: str) -> None:
    """Raises ValueError where models cannot be on the device of that name."""
    try:
        kind = torch.device(name).type
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # the latter where CUDA was not compiled in
        reason = str(error).split("\n")[0]
        raise ValueError(f"device must be one that is here, got {name!r}: {reason}") from error
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda, got {name!r}")


def progress_bar(disable: bool = False) -> Progress:
    """A bar with name, steps done, the last loss and the time left; or none."""
    return Progress(
        TextColumn("{task.description:>8}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]:>12}"),
        TimeRemainingColumn(),
        disable=disable,
    )
