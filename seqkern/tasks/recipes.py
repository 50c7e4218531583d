"""What `seqkern reproduce` trains: settings, target and published score of each row."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Recipe:
    """One row of the table of results.

    Args:
        model, task: names of the registry and of the model's job.
        target: the score to reach, in the unit of `score`.
        score: a key of what the job's evaluate returns on `part`.
        published: the score of the paper or of a known reproduction, as text with its setting.
        source: where that stands.
        sizes, reading: of the JobSpec.
        options: keyword arguments of TrainOptions.
        evaluate: options of the job's evaluate, as the beam.
        part: "test", or "dev" where the published score is of the development part.
    """

    model: str
    task: str
    score: str
    target: float
    published: str
    source: str
    sizes: dict[str, Any] = field(default_factory=dict)
    reading: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    evaluate: dict[str, Any] = field(default_factory=dict)
    part: str = "test"


RECIPES: dict[str, Recipe] = {
    "g2p": Recipe(
        "rnnsearch",
        "cmudict",
        score="sequence_error",
        target=0.40,
        published="no paper's split; 0.28 to 0.33 are known of larger models on others",
        source="docs/demo.md",
        evaluate={"beam": 4},
    ),
}
