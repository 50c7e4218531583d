"""Vocabularies: symbols to numbers and back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

PAD, BOS, EOS, UNKNOWN = 0, 1, 2, 3
SPECIALS = ("<pad>", "<s>", "</s>", "<unk>")


class Vocab:
    """Symbols in a fixed order; the first four numbers are PAD, BOS, EOS and UNKNOWN.

    Args:
        symbols: the symbols without the special ones, each once.

    Raises:
        ValueError: a symbol occurs twice, or is one of the special ones.
    """

    def __init__(self, symbols: Iterable[str]) -> None:
        self.symbols = SPECIALS + tuple(symbols)
        self._index = {symbol: i for i, symbol in enumerate(self.symbols)}
        if len(self._index) != len(self.symbols):
            twice = sorted({s for s in self.symbols if self.symbols.count(s) > 1})
            raise ValueError(f"symbols must be distinct and not in {SPECIALS}, got twice: {twice}")

    @classmethod
    def build(cls, sequences: Iterable[Sequence[str]]) -> Vocab:
        """Every symbol that occurs, in sorted order."""
        return cls(sorted({symbol for sequence in sequences for symbol in sequence}))

    def __len__(self) -> int:
        return len(self.symbols)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocab) and self.symbols == other.symbols

    def encode(self, sequence: Sequence[str]) -> list[int]:
        """Numbers of the symbols; a symbol never seen becomes UNKNOWN."""
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
