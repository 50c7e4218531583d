"""`seqkern evaluate CHECKPOINT`: error rates on the pairs that the run did not train on."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from seqkern.cli.common import Beam, Checkpoint, Layers, user_errors
from seqkern.tasks.predictor import Predictor
from seqkern.tasks.training import expect_same_data


def evaluate(
    checkpoint: Checkpoint,
    data: Annotated[str | None, typer.Option(help="where the run's data lies now")] = None,
    part: Annotated[str, typer.Option(help="test or dev")] = "test",
    beam: Beam = 4,
    layers: Layers = None,
) -> None:
    """Print symbol (phoneme) and sequence (word) error rate on held-out words."""
    with user_errors():
        if part not in ("test", "dev"):
            raise ValueError(f"part must be test or dev, got {part!r}")
        predictor, content = Predictor.load(checkpoint, layers)
        split = replace(predictor.task, data=data or predictor.task.data).load()
        expect_same_data(checkpoint, content, split)
        pairs = getattr(split, part)
        rates = predictor.evaluate(pairs, beam)
        words = len({pair.source for pair in pairs})
    print(f"{part}: {words} words, beam {beam}")
    print(f"symbol error rate   {rates.symbol:.2%}")
    print(f"sequence error rate {rates.sequence:.2%}")
