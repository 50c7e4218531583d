"""One side of a pair: a line of text to numbers and back, by characters, words or subwords."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from seqkern.tasks.subwords import Subwords
from seqkern.tasks.vocab import UNKNOWN, Vocab

TOKENS = ("chars", "words", "subwords")


def tokenize(text: str, tokens: str) -> tuple[str, ...]:
    """The symbols of a text: its characters ("chars") or what white space separates ("words").

    Raises:
        ValueError: another way is asked for.
    """
    if tokens not in ("chars", "words"):
        raise ValueError(f"tokens must be one of {TOKENS}, got {tokens!r}")
    return tuple(text.strip()) if tokens == "chars" else tuple(text.split())


@dataclass(frozen=True)
class Side:
    """How one side's text becomes numbers.

    Args:
        tokens: "chars", "words" or "subwords".
        vocab: a Vocab for the first two, Subwords for the last.
        reverse: whether the numbers run backwards (Sutskever et al., 2014, for sources).
    """

    tokens: str
    vocab: Vocab | Subwords
    reverse: bool = False

    @staticmethod
    def learn(texts: Iterable[str], tokens: str, min_count: int, most: int) -> Vocab | Subwords:
        """The vocabulary of one side.

        Args:
            min_count: occurrences below which a symbol is left out; not of subwords.
            most: symbols at most, 0 for no bound; of subwords it is their number.
        """
        if tokens == "subwords":
            return Subwords.build(texts, most or 4000)
        return Vocab.build((tokenize(t, tokens) for t in texts), min_count, most or None)

    def encode(self, text: str) -> list[int]:
        """Numbers of a text."""
        if isinstance(self.vocab, Subwords):
            numbers = self.vocab.encode_text(text)
        else:
            numbers = self.vocab.encode(tokenize(text, self.tokens))
        return numbers[::-1] if self.reverse else numbers

    def decode(self, numbers: Sequence[int]) -> str:
        """The text of numbers up to the first EOS."""
        if isinstance(self.vocab, Subwords):
            return self.vocab.decode_text(numbers)
        return ("" if self.tokens == "chars" else " ").join(self.vocab.decode(numbers))

    def symbols(self, numbers: Iterable[int]) -> tuple[str, ...]:
        """The symbols of numbers one by one, for display."""
        if isinstance(self.vocab, Subwords):
            return self.vocab.pieces(numbers)
        return tuple(self.vocab.symbols[n] for n in numbers)

    def known(self, text: str) -> list[int]:
        """Numbers of a text that a model can be asked about.

        Raises:
            ValueError: it is empty; or, of characters, has one that the training data had not.
        """
        numbers = self.encode(text)
        if not numbers:
            raise ValueError(f"cannot decode {text!r}: it is empty")
        if self.tokens == "chars" and UNKNOWN in numbers:
            symbols = tokenize(text, "chars")[:: -1 if self.reverse else 1]
            strange = [s for s, n in zip(symbols, numbers, strict=True) if n == UNKNOWN]
            raise ValueError(
                f"cannot decode {text!r}: symbols {strange} are not in the training data"
            )
        return numbers
