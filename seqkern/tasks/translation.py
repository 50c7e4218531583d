"""Sequence to sequence: pairs of texts, their loss, their decoding and its scores."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqkern.tasks.batches import Stream, pad, pad_sources
from seqkern.tasks.corpora import corpus_folder, multi30k_files
from seqkern.tasks.data import (
    Pair,
    read_cmudict,
    read_pairs,
    read_parallel,
    references,
    split_by_source,
)
from seqkern.tasks.decoding import beam_search, decode, longest_target
from seqkern.tasks.job import Alignment, Job, Parts
from seqkern.tasks.metrics import bleu, bleu_signature, error_rates, perplexity
from seqkern.tasks.registry import build_model
from seqkern.tasks.sides import Side, tokenize
from seqkern.tasks.vocab import BOS, EOS, PAD

SIDES = ("source", "target")


class PairBatch(NamedTuple):
    """x (B, Tx), lengths (B,), y_previous (B, Ty) = <s> y_1 .., y (B, Ty) = y_1 .. </s>; int64."""

    x: Tensor
    lengths: Tensor
    y_previous: Tensor
    y: Tensor
    units: int
    rows: int


class LengthGroup(NamedTuple):
    """BLEU of the sources of `shortest` to `longest` symbols, and how many these are."""

    shortest: int
    longest: int
    sources: int
    bleu: float


# What the corpora known by name are read as; a user's own files say it by `--set`.
DEFAULTS: dict[str, dict[str, Any]] = {
    "pairs": {"source_tokens": "chars", "target_tokens": "words"},
    "parallel": {"source_tokens": "subwords", "target_tokens": "subwords", "bleu": "13a"},
    "cmudict": {"source_tokens": "chars", "target_tokens": "words", "lower": True},
    "multi30k-de-en": {
        "source_tokens": "words",
        "target_tokens": "words",
        "min_count": 2,
        "bleu": "none",
    },
    "tatoeba-en-zh": {
        "source_tokens": "subwords",
        "target_tokens": "subwords",
        "bleu": "zh",
    },
}


class TranslationJob(Job):
    """A model with `encode`, `step` and teacher forcing (see models/rnnsearch.py) on pairs.

    Options of reading: source_tokens and target_tokens, "chars", "words" or "subwords"; symbols,
    most symbols of a vocabulary (0: all; of subwords, 4,000); min_count, occurrences of a symbol
    that is kept; reverse, the source backwards; lower, sources in lower case; longest, most
    symbols of a side in training and of a decoded target (0: all, see decoding.longest_target);
    bleu, sacrebleu's tokenisation ("13a", "zh", "none" for text that is tokenised already), or ""
    for error rates; smoothing, of the labels (Szegedy et al., 2016).
    """

    TASKS: ClassVar[dict[str, str]] = {
        "pairs": "your file of source<TAB>target lines, split by source",
        "parallel": "your two files, SOURCE,TARGET, a translation a line, split by source",
        "cmudict": "the CMU Pronouncing Dictionary: letters to phonemes",
        "multi30k-de-en": "captions of Multi30k, German to English, tokenised in lower case",
        "tatoeba-en-zh": "sentences of Tatoeba, English to Chinese",
    }
    WITHOUT_DATA: ClassVar[tuple[str, ...]] = ("cmudict",)
    READING: ClassVar[dict[str, Any]] = {
        "source_tokens": "",
        "target_tokens": "",
        "symbols": 0,
        "min_count": 1,
        "reverse": False,
        "lower": False,
        "longest": 0,
        "bleu": "",
        "smoothing": 0.0,
    }
    unit = "symbol"

    def __init__(self, spec, vocabularies=None) -> None:
        super().__init__(spec, vocabularies)
        self.score = "bleu" if self.reading["bleu"] else "sequence_error"
        self.higher = bool(self.reading["bleu"])

    def task_reading(self) -> dict[str, Any]:
        return DEFAULTS[self.spec.task]

    def check_reading(self) -> None:
        if not 0 <= self.reading["smoothing"] < 1:
            raise ValueError(f"smoothing must be in [0, 1), got {self.reading['smoothing']}")
        for name in ("symbols", "longest"):
            if self.reading[name] < 0:
                raise ValueError(f"{name} must not be negative, got {self.reading[name]}")

    @cached_property
    def source(self) -> Side:
        """How sources become numbers."""
        return Side(self.reading["source_tokens"], self.vocabs["source"], self.reading["reverse"])

    @cached_property
    def target(self) -> Side:
        """How targets become numbers."""
        return Side(self.reading["target_tokens"], self.vocabs["target"])

    def read(self) -> Parts:
        """The pairs in three parts that share no source."""
        task, data = self.spec.task, self.spec.data
        if task in CORPORA:
            return Parts(*map(self._in_case, CORPORA[task](data)))
        if task == "cmudict":
            pairs = read_cmudict()
        elif task == "pairs":
            if not data:
                raise ValueError("task 'pairs' needs data: a file of source<TAB>target lines")
            pairs = read_pairs(data)
        else:
            source, comma, target = data.partition(",")
            if not comma:
                raise ValueError(f"task 'parallel' needs data SOURCE,TARGET, got {data!r}")
            pairs = read_parallel(source, target)
        return split_by_source(self._in_case(pairs), self.spec.seed)

    def _in_case(self, pairs: list[Pair]) -> list[Pair]:
        return [pair._replace(source=self._cased(pair.source)) for pair in pairs]

    def _cased(self, source: str) -> str:
        return source.lower() if self.reading["lower"] else source

    def build_vocabs(self) -> dict[str, Any]:
        reading, train = self.reading, self.data.train
        texts = {side: [getattr(pair, side) for pair in train] for side in SIDES}
        tokens = {side: reading[f"{side}_tokens"] for side in SIDES}
        if self.spec.sizes.get("shared"):
            if len(set(tokens.values())) > 1:
                raise ValueError(
                    "shared needs one vocabulary, and so the same source_tokens and "
                    f"target_tokens, got {tokens['source']!r} and {tokens['target']!r}"
                )
            texts = {"source": [text for side in SIDES for text in texts[side]]}
        learned = {
            side: Side.learn(those, tokens[side], reading["min_count"], reading["symbols"])
            for side, those in texts.items()
        }
        return {side: learned.get(side, learned["source"]) for side in SIDES}

    def build_model(self) -> nn.Module:
        sizes = {f"{side}_symbols": len(self.vocabs[side]) for side in ("source", "target")}
        return build_model(self.spec, **sizes)

    @cached_property
    def _numbers(self) -> dict[Pair, tuple[list[int], list[int]]]:
        """The training pairs in numbers: they are cut into symbols once."""
        return {pair: self._encoded(pair) for pair in self.data.train}

    def _encoded(self, pair: Pair) -> tuple[list[int], list[int]]:
        rows = self.source.encode(pair.source), self.target.encode(pair.target)
        for side, row in zip(SIDES, rows, strict=True):
            if not row:
                raise ValueError(f"the {side} of {tuple(pair)!r} holds no symbol")
        return rows

    def _rows(self, pair: Pair) -> tuple[list[int], list[int]]:
        return self._numbers.get(pair) or self._encoded(pair)

    def batches(self, batch_size: int, seed: int) -> Stream:
        # An empty pair of the dev and test parts, or a scorer that is not there, is found before
        # the training and not at its end.
        for pair in (*self.data.dev, *self.data.test):
            self._encoded(pair)
        self.scorer()
        return super().batches(batch_size, seed)

    def length(self, example: Pair) -> tuple[int, ...]:
        # The target first: the decoder runs every row to the longest one, and a recurrent encoder
        # has no padding work.
        x, y = self._rows(example)
        return len(y), len(x)

    def collate(self, examples: list[Pair]) -> PairBatch:
        longest = self.reading["longest"] or None
        rows = [tuple(r[:longest] for r in self._rows(pair)) for pair in examples]
        x, lengths = pad_sources([x for x, _ in rows])
        y = pad([[*y, EOS] for _, y in rows])
        y_previous = pad([[BOS, *y] for _, y in rows])
        return PairBatch(x, lengths, y_previous, y, int((y != PAD).sum()), len(rows))

    def loss(self, batch: PairBatch) -> Tensor:
        scores = self.model(batch.x, batch.lengths, batch.y_previous)
        return F.cross_entropy(
            scores.flatten(0, 1).float(),
            batch.y.flatten(),
            ignore_index=PAD,
            label_smoothing=self.reading["smoothing"] if self.model.training else 0.0,
        )

    def max_length(self, source: int) -> int:
        """Most symbols of a decoded target, EOS included, of a source of so many."""
        return self.reading["longest"] or longest_target(source)

    def decode(self, sources: Sequence[str], beam: int = 4) -> list[str]:
        """The best target of each source."""
        rows = [self.source.encode(text) for text in sources]
        self.model.eval()
        found = decode(self.model, rows, beam=beam, max_length=self.max_length)
        return [self.target.decode(numbers) for numbers in found]

    def predict(self, texts: Sequence[str], *, beam: int = 4, **_: Any) -> list[str]:
        """The best target of each text.

        Raises:
            ValueError: a text is empty, or has a character that the training data had not.
        """
        for text in texts:
            self.expect_readable(text)
        return self.decode([self._cased(text) for text in texts], beam)

    def expect_readable(self, text: str) -> None:
        self.source.known(self._cased(text))

    def evaluate(self, part: str, *, beam: int = 1, **_: Any) -> dict[str, float]:
        """Error rates or BLEU over the distinct sources, and the loss, on "dev" or "test".

        Args:
            beam: hypotheses kept; 1 is greedy.
        """
        pairs = self.part(part)
        answers = references(pairs)
        found = self.decode(list(answers), beam)
        scores = {"loss": self.mean_loss(pairs)}
        scores["perplexity"] = perplexity(scores["loss"])
        if self.reading["bleu"]:
            scores["bleu"] = bleu(found, list(answers.values()), self.reading["bleu"])
            return scores
        tokens = "chars" if self.reading["target_tokens"] == "chars" else "words"
        cut = [[tokenize(t, tokens) for t in targets] for targets in answers.values()]
        rates = error_rates([tokenize(t, tokens) for t in found], cut)
        return scores | {"symbol_error": rates.symbol, "sequence_error": rates.sequence}

    def bleu_by_length(self, part: str, *, beam: int = 4, groups: int = 5) -> list[LengthGroup]:
        """BLEU of about equally many sources each, by how many symbols they have.

        Sources of one length are in one group, so there may be fewer than `groups`.

        Raises:
            ValueError: the task is not scored by BLEU, or `groups` is below 1.
        """
        if not self.reading["bleu"]:
            raise ValueError(
                f"task {self.spec.task!r} has no BLEU by length: its score is the error rate"
            )
        if groups < 1:
            raise ValueError(f"groups must be at least 1, got {groups}")
        answers = references(self.part(part))
        found = dict(zip(answers, self.decode(list(answers), beam), strict=True))
        lengths = {text: len(self.source.encode(text)) for text in answers}
        ordered = sorted(lengths.values())
        cuts = [ordered[len(ordered) * n // groups] for n in range(1, groups)]
        members: list[list[str]] = [[] for _ in range(groups)]
        for text, length in lengths.items():
            members[bisect_right(cuts, length)].append(text)
        return [
            LengthGroup(
                min(lengths[text] for text in texts),
                max(lengths[text] for text in texts),
                len(texts),
                bleu([found[t] for t in texts], [answers[t] for t in texts], self.reading["bleu"]),
            )
            for texts in members
            if texts
        ]

    @torch.inference_mode()
    def mean_loss(self, pairs: Sequence[Pair], batch_size: int = 128) -> float:
        """Nats per symbol of the pairs, without label smoothing."""
        self.model.eval()
        ordered = sorted(pairs, key=self.length)
        total, units = 0.0, 0
        for start in range(0, len(ordered), batch_size):
            batch = self.place(self.collate(ordered[start : start + batch_size]))
            total += self.loss(batch).item() * batch.units
            units += batch.units
        return total / units

    def scorer(self) -> str:
        if self.reading["bleu"]:
            return bleu_signature(self.reading["bleu"])
        return "Levenshtein distance to the nearest reference (rapidfuzz)"

    def align(self, text: str, beam: int = 4) -> Alignment:
        """The best target of a source with its alignment; the last row is EOS's.

        Raises:
            ValueError: the model has no alignment, or as `predict`.
        """
        if not getattr(self.model, "aligns", True):
            return super().align(text)
        numbers = self.source.known(self._cased(text))
        x, lengths = (t.to(self.device) for t in pad_sources([numbers]))
        self.model.eval()
        bound = self.max_length(len(numbers))
        best = beam_search(self.model, x, lengths, beam=beam, max_length=bound)
        y = [n for n in best.y[0].tolist() if n not in (PAD, EOS)]
        weights = best.alignment[0, : len(y) + 1].cpu()
        return Alignment(self.source.symbols(numbers), self.target.symbols(y), weights)


def _multi30k(root: str) -> Parts:
    sides = (multi30k_files(root, language) for language in ("de", "en"))
    return Parts(*map(read_parallel, *sides))


def _tatoeba(root: str) -> Parts:
    folder = corpus_folder(root, "tatoeba_en_zh")
    return Parts(*(read_pairs(folder / f"{part}.tsv.gz", fields=3) for part in Parts._fields))


CORPORA = {"multi30k-de-en": _multi30k, "tatoeba-en-zh": _tatoeba}
