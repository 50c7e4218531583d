"""Tagging: a tag for each word of a sentence, and with JointJob an intent for the whole of it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqkern.models.tagger import Spellings
from seqkern.tasks.batches import pad, pad_sources
from seqkern.tasks.classify import WordDrop
from seqkern.tasks.conllu import read_conllu
from seqkern.tasks.corpora import corpus_folder, part_file
from seqkern.tasks.iob import TaggedSentence, read_columns, read_snips, read_triples
from seqkern.tasks.job import Job, JobSpec, Parts
from seqkern.tasks.labelled import carve_dev, read_parts
from seqkern.tasks.libraries import library
from seqkern.tasks.registry import build_model
from seqkern.tasks.vocab import Labels, Vocab

SCORES = ("slot_f1", "accuracy")
OF_PHRASES = ("iob", "slots", "snips")  # tasks whose tags are IOB


class TagBatch(NamedTuple):
    """Sentences in numbers, int64.

    x: (B, T) words; lengths: (B,); y: (B, T) tags, 0 past the end; labels: (B,) intents, 0 where
    there are none; letters, letter_lengths, word: see models.tagger.Spellings, of no size where
    the model has none.
    """

    x: Tensor
    lengths: Tensor
    y: Tensor
    labels: Tensor
    letters: Tensor
    letter_lengths: Tensor
    word: Tensor
    units: int
    rows: int

    @property
    def spellings(self) -> Spellings | None:
        """The words by letter, where the model reads them."""
        if not self.letters.numel():
            return None
        return Spellings(self.letters, self.letter_lengths, self.word)


def spell(sentences: Sequence[tuple[str, ...]], letters: Vocab) -> Spellings:
    """The different words of sentences, each once, and where they stand."""
    number: dict[str, int] = {}
    rows = [[number.setdefault(word, len(number)) for word in words] for words in sentences]
    return Spellings(*pad_sources([letters.encode(word) for word in number]), pad(rows, 0))


class TaggingJob(Job):
    """models.tagger.BiLSTMTagger on sentences whose words have tags.

    Options of reading: spellings, whether the model reads words by letter too; lower, whether
    words (not their letters) are read in lower case; min_count, occurrences of a word that is
    kept; unknown, how often words are dropped in training (see classify.WordDrop); score,
    "slot_f1" where tags are IOB or IOBES of phrases (as those of OF_PHRASES), "accuracy" where
    each stands for itself.
    """

    TASKS: ClassVar[dict[str, str]] = {
        "iob": "your file of a word and its tag a line, split, or a folder of train, dev and test",
        "slots": "your folder of train, dev and test .seq.in, .seq.out, .label: words, tags, label",
        "conllu": "universal parts of speech of your CoNLL-U file, split, or folder of such files",
        "ewt-upos": "universal parts of speech of the English Web Treebank, as published",
        "snips": "slots of requests to an assistant, as Goo et al. (2018) split them",
    }
    READING: ClassVar[dict[str, Any]] = {
        "spellings": False,
        "lower": True,
        "min_count": 1,
        "unknown": 0.25,
        "score": "accuracy",
    }
    unit = "word"
    higher = True

    def __init__(
        self, spec: JobSpec, vocabularies: dict[str, dict[str, Any]] | None = None
    ) -> None:
        super().__init__(spec, vocabularies)
        self.score = self.reading["score"]

    def task_reading(self) -> dict[str, Any]:
        return {"score": "slot_f1" if self.spec.task in OF_PHRASES else "accuracy"}

    def check_reading(self) -> None:
        if self.reading["score"] not in SCORES:
            raise ValueError(f"score must be one of {SCORES}, got {self.reading['score']!r}")

    def read(self) -> Parts:
        """The sentences in the parts that TASKS says."""
        spec = self.spec
        if spec.task == "iob":
            return _iob(spec.data, spec.seed, phrases=self.reading["score"] == "slot_f1")
        return READERS[spec.task](spec.data, spec.seed)

    def build_vocabs(self) -> dict[str, Any]:
        train = self.data.train
        vocabs = {
            "words": Vocab.build(
                (self.known_as(s.words) for s in train), self.reading["min_count"]
            ),
            "tags": Labels.build(tag for s in train for tag in s.tags),
        }
        if self.reading["spellings"]:
            vocabs["letters"] = Vocab.build(word for s in train for word in s.words)
        return vocabs

    def build_model(self) -> nn.Module:
        letters = self.vocabs.get("letters")
        return build_model(
            self.spec,
            symbols=len(self.words),
            tags=len(self.tags),
            letters=0 if letters is None else len(letters),
            intents=self.intents(),
        )

    def intents(self) -> int:
        """Classes of sentences, 0 for none."""
        return 0

    @property
    def words(self) -> Vocab:
        """Of the words."""
        return self.vocabs["words"]

    @property
    def tags(self) -> Labels:
        """Of the words' tags."""
        return self.vocabs["tags"]

    def known_as(self, words: tuple[str, ...]) -> tuple[str, ...]:
        """The words as the vocabulary has them."""
        return tuple(word.lower() for word in words) if self.reading["lower"] else words

    @cached_property
    def _drop(self) -> WordDrop:
        known = [self.known_as(s.words) for s in self.data.train]
        return WordDrop(self.words, known, self.reading["unknown"])

    def length(self, example: TaggedSentence) -> tuple[int, ...]:
        return (len(example.words),)

    def collate(self, examples: list[TaggedSentence]) -> TagBatch:
        y = pad([[self.tags.encode(tag) for tag in s.tags] for s in examples], 0)
        batch = self.question([s.words for s in examples])._replace(y=y)
        return batch._replace(units=int(batch.lengths.sum()))

    def question(self, sentences: Sequence[tuple[str, ...]]) -> TagBatch:
        """A batch without answers, for sentences of at least one word."""
        x, lengths = pad_sources([self.words.encode(self.known_as(words)) for words in sentences])
        letters, none = self.vocabs.get("letters"), torch.empty(0, dtype=torch.int64)
        spelt = Spellings(none, none, none) if letters is None else spell(sentences, letters)
        n = len(sentences)
        return TagBatch(x, lengths, torch.zeros_like(x), torch.zeros_like(lengths), *spelt, n, n)

    def losses(self, batch: TagBatch) -> tuple[Tensor, Tensor | None]:
        """-log p(y | x) of each sentence, and the scores of the intents."""
        x = self._drop(batch.x) if self.model.training else batch.x
        return self.model.losses(x, batch.lengths, batch.y, batch.spellings)

    def loss(self, batch: TagBatch) -> Tensor:
        """Mean of -log p over the words; of a CRF, -log p of the sentences over their words."""
        return self.losses(batch)[0].sum() / batch.lengths.sum()

    def decode(
        self, sentences: Sequence[tuple[str, ...]], rows: int = 128
    ) -> tuple[list[list[str]], list[int]]:
        """The most probable tags of each sentence, and its intent where the model has any.

        Args:
            sentences: words of each, at least one.
            rows: sentences that are computed at a time.
        """
        self.model.eval()
        order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
        tags: list[list[str]] = [[]] * len(order)
        intents = [0] * len(order)
        for start in range(0, len(order), rows):
            chosen = order[start : start + rows]
            batch = self.place(self.question([sentences[i] for i in chosen]))
            found, of_sentences = self.model.decode(batch.x, batch.lengths, batch.spellings)
            for place, i in enumerate(chosen):
                tags[i] = [self.tags[tag] for tag in found[place]]
                intents[i] = of_sentences[place] if of_sentences else 0
        return tags, intents

    def evaluate(self, part: str, **_: Any) -> dict[str, float]:
        """accuracy, the share of words with the right tag; and of phrases slot_f1 (seqeval)."""
        sentences = self.part(part)
        found = self.decode([s.words for s in sentences])[0]
        return self.scores_of([list(s.tags) for s in sentences], found)

    def scores_of(self, right: list[list[str]], found: list[list[str]]) -> dict[str, float]:
        """The scores of tags; see `evaluate`."""
        sklearn = library("sklearn.metrics", "scikit-learn", "accuracy")
        flat = ([tag for tags in both for tag in tags] for both in (right, found))
        scores = {"accuracy": float(sklearn.accuracy_score(*flat))}
        if self.score == "slot_f1":
            metrics = library("seqeval.metrics", "seqeval", "F1 of phrases")
            scores["slot_f1"] = float(metrics.f1_score(right, found, zero_division=0))
        return scores

    def scorer(self) -> str:
        by_phrase = "F1 of phrases (seqeval, micro average) and "
        return (by_phrase if self.score == "slot_f1" else "") + "share of right tags (scikit-learn)"

    def predict(self, texts: Sequence[str], **_: Any) -> list[str]:
        """The tags of each text, whose words white space separates, with a space between.

        Raises:
            ValueError: a text holds no word.
        """
        return [" ".join(tags) for tags in self.decode(self.cut(texts))[0]]

    def expect_readable(self, text: str) -> None:
        self.cut([text])

    def cut(self, texts: Sequence[str]) -> list[tuple[str, ...]]:
        """The words of each text, at least one."""
        for text in texts:
            if not text.split():
                raise ValueError(f"cannot tag {text!r}: it holds no word")
        return [tuple(text.split()) for text in texts]


