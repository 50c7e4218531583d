"""`seqkern predict TEXT... --checkpoint RUN` and `seqkern translate RUN`: answers for texts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from seqkern.cli.common import (
    Beam,
    Checkpoint,
    Device,
    TrainedLayers,
    expect_device,
    user_errors,
)
from seqkern.tasks import checkpoint as checkpoints
from seqkern.tasks.job import Job
from seqkern.tasks.lines import blank, lines_of, read_lines
from seqkern.tasks.run import result_path
from seqkern.tasks.training import restore_job


def load_job(path: Path, layers: str | None = None, device: str = "cpu") -> Job:
    """The trained job of a run's folder or of a checkpoint."""
    expect_device(device)
    return restore_job(checkpoints.load(result_path(path)), layers, device=device)


def predict(
    texts: Annotated[list[str], typer.Argument(help="words, or texts in quotes")],
    checkpoint: Annotated[Path, typer.Option(help="folder of a run, or a checkpoint")] = Path(
        "runs/demo/seqkern"
    ),
    beam: Beam = 4,
    layers: TrainedLayers = None,
    device: Device = "cpu",
) -> None:
    """Print each text with the model's answer, a tab between them."""
    with user_errors():
        answers = load_job(checkpoint, layers, device).predict(texts, beam=beam)
    for text, answer in zip(texts, answers, strict=True):
        print(f"{text}\t{answer}")


def translate(
    checkpoint: Checkpoint,
    source: Annotated[
        Path | None, typer.Argument(help="a text a line; standard input where it is left out")
    ] = None,
    beam: Beam = 4,
    layers: TrainedLayers = None,
    device: Device = "cpu",
) -> None:
    """Print the model's answer to each line of a file, a line each; an empty line stays one."""
    with user_errors():
        name = "standard input" if source is None else str(source)
        lines = list(read_lines(source) if source else lines_of(sys.stdin.buffer.read(), name))
        asked = [(number, line) for number, line in lines if not blank(line)]
        answers = iter(
            _answers(load_job(checkpoint, layers, device), name, asked, beam) if asked else []
        )
    for _, line in lines:
        print("" if blank(line) else next(answers))


def _answers(job: Job, name: str, lines: list[tuple[int, str]], beam: int) -> list[str]:
    """The answers to the numbered lines of a file; a ValueError says which one has none."""
    for number, line in lines:
        try:
            job.expect_readable(line)
        except ValueError as error:
            raise ValueError(f"{name}:{number}: {error}") from error
    return job.predict([line for _, line in lines], beam=beam)
