"""Trees in brackets with a label at every node, as `(3 (2 Not) (4 (2 too) (3 bad)))`.

That is the form of the Penn Treebank, and of the Stanford Sentiment Treebank, whose labels are
numbers. A node holds either one word or one node or more.
"""

from __future__ import annotations

import re
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
    """The tree of a text in brackets.

    Raises:
        ValueError: the text is no such tree; the message says what was expected, and where.
    """
    symbols: list[str] = []
    parents: list[int] = []
    labels: list[str] = []
    filled: list[bool] = []  # of each node, whether it has its word or a node
    path: list[int] = []  # the nodes that are not closed
    for place, token in enumerate(TOKEN.findall(text), 1):
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


def read_trees(path: str | Path) -> list[LabelledTree]:
    """The trees of a file, one a line; empty lines are passed over, .gz is decompressed.

    Raises:
        ValueError: a line is no tree; the message names the file and the line. Or the file holds
            no tree.
        OSError: the file cannot be read.
    """
    trees = []
    for number, line in read_lines(path):
        if line.strip():
            try:
                trees.append(parse_tree(line))
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {error}") from None
    if not trees:
        raise ValueError(f"{path}: holds no tree")
    return trees
