"""`seqkern evaluate RUN`: scores on the examples that the run did not train on."""

from __future__ import annotations

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
from seqkern.tasks.run import result_path
from seqkern.tasks.training import expect_same_data, restore_job


def evaluate(
    checkpoint: Checkpoint,
    data: Annotated[str | None, typer.Option(help="where the run's data lies now")] = None,
    part: Annotated[str, typer.Option(help="test or dev")] = "test",
    beam: Beam = 4,
    layers: TrainedLayers = None,
    device: Device = "cpu",
) -> None:
    """Print the scores of a run on its test part."""
    with user_errors():
        if part not in ("test", "dev"):
            raise ValueError(f"part must be test or dev, got {part!r}")
        if beam < 1:
            raise ValueError(f"beam must be at least 1, got {beam}")
        expect_device(device)
        path = result_path(checkpoint)
        content = checkpoints.load(path)
        job = restore_job(content, layers, data, device)
        job.expect_data_for(job.spec.task, data or "")
        expect_same_data(path, content, job)
        scores = job.evaluate(part, beam=beam)
    print(f"{job.spec.model} on {job.spec.task}, {part}: {len(job.part(part))} examples")
    for name, value in scores.items():
        print(f"{name:<16} {value:.4f}")
    if job.scorer():
        print(f"by {job.scorer()}")
