"""RNNSearch: its equations, its padding, and the two sets of layers under it."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from seqkern.models import RNNSearch, RNNSearchConfig
from tests.cells_by_hand import gru_step

SIZES = RNNSearchConfig(
    source_symbols=11,
    target_symbols=9,
    embedding=5,
    hidden=14,
    attention=6,
    maxout=3,
    encoder_layers=1,
    dropout=0.0,
)


def batch(B=5, Tx=8, Ty=6):
    lengths = torch.tensor([3, 8, 1, 5, 8][:B])
    x = torch.randint(4, 11, (B, Tx)).masked_fill(torch.arange(Tx) >= lengths[:, None], 0)
    return x, lengths, torch.randint(1, 9, (B, Ty))


def both(config=SIZES):
    models = []
    for layers in ("torch", "seqkern"):
        torch.manual_seed(3)
        models.append(RNNSearch(config, layers))
    return models


def by_hand(model, x, y_previous):
    """The module docstring's equations, symbol by symbol, for one source (Tx,): scores (Ty, V)."""
    p = dict(model.named_parameters())

    H = model.config.hidden // 2
    annotations = {}
    for suffix, positions in (("_l0", range(len(x))), ("_l0_reverse", reversed(range(len(x))))):
        h = torch.zeros(H, dtype=torch.float64)
        for j in positions:
            h = gru_step(p, "encoder", suffix, p["embed_x.weight"][x[j]], h)
            annotations[j, suffix] = h
    h = torch.stack(
        [torch.cat([annotations[j, "_l0"], annotations[j, "_l0_reverse"]]) for j in range(len(x))]
    )
    s = torch.tanh(p["init_s.weight"] @ h[0, H:] + p["init_s.bias"])
    scores = []
    for y in y_previous:
        w_s = p["decoder.attention.w.weight"] @ s + p["decoder.attention.w.bias"]
        e = [
            p["decoder.attention.v"] @ torch.tanh(w_s + p["decoder.attention.u.weight"] @ h_j)
            for h_j in h
        ]
        a = torch.stack(e).exp() / torch.stack(e).exp().sum()
        c = sum(a_j * h_j for a_j, h_j in zip(a, h, strict=True))
        s = gru_step(p, "decoder.cell", "", torch.cat([p["embed_y.weight"][y], c]), s)
        u = p["readout.weight"] @ torch.cat([s, p["embed_y.weight"][y], c]) + p["readout.bias"]
        t = torch.stack([torch.max(u[k], u[k + 1]) for k in range(0, len(u), 2)])
        scores.append(p["output.weight"] @ t + p["output.bias"])
    return torch.stack(scores)


@pytest.mark.parametrize("layers", ["torch", "seqkern"])
def test_scores_are_the_equations(layers):
    model = RNNSearch(SIZES, layers).double()
    x, lengths, y = batch()
    scores = model(x, lengths, y)
    for b in range(len(x)):
        expected = by_hand(model, x[b, : lengths[b]], y[b])
        torch.testing.assert_close(scores[b], expected, rtol=1e-12, atol=1e-13)


def test_one_seed_gives_both_the_same_parameters():
    ours, theirs = both()
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, value in ours.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[name]), name