class JointJob(TaggingJob):
    """Slots and intent together; `predict` gives the intent, a tab and the tags."""

    TASKS: ClassVar[dict[str, str]] = {
        "slots": TaggingJob.TASKS["slots"],
        "snips": "intent and slots of requests to an assistant, as Goo et al. (2018) split them",
    }
    unit = "sentence"

    def build_vocabs(self) -> dict[str, Any]:
        labels = Labels.build(s.label for s in self.data.train)
        return {**super().build_vocabs(), "labels": labels}

    @property
    def labels(self) -> Labels:
        """Of the sentences."""
        return self.vocabs["labels"]

    def intents(self) -> int:
        return len(self.labels)

    def collate(self, examples: list[TaggedSentence]) -> TagBatch:
        labels = torch.tensor([self.labels.encode(s.label) for s in examples])
        return super().collate(examples)._replace(labels=labels, units=len(examples))

    def loss(self, batch: TagBatch) -> Tensor:
        """Mean of -log p(tags) - log p(intent) over the sentences."""
        of_tags, intents = self.losses(batch)
        assert intents is not None
        return of_tags.mean() + F.cross_entropy(intents, batch.labels)

    def evaluate(self, part: str, **_: Any) -> dict[str, float]:
        """Scores of the tags; intent_accuracy; sentence_accuracy, the share without any error."""
        sentences = self.part(part)
        found, intents = self.decode([s.words for s in sentences])
        right = [list(s.tags) for s in sentences]
        of_intents = [self.labels[i] == s.label for i, s in zip(intents, sentences, strict=True)]
        whole = [a == b and c for a, b, c in zip(right, found, of_intents, strict=True)]
        return self.scores_of(right, found) | {
            "intent_accuracy": sum(of_intents) / len(sentences),
            "sentence_accuracy": sum(whole) / len(sentences),
        }

    def predict(self, texts: Sequence[str], **_: Any) -> list[str]:
        found = zip(*self.decode(self.cut(texts)), strict=True)
        return [f"{self.labels[intent]}\t{' '.join(tags)}" for tags, intent in found]


