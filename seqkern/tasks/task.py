"""What is learned: where the pairs come from, how they are cut into symbols and split."""

from __future__ import annotations

from dataclasses import dataclass

from seqkern.tasks.data import Pair, Split, read_cmudict, read_pairs, split_by_source, tokenize

CMUDICT = "cmudict"


@dataclass(frozen=True)
class Task:
    """A file of pairs, or the CMU dictionary, split by source under a seed.

    Args:
        data: "cmudict", or the path of a file of `source<TAB>target` lines.
        source_tokens, target_tokens: "chars" or "words"; the dictionary is always chars and words.
        seed: of the split.
    """

    data: str = CMUDICT
    source_tokens: str = "chars"
    target_tokens: str = "words"
    seed: int = 1

    def pairs(self) -> list[Pair]:
        """All pairs; see read_cmudict and read_pairs for what is raised."""
        if self.data == CMUDICT:
            return read_cmudict()
        return read_pairs(self.data, self.source_tokens, self.target_tokens)

    def load(self) -> Split:
        """The pairs in three parts that share no source."""
        return split_by_source(self.pairs(), self.seed)

    def source_of(self, text: str) -> tuple[str, ...]:
        """The symbols of one source; the dictionary's words are lower-case."""
        return tokenize(text.lower() if self.data == CMUDICT else text, self.source_tokens)
