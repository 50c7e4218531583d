"""Scores of decoded sequences against one or several references each."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from rapidfuzz.distance import Levenshtein

from seqkern.tasks.libraries import library

Symbols = Sequence[str]


class ErrorRates(NamedTuple):
    """symbol: edits per reference symbol (phoneme error rate); sequence: share of sequences that
    match no reference (word error rate). Both are shares, not per cent."""

    symbol: float
    sequence: float


def error_rates(
    hypotheses: Sequence[Symbols], references: Sequence[Sequence[Symbols]]
) -> ErrorRates:
    """Levenshtein distance to the nearest reference, summed, over the length of those references.

    With several references the nearest one counts, as published grapheme-to-phoneme results do;
    among equally near ones the first.

    Args:
        hypotheses: N sequences of symbols.
        references: for each of them, one or more right answers.

    Raises:
        ValueError: the two differ in length, are empty, or a hypothesis has no reference.
    """
    if len(hypotheses) != len(references) or not references or not all(references):
        raise ValueError(
            "error_rates needs N >= 1 hypotheses and N non-empty lists of references, "
            f"got {len(hypotheses)} and {[len(r) for r in references][:10]}"
        )
    edits = symbols = wrong = 0
    for hypothesis, answers in zip(hypotheses, references, strict=True):
        distances = [Levenshtein.distance(hypothesis, answer) for answer in answers]
        nearest = min(range(len(answers)), key=distances.__getitem__)
        edits += distances[nearest]
        symbols += len(answers[nearest])
        wrong += distances[nearest] > 0
    return ErrorRates(edits / max(symbols, 1), wrong / len(hypotheses))


def bleu(hypotheses: Sequence[str], references: Sequence[Sequence[str]], tokenize: str) -> float:
    """Corpus BLEU in per cent by sacrebleu (Papineni et al., 2002; Post, 2018).

    Args:
        hypotheses: N texts.
        references: for each of them, one or more right answers.
        tokenize: sacrebleu's tokenisation, as "13a" or "zh"; "none" for tokenised text.

    Raises:
        ModuleNotFoundError: sacrebleu is not installed.
        ValueError: the two differ in length, are empty, or a hypothesis has no reference; or
            sacrebleu has no such tokenisation.
    """
    if len(hypotheses) != len(references) or not references or not all(references):
        raise ValueError(
            "bleu needs N >= 1 hypotheses and N non-empty lists of references, "
            f"got {len(hypotheses)} and {[len(r) for r in references][:10]}"
        )
    most = max(map(len, references))
    columns: Any = [[r[i] if i < len(r) else None for r in references] for i in range(most)]
    return _bleu(tokenize).corpus_score(list(hypotheses), columns).score


def bleu_signature(tokenize: str) -> str:
    """sacrebleu's signature of `bleu`: two scores compare where it is the same."""
    metric = _bleu(tokenize)
    metric.corpus_score(["a"], [["a"]])
    return f"sacrebleu BLEU|{metric.get_signature()}"


def _bleu(tokenize: str) -> Any:
    metrics = library("sacrebleu.metrics.bleu", "sacrebleu", "BLEU")
    if tokenize not in metrics.BLEU.TOKENIZERS:
        known = ", ".join(sorted(metrics.BLEU.TOKENIZERS))
        raise ValueError(f"bleu must be a tokenisation of sacrebleu, {known}, got {tokenize!r}")
    return metrics.BLEU(tokenize=tokenize, force=True)


def perplexity(nats: float) -> float:
    """exp of nats per symbol, infinite beyond the largest float."""
    return math.exp(nats) if nats < math.log(sys.float_info.max) else math.inf
