"""Sentences with a tag for each word: columns with empty lines between, and SNIPS's three files."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

from seqkern.tasks.corpora import needed_file
from seqkern.tasks.job import Parts
from seqkern.tasks.lines import malformed, read_lines


class TaggedSentence(NamedTuple):
    """Words, at least one, as many tags, and the label of the whole sentence or ""."""

    words: tuple[str, ...]
    tags: tuple[str, ...]
    label: str = ""


# What F1 of phrases is computed from: IOB, and the E and S of IOBES; a lone letter has no type.
PHRASE_TAG = re.compile(r"O|[BIES](-.+)?")


def read_columns(path: str | Path, phrases: bool = False) -> list[TaggedSentence]:
    """Reads a word and its tag a line, the first and the last of its columns, as CoNLL-2003 has it.

    Columns are separated by white space, an empty line ends a sentence, and a line that begins
    with -DOCSTART- is passed over.

    Args:
        path: the file.
        phrases: whether tags have to be IOB or IOBES, as O, B-x and I-x.

    Raises:
        ValueError: a line has one column, or another number than the line before, or its tag is
            none of a phrase; the message names the file and the line. Or the file holds no
            sentence.
        OSError: the file cannot be read.
    """
    sentences, words, tags, columns = [], [], [], 0
    for number, line in [*read_lines(path), (0, "")]:
        fields = line.split()
        if fields and fields[0] == "-DOCSTART-":
            continue
        if fields:
            if len(fields) < 2 or len(fields) != (columns or len(fields)):
                expected = f"{columns or 'at least 2'} columns with the tag last"
                raise malformed(path, number, expected, line)
            if phrases and not PHRASE_TAG.fullmatch(fields[-1]):
                raise malformed(path, number, "a tag of phrases last, as O, B-x or I-x", line)
            columns = len(fields)
            words.append(fields[0])
            tags.append(fields[-1])
        elif words:
            sentences.append(TaggedSentence(tuple(words), tuple(tags)))
            words, tags = [], []
    if not sentences:
        raise ValueError(f"{path}: holds no sentence")
    return sentences


def read_triples(folder: str | Path, part: str) -> list[TaggedSentence]:
    """Reads PART.seq.in, PART.seq.out and PART.label: line n of the three is one sentence.

    Raises:
        ValueError: a file is missing or shorter than another, or a line is empty or has not as
            many tags as words; the message names the file and the line.
    """
    words_file, tags_file, labels_file = (
        needed_file(folder, f"{part}.{end}") for end in ("seq.in", "seq.out", "label")
    )
    lines: Iterator = zip_longest(*map(read_lines, (words_file, tags_file, labels_file)))
    sentences = []
    for number, three in enumerate(lines, 1):
        if None in three:
            short = (words_file, tags_file, labels_file)[three.index(None)]
            raise ValueError(f"{short}:{number}: expected as many lines as its two neighbours have")
        words, tags, label = (line.split() for _, line in three)
        if not words:
            raise malformed(words_file, number, "a sentence", three[0][1])
        if len(tags) != len(words):
            raise malformed(tags_file, number, f"{len(words)} tags, not {len(tags)}", three[1][1])
        if len(label) != 1:
            raise malformed(labels_file, number, "one label", three[2][1])
        sentences.append(TaggedSentence(tuple(words), tuple(tags), label[0]))
    if not sentences:
        raise ValueError(f"{words_file}: holds no sentence")
    return sentences


def read_snips(folder: str | Path) -> Parts:
    """SNIPS as Goo et al. (2018) split it: parts named train, valid and test."""
    return Parts(*(read_triples(folder, part) for part in ("train", "valid", "test")))
