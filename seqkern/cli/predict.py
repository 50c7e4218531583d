"""`seqkern predict WORD... --checkpoint PATH`: decodes words."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from seqkern.cli.common import Beam, Layers, user_errors
from seqkern.tasks.predictor import Predictor


def predict(
    words: Annotated[list[str], typer.Argument(help="words, or sources in quotes")],
    checkpoint: Annotated[Path, typer.Option(help="checkpoint.pt of a run")] = Path(
        "runs/demo/seqkern/checkpoint.pt"
    ),
    beam: Beam = 4,
    layers: Layers = None,
) -> None:
    """Print each word with its target, a tab between them."""
    with user_errors():
        predictor, _ = Predictor.load(checkpoint, layers)
        sources = [predictor.symbols_of(word) for word in words]
        targets = predictor.decode(sources, beam)
    joint = "" if predictor.task.target_tokens == "chars" else " "
    for word, target in zip(words, targets, strict=True):
        print(f"{word}\t{joint.join(target)}")
