"""Trees in brackets with a label at every node, as `(3 (2 Not) (4 (2 too) (3 bad)))`.

That is the form of the Stanford Sentiment Treebank, whose labels are numbers, and of the Penn
Treebank, whose trees have one more pair of brackets around them, without a label, and run over
several lines. A node holds either one word or one node or more.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from seqkern.tasks.lines import read_lines

TOKEN = re.compile(r"[()]|[^() \t\r\n]+")  # a word may hold other white space, as of a fixed width


class LabelledTree(NamedTuple):
    """A tree, as tuples of one length, parents before their children, siblings in their order.

    symbols: a word for each node, "" for none; parents: each node's parent, -1 for the root, which
    is node 0; labels: of each node.
    """

    symbols: tuple[str, ...]
    parents: tuple[int, ...]
    labels: tuple[str, ...]

    @property
    def words(self) -> tuple[str, ...]:
        """The symbols of the nodes that have one, in their order."""
        return tuple(symbol for symbol in self.symbols if symbol)


def parse_tree(text: str) -> LabelledTree:
    """The tree of a text in brackets; a pair without a label around the whole of it is dropped.

    Raises:
        ValueError: the text is no such tree; the message says what was expected, and where.
    """
    symbols: list[str] = []
    parents: list[int] = []
    labels: list[str] = []
    filled: list[bool] = []  # of each node, whether it has its word or a node
    path: list[int] = []  # the nodes that are not closed
    tokens = [*enumerate(TOKEN.findall(text), 1)]
    if [token for _, token in tokens[:2]] == ["(", "("] and tokens[-1][1] == ")":
        tokens = tokens[1:-1]
    for place, token in tokens:
        expected = _expected(token, path, symbols, labels, filled)
        if expected:
            raise ValueError(f"expected {expected}, got {token!r} as part {place}")
        if token == "(":
            parents.append(path[-1] if path else -1)
            if path:
                filled[path[-1]] = True
            path.append(len(symbols))
            symbols.append("")
            labels.append("")
            filled.append(False)
        elif token == ")":
            path.pop()
        elif not labels[path[-1]]:
            labels[path[-1]] = token
        else:
            symbols[path[-1]], filled[path[-1]] = token, True
    if path or not symbols:
        raise ValueError(f"expected a tree whose brackets are closed, got {len(path)} open")
    return LabelledTree(tuple(symbols), tuple(parents), tuple(labels))


def _expected(
    token: str,
    path: list[int],
    symbols: list[str],
    labels: list[str],
    filled: list[bool],
) -> str:
    """What should stand in place of a token; "" where it may stand."""
    if not path:
        if symbols:
            return "the end of the tree"
        return "" if token == "(" else "( to begin a tree"
    node = path[-1]
    if not labels[node]:
        return "a label after (" if token in "()" else ""
    if token == ")":
        return "" if filled[node] else "a word or a node"
    if symbols[node] or (filled[node] and token != "("):
        return "one word or nodes in a node, and then )"
    return ""


def read_trees(path: str | Path, children: int | None = None) -> list[LabelledTree]:
    """The trees of a file; empty lines are passed over, .gz is decompressed.

    A tree begins on a line of its own, and may go on in lines that are indented deeper than that.

    Args:
        path: the file.
        children: the most that a node may have; None for any number.

    Raises:
        ValueError: a text is no tree, or a node has more children; the message names the file and
            the line where the tree begins. Or the file holds no tree.
        OSError: the file cannot be read.
    """
    trees = []
    for number, text in _texts(path):
        try:
            tree = parse_tree(text)
            widest = max(Counter(tree.parents[1:]).values(), default=0)
            if children is not None and widest > children:
                raise ValueError(
                    f"expected at most {children} children of a node (see the model's sizes kind "
                    f"and children), got {widest}"
                )
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
        trees.append(tree)
    if not trees:
        raise ValueError(f"{path}: holds no tree")
    return trees


def _texts(path: str | Path) -> Iterator[tuple[int, str]]:
    """The text of each tree, as far as its lines go, with the number of its first line."""
    first, text, margin, unclosed = 0, "", 0, 0
    for number, line in read_lines(path):
        if not line.strip():
            continue
        indent = len(line) - len(line.lstrip())
        # By brackets alone the next tree would become a part of one that lacks a bracket.
        if unclosed <= 0 or (indent <= margin and line[indent] == "("):
            if text:
                yield first, text
            first, text, margin, unclosed = number, "", indent, 0
        text += line + "\n"
        unclosed += line.count("(") - line.count(")")
    if text:
        yield first, text
