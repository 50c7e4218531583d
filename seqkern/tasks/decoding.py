"""Beam search over any model with `encode` and `step` (see models/rnnsearch.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from seqkern.tasks.batches import pad_sources
from seqkern.tasks.vocab import BOS, EOS, PAD


class Decodable(Protocol):
    """encode: x (B, Tx), lengths (B,) -> memory, state; what a step reads and what it hands on.
    step: y (B, K), state, memory -> (log_p (B, K, V), state, alignment (B, K, Tx)).

    A state is a tensor, or a tuple or dict of states; encode's have B as the first dimension, and
    step's B, K. A model without alignments gives them as zeros.
    """

    def encode(self, x: Tensor, lengths: Tensor) -> tuple[Any, Any]: ...

    def step(self, y: Tensor, s: Any, memory: Any) -> tuple[Tensor, Any, Tensor]: ...


def map_state(function, state):
    """The state with a function of a tensor applied to all of its tensors."""
    if isinstance(state, Tensor):
        return function(state)
    if isinstance(state, dict):
        return {name: map_state(function, part) for name, part in state.items()}
    parts = [map_state(function, part) for part in state]
    return type(state)(*parts) if hasattr(state, "_fields") else type(state)(parts)


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
    s = map_state(lambda t: t.unsqueeze(1).expand(B, K, *t.shape[1:]), s)
    # at first all hypotheses are equal: one counts, so that the first step fills the beam
    score = torch.full((B, K), float("-inf"), device=x.device)
    score[:, 0] = 0.0
    y = torch.full((B, K, 1), BOS, device=x.device)
    steps, parents = [], []
    for _ in range(max_length):
        log_p, s, a = model.step(y[:, :, -1], s, memory)
        finished = _finished(y)
        score, parent, symbol = _extend(score, log_p, finished)
        y = torch.cat([_take(y, parent), symbol.unsqueeze(-1)], -1)
        steps.append(a.masked_fill(finished.unsqueeze(-1), 0.0))
        parents.append(parent)
        s = map_state(lambda t, parent=parent: _take(t, parent), s)
        if _done(y, score, alpha, max_length):
            break
    final = score / length_penalty((y[:, :, 1:] != PAD).sum(-1), alpha)
    best = final.argmax(1, keepdim=True)
    return Decoded(
        _take(y, best)[:, 0, 1:], final.gather(1, best)[:, 0], _trace(steps, parents, best)
    )


def _trace(steps: list[Tensor], parents: list[Tensor], best: Tensor) -> Tensor:
    """The alignments (B, L, Tx) of the hypotheses `best` (B, 1), from the last step backwards."""
    rows = []
    for a, parent in zip(reversed(steps), reversed(parents), strict=True):
        best = parent.gather(1, best)
        rows.append(_take(a, best))
    return torch.cat(rows[::-1], 1)


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


def longest_target(source: int) -> int:
    """Most symbols of a target, EOS included, of a source of so many: at least 64.

    They are the least power of two that is twice the source's or more, so that many lengths have
    one bound and run together.
    """
    return max(64, 1 << (2 * source - 1).bit_length())


def decode(
    model: Decodable,
    sources: Sequence[Sequence[int]],
    *,
    beam: int = 4,
    max_length: Callable[[int], int] = longest_target,
    batch_size: int = 256,
) -> list[list[int]]:
    """The best target of each source, both in numbers, in the order given.

    Sources of like length and of one bound run together, so that none depends on the others.

    Args:
        max_length: most symbols of the target, EOS included, of a source of so many.
    """
    device = next(model.parameters()).device if isinstance(model, nn.Module) else "cpu"
    order = sorted(range(len(sources)), key=lambda i: len(sources[i]))
    targets: list[list[int]] = [[] for _ in sources]
    for bound, group in groupby(order, key=lambda i: max_length(len(sources[i]))):
        rows = list(group)
        for start in range(0, len(rows), batch_size):
            chosen = rows[start : start + batch_size]
            x, lengths = pad_sources([sources[i] for i in chosen])
            x, lengths = x.to(device), lengths.to(device)
            found = beam_search(model, x, lengths, beam=beam, max_length=bound)
            for i, numbers in zip(chosen, found.y.tolist(), strict=True):
                targets[i] = numbers
    return targets
