"""Beam search over any model with `encode` and `step` (see models/rnnsearch.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from seqkern.tasks.data import pad_sources
from seqkern.tasks.vocab import BOS, EOS, PAD, Vocab


class Decodable(Protocol):
    """encode: x (B, Tx), lengths (B,) -> memory, s_0 (B, H).
    step: y (B, K), s (B, K, H), memory -> (log_p (B, K, V), s (B, K, H), alignment (B, K, Tx)).
    """

    def encode(self, x: Tensor, lengths: Tensor) -> tuple: ...

    def step(self, y: Tensor, s: Tensor, memory) -> tuple[Tensor, Tensor, Tensor]: ...


class Decoded(NamedTuple):
    """The best hypothesis of each source.

    y: (B, L) with PAD after EOS; score: (B,) log p(y | x) over the length penalty;
    alignment: (B, L, Tx), zero past the end.
    """

    y: Tensor
    score: Tensor
    alignment: Tensor


def length_penalty(length: Tensor | float, alpha: float) -> Tensor | float:
    """((5 + length) / 6) ** alpha (Wu et al., 2016, equation 14); EOS counts."""
    return ((5.0 + length) / 6.0) ** alpha


@torch.inference_mode()
def beam_search(
    model: Decodable,
    x: Tensor,
    lengths: Tensor,
    *,
    beam: int = 4,
    max_length: int = 64,
    alpha: float = 0.6,
) -> Decoded:
    """The `beam` best prefixes of each source grow by one symbol a step; beam = 1 is greedy.

    A finished hypothesis keeps its place in the beam with its score. A source is done when all
    of its hypotheses are finished, or none of the others can still become the best. A hypothesis
    that reaches max_length counts as it stands.

    Args:
        x: (B, Tx) source symbols, PAD past the end.
        lengths: (B,) in 1 .. Tx.
        beam: K, hypotheses kept for each source.
        max_length: most symbols of a target, EOS included.
        alpha: exponent of the length penalty, 0 for none.

    Raises:
        ValueError: beam or max_length is below 1.
    """
    if beam < 1 or max_length < 1:
        raise ValueError(f"beam and max_length must be >= 1, got {beam} and {max_length}")
    memory, s = model.encode(x, lengths)
    B, K = x.size(0), beam
    s = s.unsqueeze(1).expand(B, K, -1)
    # at first all hypotheses are equal: one counts, so that the first step fills the beam
    score = s.new_full((B, K), float("-inf"))
    score[:, 0] = 0.0
    y = torch.full((B, K, 1), BOS)
    alignment = s.new_zeros(B, K, 0, x.size(1))
    for _ in range(max_length):
        log_p, s, a = model.step(y[:, :, -1], s, memory)
        finished = _finished(y)
        score, parent, symbol = _extend(score, log_p, finished)
        a = a.masked_fill(finished.unsqueeze(-1), 0.0)
        y = torch.cat([_take(y, parent), symbol.unsqueeze(-1)], -1)
        alignment = torch.cat([_take(alignment, parent), _take(a, parent).unsqueeze(2)], 2)
        s = _take(s, parent)
        if _done(y, score, alpha, max_length):
            break
    final = score / length_penalty((y[:, :, 1:] != PAD).sum(-1), alpha)
    best = final.argmax(1, keepdim=True)
    return Decoded(
        _take(y, best)[:, 0, 1:], final.gather(1, best)[:, 0], _take(alignment, best)[:, 0]
    )


def _finished(y: Tensor) -> Tensor:
    """(B, K) bool: the last symbol is EOS or the PAD after it."""
    return (y[:, :, -1] == EOS) | (y[:, :, -1] == PAD)


def _take(values: Tensor, index: Tensor) -> Tensor:
    """values (B, K, ...) at index (B, J) along the second dimension: (B, J, ...)."""
    return values[torch.arange(values.size(0)).unsqueeze(1), index]


def _extend(score: Tensor, log_p: Tensor, finished: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The K best of all K * V continuations: their scores, parents and symbols, (B, K) each."""
    log_p = log_p.clone()
    log_p[..., [PAD, BOS]] = float("-inf")
    log_p[finished] = float("-inf")
    log_p[..., PAD].masked_fill_(finished, 0.0)  # the one continuation of a finished hypothesis
    V = log_p.size(-1)
    score, flat = (score.unsqueeze(-1) + log_p).flatten(1).topk(score.size(1), dim=1)
    return score, flat // V, flat % V


def _done(y: Tensor, score: Tensor, alpha: float, max_length: int) -> bool:
    finished = _finished(y)
    if bool(finished.all()):
        return True
    # a log probability only falls, so max_length's penalty bounds what an open one can reach
    length = (y[:, :, 1:] != PAD).sum(-1)
    closed = (score / length_penalty(length, alpha)).masked_fill(~finished, float("-inf"))
    open_ = (score / length_penalty(max_length, alpha)).masked_fill(finished, float("-inf"))
    return bool((closed.amax(1) >= open_.amax(1)).all())


def decode(
    model: Decodable,
    sources: Sequence[Sequence[str]],
    source: Vocab,
    target: Vocab,
    *,
    beam: int = 4,
    max_length: int = 64,
    batch_size: int = 256,
) -> list[tuple[str, ...]]:
    """The best target of each source, in the order given; sources of like length run together."""
    rows = [source.encode(s) for s in sources]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    targets: list[tuple[str, ...]] = [()] * len(rows)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        x, lengths = pad_sources([rows[i] for i in chosen])
        y = beam_search(model, x, lengths, beam=beam, max_length=max_length).y
        for i, numbers in zip(chosen, y.tolist(), strict=True):
            targets[i] = target.decode(numbers)
    return targets
