"""Sentence classification: a label for each sentence, and accuracy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqkern.tasks.batches import pad_sources
from seqkern.tasks.corpora import corpus_folder, needed_file
from seqkern.tasks.iob import read_snips
from seqkern.tasks.job import Alignment, Job, Parts
from seqkern.tasks.labelled import (
    Labelled,
    carve_dev,
    read_clinc150,
    read_csv,
    read_labelled,
    read_parts,
    read_side,
    read_trec,
    split,
    words_of,
)
from seqkern.tasks.libraries import library
from seqkern.tasks.registry import build_model
from seqkern.tasks.vocab import UNKNOWN, Labels, Vocab


class SentenceBatch(NamedTuple):
    """x (B, T) words, lengths (B,), labels (B,); int64. A unit is a sentence."""

    x: Tensor
    lengths: Tensor
    labels: Tensor
    units: int
    rows: int


class WordDrop:
    """Now and then UNKNOWN in place of a word, so that the model learns what to make of one.

    A word seen n times in training is dropped with probability a / (a + n) (Kiperwasser and
    Goldberg, 2016, section 4): mostly rare ones are.

    Args:
        vocab: of the words.
        sentences: the training data's.
        a: 0 for never.
    """

    def __init__(self, vocab: Vocab, sentences: Sequence[tuple[str, ...]], a: float) -> None:
        if not a >= 0:
            raise ValueError(f"unknown must not be negative, got {a}")
        counts = Counter(number for words in sentences for number in vocab.encode(words))
        seen = [counts[number] for number in range(len(vocab))]
        self._a, self._drop = a, torch.tensor([a / (a + n) if n else 0.0 for n in seen])

    def __call__(self, x: Tensor) -> Tensor:
        """x (B, T) with words dropped; the draw is the CPU's on every device."""
        if not self._a:
            return x
        dropped = torch.rand(x.shape) < self._drop[x.cpu()]
        return x.masked_fill(dropped.to(x.device), UNKNOWN)


class ClassifyJob(Job):
    """A model with `forward(x, lengths)` and `loss(x, lengths, labels)` (see models/textcnn.py).

    Options of reading: words, "clean" or "spaces" (see tasks/labelled.py); labels, "coarse" or
    "fine" of trec; out_of_scope, whether clinc150 has its label "oos"; min_count, occurrences of a
    word that is kept; unknown, how often words are dropped in training (see WordDrop).
    """

    TASKS: ClassVar[dict[str, str]] = {
        "labelled": "your file of label<TAB>text lines, split, or a folder of train, dev and test",
        "trec": "questions by what they ask for, as published; a tenth of train is dev",
        "mr": "sentences of film reviews, for or against; 80/10/10 under the seed",
        "subj": "subjective sentences or objective ones; 80/10/10 under the seed",
        "clinc150": "requests to an assistant in 150 intents, as published",
        "banking77": "requests to a bank in 77 intents; a tenth of train is dev",
        "snips": "requests to an assistant in 7 intents, as Goo et al. (2018) split them",
    }
    READING: ClassVar[dict[str, Any]] = {
        "words": "clean",
        "labels": "coarse",
        "out_of_scope": False,
        "min_count": 1,
        "unknown": 0.25,
    }
    OF_TASKS: ClassVar[dict[str, tuple[str, ...]]] = {
        "labels": ("trec",),
        "out_of_scope": ("clinc150",),
    }
    unit = "sentence"
    score = "accuracy"
    higher = True

    def task_reading(self) -> dict[str, Any]:
        return {"words": "spaces"} if self.spec.task == "snips" else {}  # it is tokenised

    def read(self) -> Parts:
        """The sentences in the parts that TASKS says; a random split has none in two of them."""
        return READERS[self.spec.task](self.spec.data, self.reading, self.spec.seed)

    def build_vocabs(self) -> dict[str, Any]:
        train = self.data.train
        return {
            "words": Vocab.build((e.words for e in train), self.reading["min_count"]),
            "labels": Labels.build(e.label for e in train),
        }

    def build_model(self) -> nn.Module:
        return build_model(self.spec, symbols=len(self.words), labels=len(self.labels))

    @property
    def words(self) -> Vocab:
        """Of the words."""
        return self.vocabs["words"]

    @property
    def labels(self) -> Labels:
        """Of the sentences."""
        return self.vocabs["labels"]

    @cached_property
    def _drop(self) -> WordDrop:
        return WordDrop(self.words, [e.words for e in self.data.train], self.reading["unknown"])

    def length(self, example: Labelled) -> tuple[int, ...]:
        return (len(example.words),)

    def collate(self, examples: list[Labelled]) -> SentenceBatch:
        x, lengths = pad_sources([self.words.encode(e.words) for e in examples])
        labels = torch.tensor([self.labels.encode(e.label) for e in examples])
        return SentenceBatch(x, lengths, labels, len(examples), len(examples))

    def loss(self, batch: SentenceBatch) -> Tensor:
        x = self._drop(batch.x) if self.model.training else batch.x
        return self.model.loss(x, batch.lengths, batch.labels)

    def after_step(self) -> None:
        """Applies the model's constraint on its weights, where it has one."""
        if hasattr(self.model, "constrain"):
            self.model.constrain()

    @torch.inference_mode()
    def log_p(self, sentences: Sequence[tuple[str, ...]], rows: int = 256) -> Tensor:
        """log p(label | words) of each sentence, (N, labels) on the CPU.

        Args:
            sentences: words of each, at least one.
            rows: sentences that are computed at a time.
        """
        self.model.eval()
        order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
        log_p = torch.empty(len(order), len(self.labels))
        for start in range(0, len(order), rows):
            chosen = order[start : start + rows]
            x, lengths = pad_sources([self.words.encode(sentences[i]) for i in chosen])
            scores = self.model(x.to(self.device), lengths.to(self.device))
            log_p[chosen] = scores.float().log_softmax(-1).cpu()
        return log_p

    def evaluate(self, part: str, **_: Any) -> dict[str, float]:
        """accuracy, the share of right labels, and loss, the mean of -log p(label) in nats.

        A label that the training data has not is never right, and no part of the loss.
        """
        examples = self.part(part)
        log_p = self.log_p([e.words for e in examples])
        found = [self.labels[i] for i in log_p.argmax(-1).tolist()]
        right = [e.label for e in examples]
        known, left_out = set(self.labels.names), -100
        y = torch.tensor([self.labels.encode(n) if n in known else left_out for n in right])
        metrics = library("sklearn.metrics", "scikit-learn", "accuracy")
        return {
            "accuracy": float(metrics.accuracy_score(right, found)),
            "loss": F.nll_loss(log_p, y, ignore_index=left_out).item(),
        }

    def scorer(self) -> str:
        return "share of right labels (scikit-learn accuracy_score)"

    def predict(self, texts: Sequence[str], **_: Any) -> list[str]:
        """The most probable label of each text.

        Raises:
            ValueError: a text holds no word.
        """
        sentences = [self._words_in(text) for text in texts]
        return [self.labels[i] for i in self.log_p(sentences).argmax(-1).tolist()]

    def expect_readable(self, text: str) -> None:
        self._words_in(text)

    def _words_in(self, text: str) -> tuple[str, ...]:
        if words := words_of(text, self.reading["words"]):
            return words
        raise ValueError(f"cannot classify {text!r}: it holds no word")

    @torch.inference_mode()
    def align(self, text: str) -> Alignment:
        """What each row of a model with attention gives the words. Where every word attends to
        all, these are the rows' names.

        Raises:
            ValueError: the model has no attention, or the text holds no word.
        """
        words = self._words_in(text)
        x, lengths = pad_sources([self.words.encode(words)])
        self.model.eval()
        measure = getattr(self.model, "alignment", None)
        weights = measure(x.to(self.device), lengths.to(self.device)) if measure else None
        if weights is None:
            return super().align(text)
        names = tuple(f"row {n + 1}" for n in range(weights.size(1)))
        by_word = getattr(self.model.config, "kind", "") == "heads"
        return Alignment(words, words if by_word else names, weights[0].cpu())


