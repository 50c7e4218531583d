"""Dependency trees in CoNLL-U, the format of Universal Dependencies.

A sentence is a block of lines, a word a line of ten columns with a tab between them: ID, FORM,
LEMMA, UPOS, XPOS, FEATS, HEAD, DEPREL, DEPS, MISC. An empty line ends it, and # starts a comment.
Two kinds of lines are no words of the tree: a token that several words share, with a range for its
ID (3-4), and an empty node of the enhanced graph, with a decimal number for its ID (8.1).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from seqkern.tasks.lines import malformed, read_lines

COLUMNS = 10
SHARED_TOKEN = re.compile(r"([1-9]\d*)-([1-9]\d*)")
EMPTY_NODE = re.compile(r"(0|[1-9]\d*)\.[1-9]\d*")
NUMBER = re.compile(r"0|[1-9]\d*")


class Sentence(NamedTuple):
    """The words of a sentence and its dependency tree, four tuples of one length.

    words: forms; upos: universal parts of speech; heads: the number of each word's head, words
    counted from 1, and 0 for the root; deprels: relation of each word to its head.
    """

    words: tuple[str, ...]
    upos: tuple[str, ...]
    heads: tuple[int, ...]
    deprels: tuple[str, ...]


class _Word(NamedTuple):
    number: int
    line: str
    form: str
    upos: str
    head: int
    deprel: str


def read_conllu(path: str | Path) -> list[Sentence]:
    """All sentences of a file; one that ends in .gz is decompressed.

    Raises:
        ValueError: a line is malformed, words are not numbered 1, 2, .., a head is no word of its
            sentence, or the heads of a sentence are no tree with one root; the message names the
            file and the line. Or the file holds no sentence.
        OSError: the file cannot be read.
    """
    sentences = []
    for lines in _blocks(path):
        words = _words(path, lines)
        _check_tree(path, words)
        _, _, forms, upos, heads, deprels = zip(*words, strict=True)
        sentences.append(Sentence(forms, upos, heads, deprels))
    if not sentences:
        raise ValueError(f"{path}: holds no sentence")
    return sentences


def _blocks(path: str | Path) -> Iterator[list[tuple[int, str]]]:
    """The numbered lines of each sentence, without comments."""
    lines: list[tuple[int, str]] = []
    for number, line in read_lines(path):
        if not line.strip():
            if lines:
                yield lines
            lines = []
        elif not line.startswith("#"):
            lines.append((number, line))
    if lines:
        yield lines


def _words(path: str | Path, lines: list[tuple[int, str]]) -> list[_Word]:
    """The words of a sentence, at least one."""
    words: list[_Word] = []
    shared, token = 0, (0, "")  # the last word of the latest shared token, and its line
    for number, line in lines:
        fields = line.split("\t")
        if len(fields) != COLUMNS:
            raise malformed(path, number, f"{COLUMNS} columns with tabs, not {len(fields)}", line)
        n = len(words)
        if ends := SHARED_TOKEN.fullmatch(fields[0]):
            first, last = map(int, ends.groups())
            if first != n + 1 or last <= first or n < shared:
                raise malformed(path, number, f"a token of words from {n + 1} on", line)
            shared, token = last, (number, line)
        elif node := EMPTY_NODE.fullmatch(fields[0]):
            if int(node[1]) != n:
                raise malformed(path, number, f"an empty node after word {n}", line)
        else:
            words.append(_word(path, number, line, fields, n + 1))
    if len(words) < shared:
        raise malformed(path, token[0], f"a token that ends with word {len(words)}", token[1])
    if not words:
        raise malformed(path, lines[0][0], "a sentence with a word", lines[0][1])
    return words


def _word(path: str | Path, number: int, line: str, fields: list[str], place: int) -> _Word:
    """The word of a line that has to be number `place` of its sentence."""
    name, form, _, upos, _, _, head, deprel, _, _ = fields
    if name != str(place):
        raise malformed(path, number, f"the word with the ID {place}", line)
    if not form or not upos or not deprel:
        raise malformed(path, number, "a FORM, UPOS and DEPREL that are not empty", line)
    if not NUMBER.fullmatch(head):
        raise malformed(path, number, "a HEAD that is 0 or the number of a word", line)
    return _Word(number, line, form, upos, int(head), deprel)


def _check_tree(path: str | Path, words: list[_Word]) -> None:
    """Raises unless every word has one way up to the one root."""
    for word in words:
        if word.head > len(words):
            raise malformed(path, word.number, f"a HEAD in 0 .. {len(words)}", word.line)
    roots = [word for word in words if word.head == 0]
    if not roots:
        raise malformed(path, words[0].number, "a sentence with a HEAD of 0", words[0].line)
    if len(roots) > 1:
        raise malformed(path, roots[1].number, "one HEAD of 0 in a sentence", roots[1].line)
    reached = [0] * (len(words) + 1)  # the walk that came by first; walks count from 1
    reached[0] = -1
    for walk in range(1, len(words) + 1):
        at = walk
        while not reached[at]:
            reached[at] = walk
            at = words[at - 1].head
        if reached[at] == walk:
            word = words[at - 1]
            raise malformed(path, word.number, "heads without a cycle", word.line)
