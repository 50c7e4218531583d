"""ListOps: nested operations on lists of digits, and their values (Nangia and Bowman, 2018).

An expression is an operator with at least two arguments, each a digit or an expression, written as
`[MAX 2 9 [MIN 4 7 ] 0 ]`. MAX, MIN, MED (the median, rounded down) and SUM_MOD (the sum modulo 10)
map digits to a digit. As a tree, operators and digits are the symbols of its nodes, and each node
has the value of its part of the expression as a label.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from seqkern.tasks.treebank import LabelledTree

DIGITS = tuple("0123456789")
MOST_TRIES = 100  # draws for each expression asked for before the sizes are held to be too small


def _median(arguments: list[int]) -> int:
    """Of an even number, half the sum of the middle two."""
    ordered, n = sorted(arguments), len(arguments)
    return (ordered[(n - 1) // 2] + ordered[n // 2]) // 2


OPERATORS: dict[str, Callable[[list[int]], int]] = {
    "MAX": max,
    "MIN": min,
    "MED": _median,
    "SUM_MOD": lambda arguments: sum(arguments) % 10,
}


def generate(
    count: int,
    seed: int,
    depth: int = 4,
    arguments: int = 5,
    nested: float = 0.25,
    operators: Sequence[str] = tuple(OPERATORS),
) -> list[LabelledTree]:
    """Different expressions, drawn at random under a seed.

    Args:
        count: how many.
        seed: of the draw.
        depth: most operators inside each other.
        arguments: most arguments of an operator, which has 2 at least.
        nested: probability that an argument is an expression where the depth allows it.
        operators: those to draw from, each as often as it stands here.

    Raises:
        ValueError: a number is out of range, an operator unknown, or there are not as many
            expressions of that size as asked for.
    """
    if count < 1 or depth < 1 or arguments < 2 or not 0 <= nested <= 1:
        raise ValueError(
            "count and depth must be at least 1, arguments at least 2, nested in [0, 1], "
            f"got {count}, {depth}, {arguments} and {nested}"
        )
    if not operators or not set(operators) <= OPERATORS.keys():
        raise ValueError(f"operators must be some of {tuple(OPERATORS)}, got {tuple(operators)}")
    rng, drawn, tries = random.Random(seed), {}, 0
    while len(drawn) < count:
        tree = _draw(rng, depth, arguments, nested, operators)
        drawn[tree] = None
        tries += 1
        if tries > MOST_TRIES * count:
            raise ValueError(
                f"asked for {count} different expressions, found {len(drawn)} of depth {depth} "
                f"with {arguments} arguments"
            )
    return list(drawn)


def _draw(
    rng: random.Random, depth: int, arguments: int, nested: float, operators: Sequence[str]
) -> LabelledTree:
    symbols, parents, depths = [rng.choice(operators)], [-1], [1]
    for node, symbol in enumerate(symbols):  # which grows: a node's arguments come at the end
        if symbol in OPERATORS:
            for _ in range(rng.randint(2, arguments)):
                deeper = depths[node] < depth and rng.random() < nested
                symbols.append(rng.choice(operators if deeper else DIGITS))
                parents.append(node)
                depths.append(depths[node] + 1)
    return _with_values(symbols, parents)


def _with_values(symbols: list[str], parents: list[int]) -> LabelledTree:
    """The tree with each node's value; parents have to stand before their children."""
    arguments: list[list[int]] = [[] for _ in symbols]
    values = [0] * len(symbols)
    for node in reversed(range(len(symbols))):
        symbol, below = symbols[node], arguments[node]
        values[node] = OPERATORS[symbol](below) if symbol in OPERATORS else int(symbol)
        if parents[node] >= 0:
            arguments[parents[node]].append(values[node])
    return LabelledTree(tuple(symbols), tuple(parents), tuple(map(str, values)))


def parse(text: str) -> LabelledTree:
    """The tree of an expression.

    Raises:
        ValueError: the text is no expression; the message says what was expected where.
    """
    symbols: list[str] = []
    parents: list[int] = []
    open_nodes, given = [], []  # operators that are not closed, and how many arguments each has
    for place, token in enumerate(text.split(), 1):
        name = token.removeprefix("[")
        opens = token.startswith("[") and name in OPERATORS
        if token == "]" and open_nodes and given[-1] >= 2:
            open_nodes.pop()
            given.pop()
        elif (opens or (token in DIGITS and open_nodes)) and (open_nodes or not symbols):
            parents.append(open_nodes[-1] if open_nodes else -1)
            symbols.append(name)
            if open_nodes:
                given[-1] += 1
            if opens:
                open_nodes.append(len(symbols) - 1)
                given.append(0)
        else:
            raise ValueError(
                f"expected an expression as [MAX 2 9 [MIN 4 7 ] 0 ], of {', '.join(OPERATORS)} "
                f"and two digits or more, got {token!r} as part {place} of {text!r}"
            )
    if open_nodes or not symbols:
        raise ValueError(f"expected an expression whose brackets are closed, got {text!r}")
    return _with_values(symbols, parents)


def write(tree: LabelledTree) -> str:
    """The expression of a tree, as `parse` takes it."""
    children: list[list[int]] = [[] for _ in tree.parents]
    for node, parent in enumerate(tree.parents):
        if parent >= 0:
            children[parent].append(node)
    words: list[str] = []
    rest: list[int | None] = [tree.parents.index(-1)]  # None closes a bracket
    while rest:
        node = rest.pop()
        if node is None:
            words.append("]")
        elif children[node]:
            words.append(f"[{tree.symbols[node]}")
            rest += [None, *reversed(children[node])]
        else:
            words.append(tree.symbols[node])
    return " ".join(words)
