"""RNNLM, NNLM, TransformerLM: their equations, their state, and the two sets of layers."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_sequence

from seqkern.models.fast_weights import FastWeights, FastWeightsConfig
from seqkern.models.hyperlstm import HyperLSTM, HyperLSTMConfig
from seqkern.models.nnlm import NNLM, NNLMConfig
from seqkern.models.rnnlm import RNNLM, RNNLMConfig, gradient_norms
from seqkern.models.transformer_lm import TransformerLM, TransformerLMConfig

V = 11
MODELS = {
    "rnn": (RNNLM, RNNLMConfig(V, "RNN", 5, 7, 2)),
    "lstm": (RNNLM, RNNLMConfig(V, "LSTM", 5, 7, 2)),
    "gru": (RNNLM, RNNLMConfig(V, "GRU", 5, 7, 1)),
    "tied": (RNNLM, RNNLMConfig(V, "LSTM", 6, 6, 2, tied=True)),
    "nnlm": (NNLM, NNLMConfig(V, 4, 5, 7)),
    "direct": (NNLM, NNLMConfig(V, 2, 5, 7, direct=True)),
    "transformer": (TransformerLM, TransformerLMConfig(V, 12, 3, 2, 20)),
    "hyper": (HyperLSTM, HyperLSTMConfig(V, 5, 7, 4, 3)),
}
EVERY = pytest.mark.parametrize("name", MODELS)
LAYERS = pytest.mark.parametrize("layers", ["torch", "seqkern"])


def make(name, layers="seqkern", seed=3):
    model, config = MODELS[name]
    torch.manual_seed(seed)
    return model(config, layers)


def text(B=3, T=9):
    return torch.randint(V, (B, T))


def rnnlm_by_hand(model, x):
    """Scores (T, V) of one text (T,), symbol by symbol, from the module docstring."""
    p, config = dict(model.named_parameters()), model.config
    h = [torch.zeros(config.hidden, dtype=torch.float64) for _ in range(config.depth)]
    c, scores = list(h), []
    for w in x:
        below = p["embed.weight"][w]
        for l in range(config.depth):
            ih = p[f"recurrent.weight_ih_l{l}"] @ below + p[f"recurrent.bias_ih_l{l}"]
            hh = p[f"recurrent.weight_hh_l{l}"] @ h[l] + p[f"recurrent.bias_hh_l{l}"]
            if config.cell == "RNN":
                h[l] = torch.tanh(ih + hh)
            elif config.cell == "LSTM":
                i, f, g, o = (ih + hh).chunk(4)
                c[l] = torch.sigmoid(f) * c[l] + torch.sigmoid(i) * torch.tanh(g)
                h[l] = torch.sigmoid(o) * torch.tanh(c[l])
            else:
                (ir, iz, i_n), (hr, hz, hn) = ih.chunk(3), hh.chunk(3)
                z = torch.sigmoid(iz + hz)
                h[l] = (1 - z) * torch.tanh(i_n + torch.sigmoid(ir + hr) * hn) + z * h[l]
            below = h[l]
        output = p["embed.weight"] if config.tied else p["output.weight"]
        scores.append(output @ below + p["output.bias"])
    return torch.stack(scores)


def nnlm_by_hand(model, x):
    p, n = dict(model.named_parameters()), model.config.order
    before = [model.config.start] * (n - 2) + x.tolist()
    scores = []
    for t in range(len(x)):
        window = before[t : t + n - 1]
        features = torch.cat([p["C.weight"][w] for w in reversed(window)])
        y = p["U.bias"] + p["U.weight"] @ torch.tanh(p["H.bias"] + p["H.weight"] @ features)
        scores.append(y + p["W.weight"] @ features if "W.weight" in p else y)
    return torch.stack(scores)


def transformer_by_hand(model, x):
    """One position after the other, each attending to those before by a loop over heads."""
    p, n = dict(model.named_parameters()), model.config.heads

    def norm(h, name):
        centred = h - h.mean()
        h = centred / torch.sqrt(centred.pow(2).mean() + 1e-5)
        return h * p[f"{name}.weight"] + p[f"{name}.bias"]

    h = [p["embed.weight"][w] + p["positions.weight"][t] for t, w in enumerate(x)]
    for l in range(model.config.depth):
        name = f"blocks.{l}"
        qkv = [p[f"{name}.qkv.weight"] @ norm(h_t, f"{name}.norm_1") for h_t in h]
        q, k, v = ([part.chunk(3)[i].view(n, -1) for part in qkv] for i in range(3))
        after = []
        for t, h_t in enumerate(h):
            heads = []
            for j in range(n):
                s = torch.stack([q[t][j] @ k[u][j] for u in range(t + 1)]) / math.sqrt(len(q[t][j]))
                a = s.exp() / s.exp().sum()
                heads.append(sum(a[u] * v[u][j] for u in range(t + 1)))
            a_t = h_t + p[f"{name}.w_o.weight"] @ torch.cat(heads)
            u = p[f"{name}.w_1.weight"] @ norm(a_t, f"{name}.norm_2")
            gelu = u * 0.5 * (1 + torch.erf(u / math.sqrt(2)))
            after.append(a_t + p[f"{name}.w_2.weight"] @ gelu)
        h = after
    return torch.stack([p["embed.weight"] @ norm(h_t, "norm") for h_t in h])


BY_HAND = {RNNLM: rnnlm_by_hand, NNLM: nnlm_by_hand, TransformerLM: transformer_by_hand}


@LAYERS
@pytest.mark.parametrize("name", [name for name in MODELS if MODELS[name][0] in BY_HAND])
def test_scores_are_the_equations(name, layers):
    model, x = make(name, layers).double(), text()
    scores, _ = model(x)
    for b, row in enumerate(x):
        expected = BY_HAND[type(model)](model, row)
        torch.testing.assert_close(scores[b], expected, rtol=1e-11, atol=1e-12)


@LAYERS
@EVERY
def test_a_text_in_pieces_has_the_same_scores(name, layers):
    """With the state carried on, wherever it is cut, symbol by symbol too."""
    model, x = make(name, layers).double(), text()
    whole, last = model(x)
    for cuts in ([9], [4, 5], [1, 2, 6], [1] * 9):
        state, pieces = None, []
        for piece in x.split(cuts, 1):
            scores, state = model(piece, state)
            pieces.append(scores)
        torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-11, atol=1e-12)
        for part, expected in zip(state, last, strict=True):
            torch.testing.assert_close(part, expected, rtol=1e-11, atol=1e-12)
    afresh, _ = model(x[:, 4:])
    looks_back = name != "direct"  # of order 2: it sees one symbol alone
    assert torch.allclose(afresh, whole[:, 4:]) is not looks_back


@EVERY
def test_neighbours_and_later_symbols_do_not_change_a_score(name):
    model, x = make(name).double(), text()
    scores, _ = model(x)
    for b in range(3):
        alone, _ = model(x[b : b + 1, :6])
        torch.testing.assert_close(alone[0], scores[b, :6], rtol=1e-11, atol=1e-12)


@LAYERS
@pytest.mark.parametrize("name", ["rnn", "lstm", "gru"])
def test_packed_texts_are_read_as_each_alone(name, layers):
    model = make(name, layers).double()
    texts = [torch.randint(V, (n,)) for n in (3, 8, 1, 5)]
    packed, state = model(pack_sequence(texts, enforce_sorted=False))
    scores, lengths = torch.nn.utils.rnn.pad_packed_sequence(packed, batch_first=True)
    for b, one in enumerate(texts):
        assert lengths[b] == len(one)
        expected, last = model(one[None])
        torch.testing.assert_close(scores[b, : len(one)], expected[0], rtol=1e-11, atol=1e-12)
        for part, expected_part in zip(state, last, strict=True):
            torch.testing.assert_close(part[:, b], expected_part[:, 0], rtol=1e-11, atol=1e-12)


@EVERY
def test_both_layers_agree_forward_and_backward(name):
    x, gradients = text(), []
    for layers in ("torch", "seqkern"):
        model = make(name, layers).double()
        scores, _ = model(x[:, :-1])
        F.cross_entropy(scores.flatten(0, 1), x[:, 1:].flatten()).backward()
        gradients.append({"scores": scores, **{n: p.grad for n, p in model.named_parameters()}})
    assert gradients[0].keys() == gradients[1].keys()
    for part, value in gradients[0].items():
        torch.testing.assert_close(value, gradients[1][part], rtol=1e-10, atol=1e-12, msg=part)


def losses(model, score, steps=50):
    """Of training steps on one toy batch."""
    # With Adam's own eps a gradient that is nothing but rounding makes as large a step as any.
    optimizer = torch.optim.Adam(model.parameters(), 4e-3, eps=1e-4)
    taken = []
    for _ in range(steps):
        loss = score(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        taken.append(loss.item())
    return torch.tensor(taken, dtype=torch.float64)


def assert_losses_agree(make_one, score):
    """In float64 all of them; in float32 the first, since training grows what rounding begins."""
    ours, theirs = (losses(make_one(layers).double(), score) for layers in ("seqkern", "torch"))
    assert theirs[-1] < 0.95 * theirs[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=0)
    ours, theirs = (losses(make_one(layers), score, 3) for layers in ("seqkern", "torch"))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)


@EVERY
def test_fifty_losses_agree(name):
    x = torch.stack([torch.arange(18) * step % V for step in (1, 2, 3, 4)])

    def score(model):
        scores, _ = model(x[:, :-1])
        return F.cross_entropy(scores.flatten(0, 1), x[:, 1:].flatten())

    assert_losses_agree(lambda layers: make(name, layers), score)


@pytest.mark.parametrize("cell", ["fast", "LSTM", "IRNN"])
def test_fifty_losses_of_a_retrieval_net_agree(cell):
    x, labels = torch.randint(9, (16, 7)), torch.randint(4, (16,))

    def make_one(layers):
        torch.manual_seed(3)
        return FastWeights(FastWeightsConfig(9, 4, 6, 8, 10, cell=cell), layers)

    assert_losses_agree(make_one, lambda model: F.cross_entropy(model(x), labels))


@EVERY
def test_one_seed_gives_both_the_same_parameters(name):
    ours, theirs = make(name).state_dict(), make(name, "torch").state_dict()
    assert ours.keys() == theirs.keys()
    for part, value in ours.items():
        assert torch.equal(value, theirs[part]), part


def test_first_values():
    """Forget gates open, a tied table of size one in its scores, branches scaled by depth."""
    lstm = make("lstm").recurrent
    for l in range(2):
        f = getattr(lstm, f"bias_ih_l{l}") + getattr(lstm, f"bias_hh_l{l}")
        assert torch.equal(f[7:14], torch.ones(7))
        assert not torch.equal(f[:7], torch.zeros(7))
    tied = RNNLM(RNNLMConfig(4000, "LSTM", 64, 64, 1, tied=True))
    assert tied.output.weight is tied.embed.weight
    assert tied.embed.weight.std().item() == pytest.approx(64**-0.5, rel=0.02)
    scores, _ = tied(torch.randint(4000, (4, 16)))
    assert F.cross_entropy(scores.flatten(0, 1), torch.randint(4000, (64,))) < math.log(4000) + 0.1
    transformer = TransformerLM(TransformerLMConfig(500, 128, 4, 8, 64))
    assert transformer.blocks[0].w_1.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert transformer.blocks[0].w_2.weight.std().item() == pytest.approx(0.005, rel=0.02)


def test_gradient_norms_are_the_derivatives():
    """Against finite differences of the loss at the end, in float64."""
    model, x = make("gru").double(), text(B=2, T=6)
    norms = gradient_norms(model, x)
    assert norms.shape == (5,)
    assert all(parameter.grad is None for parameter in model.parameters())

    def loss(e, b):
        h, _ = model.recurrent(e[:, None])
        return F.cross_entropy(model.output(h[-1, 0]), x[b, -1])

    with torch.no_grad():
        for t in range(5):
            found = []
            for b in range(2):
                e = model.embed(x[b, :-1])
                slopes = []
                for d in range(5):
                    step = torch.zeros_like(e)
                    step[t, d] = 1e-6
                    slopes.append((loss(e + step, b) - loss(e - step, b)) / 2e-6)
                found.append(torch.stack(slopes).norm())
            assert norms[t].item() == pytest.approx(sum(found).item() / 2, rel=1e-6)


def test_the_gradient_of_a_simple_network_vanishes():
    """Over 60 symbols an RNN's gradient all but disappears; an open LSTM's does not."""
    torch.manual_seed(1)
    x = torch.randint(V, (8, 61))
    reach = {}
    for cell in ("RNN", "LSTM"):
        norms = gradient_norms(RNNLM(RNNLMConfig(V, cell, 16, 32, 1)), x)
        reach[cell] = (norms[20] / norms[-1]).item()
    assert reach["RNN"] < 1e-6
    assert reach["LSTM"] > 1e3 * reach["RNN"]


@pytest.mark.parametrize("train", [True, False])
def test_dropout_falls_in_training_only(train):
    for model, config in MODELS.values():
        one = model(replace(config, dropout=0.5)).train(train)
        x = text()
        assert torch.equal(one(x)[0], one(x)[0]) is not train


@pytest.mark.parametrize(
    ("make_config", "message"),
    [
        (lambda: RNNLMConfig(V, "QRNN"), "cell must be one of .* got 'QRNN'"),
        (lambda: RNNLMConfig(V, hidden=0), "hidden must be at least 1, got 0"),
        (lambda: RNNLMConfig(V, tied=True), "embedding must equal hidden, got 128 and 256"),
        (lambda: RNNLMConfig(V, dropout=1.0), r"dropout must be in \[0, 1\), got 1"),
        (lambda: NNLMConfig(V, 1), "order must be at least 2"),
        (lambda: NNLMConfig(V, start=V), "start must be in 0 .. 10, got 11"),
        (lambda: TransformerLMConfig(V, 10, 3), "width must be a multiple of heads, got 10 and 3"),
        (lambda: TransformerLM(TransformerLMConfig(V), "cudnn"), "layers must be one of"),
        (lambda: NNLM(NNLMConfig(V), "cudnn"), "layers must be one of"),
    ],
)
def test_bad_sizes_are_refused(make_config, message):
    with pytest.raises(ValueError, match=message):
        make_config()


@EVERY
def test_bad_texts_and_states_are_refused(name):
    model = make(name)
    for x in (torch.zeros(4, dtype=torch.int64), torch.zeros(2, 0, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"x must be \(B, T\)"):
            model(x)
    with pytest.raises(ValueError, match="state must"):
        model(text(), ())


def test_the_context_of_the_transformer_is_its_limit():
    model = make("transformer")
    _, state = model(torch.zeros(1, 15, dtype=torch.int64))
    with pytest.raises(ValueError, match="context is 20 symbols, got 15 before and 6 new ones"):
        model(torch.zeros(1, 6, dtype=torch.int64), state)


def test_gradient_norms_refuse_a_text_without_past():
    with pytest.raises(ValueError, match=r"T >= 2, got \(3, 1\)"):
        gradient_norms(make("gru"), text(3, 1))