def _labelled(data: str, reading: dict[str, Any], seed: int) -> Parts:
    if not data:
        raise ValueError("task 'labelled' needs data: a file of label<TAB>text lines, or a folder")
    return read_parts(data, seed, partial(read_labelled, words=reading["words"]), "tsv", "txt")


def _trec(data: str, reading: dict[str, Any], seed: int) -> Parts:
    folder = corpus_folder(data, "trec")
    train, test = (
        read_trec(needed_file(folder, f"{part}.txt"), reading["labels"], reading["words"])
        for part in ("train", "test")
    )
    return carve_dev(train, test, seed)


def _mr(data: str, reading: dict[str, Any], seed: int) -> Parts:
    folder, words = corpus_folder(data, "mr"), reading["words"]
    positive = read_side(needed_file(folder, "rt-polarity.pos"), "positive", words)
    negative = read_side(needed_file(folder, "rt-polarity.neg"), "negative", words)
    return split(positive + negative, seed)


def _subj(data: str, reading: dict[str, Any], seed: int) -> Parts:
    folder, words = corpus_folder(data, "subj"), reading["words"]
    subjective = read_side(needed_file(folder, "quote.tok.gt9.5000"), "subjective", words)
    objective = read_side(needed_file(folder, "plot.tok.gt9.5000"), "objective", words)
    return split(subjective + objective, seed)


def _clinc150(data: str, reading: dict[str, Any], seed: int) -> Parts:
    path = needed_file(corpus_folder(data, "clinc150"), "data_full.json")
    return read_clinc150(path, reading["out_of_scope"], reading["words"])


def _banking77(data: str, reading: dict[str, Any], seed: int) -> Parts:
    folder, words = corpus_folder(data, "banking77"), reading["words"]
    train, test = (
        read_csv(needed_file(folder, f"{part}.csv"), words) for part in ("train", "test")
    )
    return carve_dev(train, test, seed)


def _snips(data: str, reading: dict[str, Any], seed: int) -> Parts:
    def labelled(part: list) -> list[Labelled]:
        return [Labelled(words_of(" ".join(s.words), reading["words"]), s.label) for s in part]

    return Parts(*map(labelled, read_snips(corpus_folder(data, "snips"))))


READERS: dict[str, Callable[[str, dict[str, Any], int], Parts]] = {
    "labelled": _labelled,
    "trec": _trec,
    "mr": _mr,
    "subj": _subj,
    "clinc150": _clinc150,
    "banking77": _banking77,
    "snips": _snips,
}
