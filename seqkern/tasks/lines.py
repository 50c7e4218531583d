"""Text files by line, with a word on where a line is wrong."""

from __future__ import annotations

import gzip
import unicodedata
import zlib
from collections.abc import Iterator
from pathlib import Path


def read_lines(path: str | Path, encoding: str = "utf-8") -> Iterator[tuple[int, str]]:
    """The lines of a text file with their numbers from 1, without their ends.

    Args:
        path: the file; one that ends in .gz is decompressed.
        encoding: of the text; a byte order mark at its start is left out.

    Raises:
        ValueError: a line is not of the encoding, or the file is not whole gzip data.
        OSError: the file cannot be read.
    """
    path = Path(path)
    content = path.read_bytes()
    if path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{path}: not a whole gzip file ({error})") from error
    yield from lines_of(content, path, encoding)


def lines_of(
    content: bytes, name: str | Path, encoding: str = "utf-8"
) -> Iterator[tuple[int, str]]:
    """`read_lines` of what was read already; `name` is for the errors."""
    for number, raw in enumerate(content.splitlines(), 1):
        try:
            line = raw.decode(encoding)
        except UnicodeDecodeError as error:
            raise ValueError(f"{name}:{number}: not {encoding.upper()} ({error.reason})") from error
        yield number, line.removeprefix("\ufeff") if number == 1 else line


def blank(text: str) -> bool:
    """Whether a text shows nothing: white space, and signs of no width, which strip() keeps."""
    return all(c.isspace() or unicodedata.category(c) in ("Cc", "Cf") for c in text)


def malformed(path: str | Path, number: int, expected: str, line: str) -> ValueError:
    """The error to raise for a line that is not what a format asks for."""
    shown = line if len(line) <= 60 else line[:60] + "..."
    return ValueError(f"{path}:{number}: expected {expected}, got {shown!r}")