def _upos(path: str | Path) -> list[TaggedSentence]:
    return [TaggedSentence(s.words, s.upos) for s in read_conllu(path)]


def _conllu(data: str, seed: int) -> Parts:
    if not data:
        raise ValueError("task 'conllu' needs data: a CoNLL-U file, or a folder of such files")
    return read_parts(data, seed, _upos, "conllu")


def _iob(data: str, seed: int, phrases: bool) -> Parts:
    if not data:
        raise ValueError("task 'iob' needs data: a file of a word and its tag a line, or a folder")
    read = partial(read_columns, phrases=phrases)
    return read_parts(data, seed, read, "txt", "conll", "iob", "tsv")


def _slots(data: str, seed: int) -> Parts:
    if not data:
        raise ValueError("task 'slots' needs data: a folder of train.seq.in and its like")
    train, test = (read_triples(data, part) for part in ("train", "test"))
    for part in ("dev", "valid"):
        if part_file(data, f"{part}.seq.in"):
            return Parts(train, read_triples(data, part), test)
    return carve_dev(train, test, seed)


READERS = {
    "slots": _slots,
    "conllu": _conllu,
    "ewt-upos": lambda data, seed: _conllu(str(corpus_folder(data, "ud_english_ewt")), seed),
    "snips": lambda data, seed: read_snips(corpus_folder(data, "snips")),
}
