"""Pre-training on sentences without labels, then fine-tuning on the few that have one."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from functools import cached_property
from typing import Any, ClassVar

from torch import Tensor

from seqkern.tasks.batches import Batches, Stream
from seqkern.tasks.classify import ClassifyJob, SentenceBatch
from seqkern.tasks.job import Parts, hash_of
from seqkern.tasks.labelled import Labelled
from seqkern.tasks.vocab import Vocab


class UnlabelledBatch(SentenceBatch):
    """Sentences to learn the language from; `labels` is not read, and a unit is a word."""


class FineTuneJob(ClassifyJob):
    """A model with `language_loss` too (see models/pretrained.py).

    Options of reading besides ClassifyJob's: share, of the training sentences of each label that
    keep their label, the others being text alone; pretrain, steps of a first phase that learns the
    language from the text of all of them, 0 for none.
    """

    READING: ClassVar[dict[str, Any]] = ClassifyJob.READING | {"share": 0.1, "pretrain": 1000}

    @cached_property
    def _all(self) -> Parts:
        return super().read()

    def check_reading(self) -> None:
        if not 0 < self.reading["share"] <= 1:
            raise ValueError(f"share must be in (0, 1], got {self.reading['share']}")
        if self.reading["pretrain"] < 0:
            raise ValueError(f"pretrain must not be negative, got {self.reading['pretrain']}")

    def read(self) -> Parts:
        """The parts, of which "train" is what keeps its label."""
        by_label = defaultdict(list)
        for example in self._all.train:
            by_label[example.label].append(example)
        draw, kept = random.Random(self.spec.seed), []
        for _, examples in sorted(by_label.items()):
            kept += draw.sample(examples, math.ceil(self.reading["share"] * len(examples)))
        return self._all._replace(train=kept)

    def build_vocabs(self) -> dict[str, Any]:
        words = Vocab.build((e.words for e in self._all.train), self.reading["min_count"])
        return super().build_vocabs() | {"words": words}

    @property
    def first_phase(self) -> int:
        return self.reading["pretrain"]

    def first_batches(self, batch_size: int, seed: int) -> Stream:
        return Batches(self._all.train, self._text, self.length, batch_size, seed)

    def fingerprint(self) -> str:
        """Of all training sentences, those that are text alone among them."""
        return hash_of([*self.data.train, *self._all.train])

    def _text(self, examples: list[Labelled]) -> UnlabelledBatch:
        batch = self.collate([e._replace(label=self.labels[0]) for e in examples])
        return UnlabelledBatch(*batch[:3], units=int(batch.lengths.sum()), rows=batch.rows)

    def loss(self, batch: SentenceBatch) -> Tensor:
        if isinstance(batch, UnlabelledBatch):
            return self.model.language_loss(batch.x, batch.lengths)
        return super().loss(batch)