def test_both_layers_agree_forward_and_backward():
    """In float64 the two differ by rounding alone, in every gradient."""
    x, lengths, y = batch()
    gradients = []
    for model in both():
        model.double()
        scores = model(x, lengths, y[:, :-1])
        F.cross_entropy(scores.flatten(0, 1), y[:, 1:].flatten()).backward()
        gradients.append({"scores": scores, **{n: p.grad for n, p in model.named_parameters()}})
    for name, value in gradients[0].items():
        torch.testing.assert_close(value, gradients[1][name], rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("layers", ["torch", "seqkern"])
def test_two_encoder_layers_agree_with_step(layers):
    """Decoding step by step gives the log probabilities of teacher forcing, and alignments."""
    model = RNNSearch(
        RNNSearchConfig(11, 9, 5, 14, 6, 3, encoder_layers=2, dropout=0.3), layers
    ).double()
    model.eval()
    x, lengths, y = batch()
    expected = model(x, lengths, y).log_softmax(-1)
    memory, s = model.encode(x, lengths)
    s = s.unsqueeze(1)
    for i in range(y.size(1)):
        log_p, s, a = model.step(y[:, i : i + 1], s, memory)
        torch.testing.assert_close(log_p[:, 0], expected[:, i], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(a.sum(-1), torch.ones_like(a[..., 0]))
        past_the_end = torch.arange(x.size(1)) >= lengths[:, None]
        assert torch.all(a[:, 0][past_the_end] == 0)


@pytest.mark.parametrize("layers", ["torch", "seqkern"])
def test_neighbours_and_padding_do_not_change_a_row(layers):
    model = RNNSearch(SIZES, layers).double()
    x, lengths, y = batch()
    together = model(x, lengths, y)
    wider = model(F.pad(x, (0, 4), value=7), lengths, y)  # what stands past the end is not read
    torch.testing.assert_close(wider, together, rtol=1e-12, atol=1e-13)
    for b in range(len(x)):
        alone = model(x[b : b + 1, : lengths[b]], lengths[b : b + 1], y[b : b + 1])
        torch.testing.assert_close(alone[0], together[b], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("score", ["dot", "general"])
def test_luongs_scores(score):
    """Both layers, in teacher forcing and step by step, against the formula."""
    x, lengths, y = batch()
    ours, theirs = (model.double() for model in both(replace(SIZES, score=score)))
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    torch.testing.assert_close(ours(x, lengths, y), theirs(x, lengths, y), rtol=1e-10, atol=1e-12)
    memory, s = theirs.encode(x, lengths)
    log_p, _, a = theirs.step(y[:, :1], s.unsqueeze(1), memory)
    scores = ours(x, lengths, y[:, :1])
    torch.testing.assert_close(log_p, scores.log_softmax(-1), rtol=1e-10, atol=1e-12)
    u = theirs.decoder.attention.u
    e = torch.einsum("bh,bjh->bj", s, u(memory.h))
    e[torch.arange(x.size(1)) >= lengths[:, None]] = -torch.inf
    torch.testing.assert_close(a[:, 0], e.softmax(-1), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("layers", ["torch", "seqkern"])
def test_hypotheses_of_a_source_are_rows_of_their_own(layers):
    model = RNNSearch(SIZES, layers).double()
    x, lengths, _ = batch()
    memory, _ = model.encode(x, lengths)
    y, s = torch.randint(1, 9, (5, 3)), torch.randn(5, 3, 14, dtype=torch.float64)
    together = model.step(y, s, memory)
    for k in range(3):
        alone = model.step(y[:, k : k + 1], s[:, k : k + 1], memory)
        for every, one in zip(together, alone, strict=True):
            torch.testing.assert_close(every[:, k : k + 1], one, rtol=1e-12, atol=1e-13)


def test_gradients_of_padded_rows_are_finite():
    model = RNNSearch(SIZES)
    x, lengths, y = batch()
    model(x, lengths, y).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize(
    ("x", "lengths", "message"),
    [
        (torch.ones(2, 3, dtype=torch.int64), torch.tensor([3, 0]), "1 .. 3, got 0 .. 3"),
        (torch.ones(2, 3, dtype=torch.int64), torch.tensor([4, 1]), "1 .. 3, got 1 .. 4"),
        (torch.ones(2, 3, dtype=torch.int64), torch.tensor([3]), r"\(2, 3\) and \(1,\)"),
        (torch.ones(3, dtype=torch.int64), torch.tensor([3]), r"\(3,\) and \(1,\)"),
        (torch.ones(0, 3, dtype=torch.int64), torch.ones(0), "B >= 1"),
    ],
)
def test_bad_sources_are_refused(x, lengths, message):
    with pytest.raises(ValueError, match=message):
        RNNSearch(SIZES).encode(x, lengths)


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match="hidden must be at least 1, got 0"):
        RNNSearchConfig(11, 9, hidden=0)
    with pytest.raises(ValueError, match="hidden must be even, half for each direction, got 7"):
        RNNSearchConfig(11, 9, hidden=7)
    with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\), got 1"):
        RNNSearchConfig(11, 9, dropout=1)
    with pytest.raises(ValueError, match=r"score must be one of .* got 'cosine'"):
        RNNSearchConfig(11, 9, score="cosine")
    with pytest.raises(ValueError, match=r"layers must be one of .* got 'cudnn'"):
        RNNSearch(SIZES, "cudnn")
