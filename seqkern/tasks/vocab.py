"""Vocabularies: symbols to numbers and back, and what a checkpoint keeps of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

PAD, BOS, EOS, UNKNOWN = 0, 1, 2, 3
SPECIALS = ("<pad>", "<s>", "</s>", "<unk>")


class Vocab:
    """Symbols in a fixed order; the first four numbers are PAD, BOS, EOS and UNKNOWN.

    `<pad>`, `<s>` and `</s>` as words of a text do not mean the special ones: they are UNKNOWN, so
    no text ends where one stands. Language models alone take `</s>` for the end of a line, and
    refuse the three in their files (see language.read_text).

    Args:
        symbols: the symbols without the special ones, each once.

    Raises:
        ValueError: a symbol occurs twice, or is one of the special ones.
    """

    def __init__(self, symbols: Iterable[str]) -> None:
        self.symbols = SPECIALS + tuple(symbols)
        self._index = {symbol: i for i, symbol in enumerate(self.symbols) if i > UNKNOWN}
        if len(set(self.symbols)) != len(self.symbols):
            twice = sorted({s for s in self.symbols if self.symbols.count(s) > 1})
            raise ValueError(f"symbols must be distinct and not in {SPECIALS}, got twice: {twice}")

    @classmethod
    def build(
        cls, sequences: Iterable[Sequence[str]], min_count: int = 1, most: int | None = None
    ) -> Vocab:
        """The symbols that occur, in sorted order.

        Args:
            sequences: where they are counted.
            min_count: occurrences below which a symbol is left out, and so UNKNOWN.
            most: how many symbols to keep, the most frequent ones; None for all.

        Raises:
            ValueError: min_count or most is below 1.
        """
        if min_count < 1 or (most is not None and most < 1):
            raise ValueError(f"min_count and most must be at least 1, got {min_count} and {most}")
        counts = Counter(symbol for sequence in sequences for symbol in sequence)
        kept = [symbol for symbol in sorted(counts) if counts[symbol] >= min_count]
        if most is not None:
            kept = sorted(sorted(kept, key=lambda symbol: -counts[symbol])[:most])
        return cls(symbol for symbol in kept if symbol not in SPECIALS)

    def __len__(self) -> int:
        return len(self.symbols)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocab) and self.symbols == other.symbols

    def encode(self, sequence: Sequence[str]) -> list[int]:
        """Numbers of the symbols; one never seen, or named as a special one, becomes UNKNOWN."""
        return [self._index.get(symbol, UNKNOWN) for symbol in sequence]

    def decode(self, numbers: Iterable[int]) -> tuple[str, ...]:
        """Symbols up to the first EOS, without BOS and PAD."""
        symbols = []
        for number in numbers:
            if number == EOS:
                break
            if number not in (PAD, BOS):
                symbols.append(self.symbols[number])
        return tuple(symbols)

    def state(self) -> dict[str, Any]:
        """Plain data for a checkpoint; `restore` makes the vocabulary of it again."""
        return {"kind": "symbols", "symbols": list(self.symbols[len(SPECIALS) :])}


class Labels:
    """Names of classes in a fixed order, numbered from 0, with no special ones.

    Args:
        names: the names, each once, at least one.

    Raises:
        ValueError: there is none, or one occurs twice.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.names = tuple(names)
        self._index = {name: i for i, name in enumerate(self.names)}
        if not self.names or len(self._index) != len(self.names):
            raise ValueError(f"labels must be distinct and at least one, got {self.names[:20]}")

    @classmethod
    def build(cls, names: Iterable[str]) -> Labels:
        """The names that occur, in sorted order."""
        return cls(sorted(set(names)))

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, number: int) -> str:
        return self.names[number]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Labels) and self.names == other.names

    def encode(self, name: str) -> int:
        """The number of a name.

        Raises:
            ValueError: there is no such label.
        """
        if name not in self._index:
            raise ValueError(f"label {name!r} is not one of the training data's: {self.names[:20]}")
        return self._index[name]

    def state(self) -> dict[str, Any]:
        """Plain data for a checkpoint; `restore` makes the labels of it again."""
        return {"kind": "labels", "symbols": list(self.names)}
