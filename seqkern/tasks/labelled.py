"""Sentences with a label each: readers of the corpora and of the user's own files, and splits.

Words come from text in one of two ways. "clean" is for raw text: lower case; runs of letters and
digits; a clitic by itself with its apostrophe (it 's, you 've, is n't); and every other sign but
white space by itself. It is close to what the text of MR and TREC is tokenised by already. "spaces"
is for text that is tokenised: what white space separates, as it stands.
"""

from __future__ import annotations

import csv
import json
import random
import re
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from seqkern.tasks.corpora import needed_file, part_file
from seqkern.tasks.job import Parts
from seqkern.tasks.lines import malformed, read_lines

WORDS = ("clean", "spaces")
WORD = re.compile(r"\w+?(?=n't\b)|n't\b|'\w+|\w+|[^\w\s]")
TREC_LABEL = re.compile(r"([A-Z]+):([a-z]+) +(\S.*)")

Example = TypeVar("Example")


class Labelled(NamedTuple):
    """The words of a sentence, at least one, and its label."""

    words: tuple[str, ...]
    label: str


def words_of(text: str, words: str = "clean") -> tuple[str, ...]:
    """The words of a text; see the module docstring for the two ways.

    Raises:
        ValueError: another way is asked for.
    """
    if words not in WORDS:
        raise ValueError(f"words must be one of {WORDS}, got {words!r}")
    return tuple(WORD.findall(text.lower()) if words == "clean" else text.split())


def read_labelled(path: str | Path, words: str = "clean") -> list[Labelled]:
    """Reads `label<TAB>text` lines; empty lines are passed over.

    Raises:
        ValueError: a line is not two non-empty fields; the message names the file and the line.
            Or the file holds no sentence.
        OSError: the file cannot be read.
    """
    examples = []
    for number, line in read_lines(path):
        if not line.strip():
            continue
        label, _, text = line.partition("\t")
        if not label.strip() or not text.strip() or "\t" in text:
            raise malformed(path, number, "label<TAB>text, two non-empty fields", line)
        examples.append(Labelled(words_of(text, words), label.strip()))
    if not examples:
        raise ValueError(f"{path}: holds no labelled sentence")
    return examples


def read_parts(
    data: str | Path, seed: int, read: Callable[[str | Path], list[Any]], *ends: str
) -> Parts:
    """A user's own file, split by the seed, or a folder of such files.

    A folder holds train and test, and dev or else a tenth of train is taken for it; each ends in
    one of `ends`, and may end in .gz after that. `read` takes one file.

    Raises:
        ValueError: train or test is missing; or as `read`.
    """
    if not Path(data).is_dir():
        return split(read(data), seed)
    names = {part: [f"{part}.{end}" for end in ends] for part in Parts._fields}
    train, test = (read(needed_file(data, *names[part])) for part in ("train", "test"))
    dev = part_file(data, *names["dev"])
    return Parts(train, read(dev), test) if dev else carve_dev(train, test, seed)


def read_trec(path: str | Path, labels: str = "coarse", words: str = "clean") -> list[Labelled]:
    """Reads questions of TREC, `COARSE:fine text` in Latin-1.

    Args:
        path: the file.
        labels: "coarse" for 6 classes (HUM), "fine" for 50 (HUM:ind).
        words: see the module docstring.

    Raises:
        ValueError: a line is of another form; the message names the file and the line.
    """
    if labels not in ("coarse", "fine"):
        raise ValueError(f"labels must be 'coarse' or 'fine', got {labels!r}")
    examples = []
    for number, line in read_lines(path, "latin-1"):
        found = TREC_LABEL.fullmatch(line.strip())
        if not found:
            raise malformed(path, number, "COARSE:fine and a question", line)
        coarse, fine, text = found.groups()
        label = coarse if labels == "coarse" else f"{coarse}:{fine}"
        examples.append(Labelled(words_of(text, words), label))
    return examples


def read_side(path: str | Path, label: str, words: str = "clean") -> list[Labelled]:
    """Reads a file of sentences of one label, one a line, in Latin-1 (as MR and SUBJ are).

    Raises:
        ValueError: a line is empty; the message names the file and the line.
    """
    examples = []
    for number, line in read_lines(path, "latin-1"):
        if not line.strip():
            raise malformed(path, number, "a sentence", line)
        examples.append(Labelled(words_of(line, words), label))
    return examples


