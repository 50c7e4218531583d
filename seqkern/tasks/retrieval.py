"""Associative retrieval: pairs of a letter and a digit, then a letter whose digit is asked for.

"c9k8j3f1??c" asks for 9 (Ba et al., 2016, section 4.1): what a recurrent net has to keep for a
while, and to find by its content. All sequences are generated.
"""

from __future__ import annotations

import random
import string
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqkern.tasks.job import Job, Parts
from seqkern.tasks.registry import build_model
from seqkern.tasks.vocab import Labels, Vocab

KEYS, VALUES, ASK = string.ascii_lowercase, string.digits, "??"


class Question(NamedTuple):
    """A sequence, and the digit that is its answer."""

    text: str
    answer: str


class QuestionBatch(NamedTuple):
    """x (B, T) int64, labels (B,) int64."""

    x: Tensor
    labels: Tensor
    units: int
    rows: int


def questions(count: int, pairs: int, seed: int | str) -> list[Question]:
    """Draws sequences of `pairs` different keys with a digit each, and one of the keys.

    Raises:
        ValueError: count is below 1, or pairs is not in 1 .. 26.
    """
    if count < 1 or not 1 <= pairs <= len(KEYS):
        raise ValueError(
            f"questions need a count of at least 1 and 1 to {len(KEYS)} pairs, "
            f"got {count} and {pairs}"
        )
    draw = random.Random(seed)
    drawn = []
    for _ in range(count):
        keys, values = draw.sample(KEYS, pairs), draw.choices(VALUES, k=pairs)
        asked = draw.randrange(pairs)
        shown = "".join(key + value for key, value in zip(keys, values, strict=True))
        drawn.append(Question(shown + ASK + keys[asked], values[asked]))
    return drawn


class RetrievalJob(Job):
    """FastWeights, or a baseline in its place, on associative retrieval.

    Options of reading: pairs of a sequence; train, dev and test, how many sequences each part
    has. The parts are drawn with the spec's seed; sequences may repeat, as in the paper.
    """

    TASKS: ClassVar[dict[str, str]] = {"retrieval": "generated: c9k8j3f1??c asks for c's digit, 9"}
    WITHOUT_DATA: ClassVar[tuple[str, ...]] = ("retrieval",)
    READING: ClassVar[dict[str, Any]] = {
        "pairs": 4,
        "train": 100_000,
        "dev": 10_000,
        "test": 20_000,
    }
    unit = "sequence"
    score = "error"
    higher = False

    def read(self) -> Parts:
        reading, seed = self.reading, self.spec.seed
        drawn = (
            questions(reading[part], reading["pairs"], f"{seed} {part}") for part in Parts._fields
        )
        return Parts(*drawn)

    def build_vocabs(self) -> dict[str, Any]:
        return {"symbols": Vocab(sorted({*KEYS, *VALUES, *ASK})), "labels": Labels(VALUES)}

    def build_model(self) -> nn.Module:
        sizes = {name: len(self.vocabs[name]) for name in ("symbols", "labels")}
        return build_model(self.spec, **sizes)

    def _x(self, texts: Sequence[str]) -> Tensor:
        return torch.tensor([self.vocabs["symbols"].encode(text) for text in texts])

    def collate(self, examples: list[Question]) -> QuestionBatch:
        x = self._x([question.text for question in examples])
        labels = torch.tensor([self.vocabs["labels"].encode(q.answer) for q in examples])
        return QuestionBatch(x, labels, len(examples), len(examples))

    def length(self, example: Question) -> tuple[int, ...]:
        return (len(example.text),)

    def loss(self, batch: QuestionBatch) -> Tensor:
        return F.cross_entropy(self.model(batch.x).float(), batch.labels)

    @torch.inference_mode()
    def evaluate(self, part: str, *, batch_size: int = 1000, **_: Any) -> dict[str, float]:
        """Nats a sequence, and the share of wrong answers ("error", in [0, 1])."""
        examples = self.part(part)
        self.model.eval()
        nats, wrong = 0.0, 0
        for start in range(0, len(examples), batch_size):
            batch = self.place(self.collate(examples[start : start + batch_size]))
            scores = self.model(batch.x).double()
            nats += F.cross_entropy(scores, batch.labels, reduction="sum").item()
            wrong += int((scores.argmax(-1) != batch.labels).sum())
        return {"loss": nats / len(examples), "error": wrong / len(examples)}

    def scorer(self) -> str:
        return "share of sequences whose best digit is not the one asked for"

    @torch.inference_mode()
    def predict(self, texts: Sequence[str], **_: Any) -> list[str]:
        """The digit that each sequence asks for.

        Raises:
            ValueError: a text is not pairs of a letter and a digit, "??" and a letter.
        """
        self.model.eval()
        answers = []
        for text in texts:
            self.expect_readable(text)
            best = self.model(self._x([text]).to(self.device)).argmax(-1)
            answers.append(self.vocabs["labels"][int(best)])
        return answers

    def expect_readable(self, text: str) -> None:
        shown, ask, key = text[:-3], text[-3:-1], text[-1:]
        keys, values = shown[::2], shown[1::2]
        right = ask == ASK and len(keys) == len(values) > 0 and set(key) <= set(KEYS)
        if not right or not set(keys) <= set(KEYS) or not set(values) <= set(VALUES):
            raise ValueError(f"expected pairs, ?? and a letter, as c9k8??c, got {text!r}")
