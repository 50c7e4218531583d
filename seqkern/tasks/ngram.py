"""The counted language model beside the learnt ones: interpolated Kneser-Ney, of NLTK."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from nltk.lm.models import InterpolatedLanguageModel
from nltk.lm.smoothing import KneserNey
from nltk.lm.vocabulary import Vocabulary


class IndexedKneserNey(KneserNey):
    """NLTK's estimator, which looks up what NLTK's goes through all n-grams for at each call."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._tables: dict[int, dict[tuple, tuple[Counter, int]]] = {}

    def _continuation_counts(self, word: str, context: tuple = ()) -> tuple[int, int]:
        if len(context) not in self._tables:
            self._tables[len(context)] = self._table(len(context))
        words, total = self._tables[len(context)].get(tuple(context), (Counter(), 0))
        return words[word], total

    def _table(self, length: int) -> dict[tuple, tuple[Counter, int]]:
        """Of each context of a length: in how many ways each word continues it, and all do."""
        words: dict[tuple, Counter] = {}
        for prefix, counts in self.counts[length + 2].items():
            words.setdefault(prefix[1:], Counter()).update(w for w, n in counts.items() if n > 0)
        return {context: (found, found.total()) for context, found in words.items()}


def ngrams(text: Sequence[str], order: int, start: str) -> list[tuple[str, ...]]:
    """For each symbol the n-gram that ends with it; before the text stands `start`."""
    padded = [start] * (order - 1) + list(text)
    return [tuple(padded[i : i + order]) for i in range(len(text))]


def discount(grams: Sequence[tuple[str, ...]]) -> float:
    """n_1 / (n_1 + 2 n_2), of the n-grams that occur once and twice (Ney, Essen, Kneser, 1994).

    Raises:
        ValueError: no n-gram occurs just once, or all do.
    """
    times = Counter(Counter(grams).values())
    if not times[1] or not times[2]:
        raise ValueError(
            "Kneser-Ney's discount needs n-grams that occur once and others that occur twice, "
            f"got {times[1]} and {times[2]}"
        )
    return times[1] / (times[1] + 2 * times[2])


class CountedModel:
    """Interpolated Kneser-Ney over one text (Chen and Goodman, 1999, section 2.7).

    Args:
        text: symbols to count, those that are unknown replaced by a symbol of their own.
        order: n, at least 2.
        start: the symbol that stands before the text.
        rate: the discount of all orders; None for that of `discount`.

    Raises:
        ValueError: the order is below 2, or the text has no discount.
    """

    def __init__(
        self, text: Sequence[str], order: int, start: str = "<s>", rate: float | None = None
    ) -> None:
        if order < 2:
            raise ValueError(f"order must be at least 2, got {order}")
        grams = ngrams(text, order, start)
        self.order, self.start = order, start
        self.rate = discount(grams) if rate is None else rate
        self.known = frozenset(text)
        self._model = InterpolatedLanguageModel(
            IndexedKneserNey,
            order,
            params={"discount": self.rate, "order": order},
            vocabulary=Vocabulary([*self.known, start]),
        )
        # Every n-gram of the text and all that end where it ends: each symbol counts once an order.
        self._model.counts.update([gram[i:] for i in range(order)] for gram in grams)

    def probability(self, symbol: str, context: Sequence[str]) -> float:
        """p(symbol | the last n - 1 symbols of context)."""
        return self._model.unmasked_score(symbol, tuple(context[len(context) - self.order + 1 :]))

    def nats(self, text: Sequence[str]) -> float:
        """Mean of -log p over all symbols of a text.

        Raises:
            ValueError: a symbol does not occur in the text that was counted: it has probability 0.
        """
        if unseen := sorted(set(text) - self.known)[:5]:
            raise ValueError(
                f"the counted model has never seen {unseen}: give rare words of the training text "
                "to the unknown one (min_count at least 2)"
            )
        grams = Counter(ngrams(text, self.order, self.start))
        total = sum(n * math.log(self.probability(g[-1], g[:-1])) for g, n in grams.items())
        return -total / grams.total()