def read_clinc150(path: str | Path, out_of_scope: bool = False, words: str = "clean") -> Parts:
    """Reads data_full.json of CLINC150: 150 intents, and "oos" of what is out of scope.

    Raises:
        ValueError: the file is not that JSON; the message names it.
    """
    text = "\n".join(line for _, line in read_lines(path))
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not JSON ({error.msg})") from error
    parts: dict[str, list[Labelled]] = {}
    for part, key in zip(Parts._fields, ("train", "val", "test"), strict=True):
        rows = []
        for name in (key, f"oos_{key}") if out_of_scope else (key,):
            rows += _rows_of(path, content, name)
        parts[part] = [Labelled(words_of(text, words), label) for text, label in rows]
    return Parts(**parts)


def _rows_of(path: str | Path, content: Any, name: str) -> list[tuple[str, str]]:
    rows = content.get(name) if isinstance(content, dict) else None
    if not isinstance(rows, list):
        raise ValueError(f"{path}: expected an object with a list {name!r}")
    for place, row in enumerate(rows):
        of_two = isinstance(row, list) and len(row) == 2 and all(isinstance(t, str) for t in row)
        if not of_two or not row[0].strip() or not row[1].strip():
            raise ValueError(f"{path}: {name}[{place}]: expected [text, intent], got {row!r}")
    return [(text, label) for text, label in rows]


def read_csv(path: str | Path, words: str = "clean") -> list[Labelled]:
    """Reads `text,label` rows of CSV below a line of headings; a quoted text may hold line ends.

    Raises:
        ValueError: a row is of another form; the message names the file and its last line.
    """
    lines = [f"{line}\n" for _, line in read_lines(path)]
    rows = csv.reader(lines, strict=True)
    examples = []
    try:
        for place, row in enumerate(rows):
            if len(row) != 2 or not all(field.strip() for field in row):
                raise malformed(path, rows.line_num, "text,label, two fields", ",".join(row))
            if place:
                examples.append(Labelled(words_of(row[0], words), row[1].strip()))
    except csv.Error as error:
        raise ValueError(f"{path}:{rows.line_num}: not CSV ({error})") from error
    if not examples:
        raise ValueError(f"{path}: holds no row below its headings")
    return examples


def _content(example: Any) -> Hashable:
    """What must not stand in two parts: the words."""
    return example.words


def split(
    examples: Sequence[Example],
    seed: int,
    dev: float = 0.1,
    test: float = 0.1,
    content: Callable[[Any], Hashable] = _content,
) -> Parts:
    """Three random parts; examples of the same words are in the same one.

    Args:
        examples: what to split.
        seed: of the draw.
        dev, test: shares, in [0, 1), together below 1. A share above 0 gives at least one.
        content: what tells an example apart.

    Raises:
        ValueError: a share is impossible, or there are too few different examples.
    """
    if not 0 <= dev < 1 or not 0 <= test < 1 or dev + test >= 1:
        raise ValueError(f"dev and test must be shares that sum below 1, got {dev} and {test}")
    different = list(dict.fromkeys(content(example) for example in examples))
    random.Random(seed).shuffle(different)
    n_dev, n_test = (max(1, round(s * len(different))) if s else 0 for s in (dev, test))
    if len(different) <= n_dev + n_test:
        raise ValueError(f"a split needs more different examples than {len(different)}")
    part = dict.fromkeys(different[n_dev + n_test :], 0)
    part |= dict.fromkeys(different[:n_dev], 1)
    part |= dict.fromkeys(different[n_dev : n_dev + n_test], 2)
    parts: tuple[list[Example], ...] = ([], [], [])
    for example in examples:
        parts[part[content(example)]].append(example)
    return Parts(*parts)


def carve_dev(train: Sequence[Example], test: Sequence[Example], seed: int) -> Parts:
    """A published test part, with a tenth of the training part taken for development."""
    found = split(train, seed, 0.1, 0.0)
    return Parts(found.train, found.dev, list(test))
