"""Beam search: the best of all targets, batches, alignments."""

import itertools

import pytest
import torch

from seqkern.models import RNNSearch, RNNSearchConfig
from seqkern.tasks.batches import pad_sources
from seqkern.tasks.decoding import beam_search, length_penalty
from seqkern.tasks.vocab import BOS, EOS, PAD


@pytest.fixture(scope="module")
def untrained():
    torch.manual_seed(1)
    config = RNNSearchConfig(9, 7, 4, 6, 5, 4, dropout=0.5)
    model = RNNSearch(config).double().eval()
    with torch.no_grad():
        model.output.weight *= 6  # sharper choices than those of a new model
    return model


def sequence_scores(model, x, max_length, alpha):
    """Every target of up to max_length symbols with its score, for one source x (1, Tx)."""
    symbols = [s for s in range(7) if s not in (PAD, BOS)]
    for length in range(1, max_length + 1):
        for y in itertools.product(symbols, repeat=length):
            if EOS in y[:-1] or (y[-1] != EOS and length < max_length):
                continue
            previous = torch.tensor([[BOS, *y[:-1]]])
            log_p = model(x, torch.tensor([x.size(1)]), previous).log_softmax(-1)
            total = log_p[0, range(length), list(y)].sum().item()
            yield total / length_penalty(length, alpha), y


@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.5])
@torch.no_grad()
def test_a_wide_beam_finds_the_best_of_all_targets(untrained, alpha):
    x = torch.tensor([[4, 7, 5], [8, 6, 4]])
    best = beam_search(untrained, x, torch.tensor([3, 3]), beam=5**4, max_length=4, alpha=alpha)
    for b in range(2):
        score, y = max(sequence_scores(untrained, x[b : b + 1], 4, alpha))
        assert best.score[b].item() == pytest.approx(score, rel=1e-6)
        assert tuple(best.y[b][best.y[b] != PAD].tolist()) == y


@torch.no_grad()
def plain_beam(model, x, beam, max_length, alpha):
    """Beam search over lists, for one source; finished hypotheses keep their places."""
    hypotheses = [(0.0, (BOS,))]
    for _ in range(max_length):
        grown = []
        for score, y in hypotheses:
            if y[-1] == EOS:
                grown.append((score, y))
                continue
            log_p = model(x, torch.tensor([x.size(1)]), torch.tensor([y])).log_softmax(-1)[0, -1]
            grown += [(score + log_p[s].item(), (*y, s)) for s in range(7) if s not in (PAD, BOS)]
        hypotheses = sorted(grown, reverse=True)[:beam]
    return max((score / length_penalty(len(y) - 1, alpha), y[1:]) for score, y in hypotheses)


@pytest.mark.parametrize("beam", [1, 3])
@torch.no_grad()
def test_batched_beams_are_the_plain_ones(untrained, beam):
    """Words of several lengths together decode as each alone does, by a beam over lists."""
    words = [[4], [5, 8, 6, 7, 4], [7, 7], [6, 4, 8], [8, 5, 5, 4, 6, 7]]
    x, lengths = pad_sources(words)
    best = beam_search(untrained, x, lengths, beam=beam, max_length=7, alpha=0.8)
    for b, word in enumerate(words):
        score, y = plain_beam(untrained, torch.tensor([word]), beam, 7, 0.8)
        assert tuple(best.y[b][best.y[b] != PAD].tolist()) == y
        assert best.score[b].item() == pytest.approx(score, rel=1e-6)
        weights = best.alignment[b, : len(y)]
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[:, 0]))
        assert torch.all(weights[:, len(word) :] == 0)


@torch.no_grad()
def test_alignments_follow_their_hypothesis(untrained):
    """The alignment handed out is that of the chosen target under teacher forcing."""
    x, lengths = pad_sources([[5, 8, 6, 7, 4]])
    best = beam_search(untrained, x, lengths, beam=4, max_length=6, alpha=0.0)
    y = best.y[0][best.y[0] != PAD].tolist()
    memory, s = untrained.encode(x, lengths)
    s = s.unsqueeze(1)
    for i, previous in enumerate([BOS, *y[:-1]]):
        _, s, a = untrained.step(torch.tensor([[previous]]), s, memory)
        torch.testing.assert_close(best.alignment[0, i], a[0, 0])


def test_bad_beams_are_refused(untrained):
    x, lengths = pad_sources([[4]])
    with pytest.raises(ValueError, match="got 0 and 5"):
        beam_search(untrained, x, lengths, beam=0, max_length=5)
