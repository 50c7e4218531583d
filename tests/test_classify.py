"""TextCNN, BiLSTM and self-attention: their equations, padding, both layers, and toy tasks."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from seqkern.models.bilstm import POOLS, BiLSTMClassifier, BiLSTMConfig
from seqkern.models.self_attentive import SelfAttentive, SelfAttentiveConfig, penalty
from seqkern.models.textcnn import TextCNN, TextCNNConfig
from tests.cells_by_hand import bilstm_states

EXAMPLES = Path(__file__).parent.parent / "examples"
BOTH = pytest.mark.parametrize("layers", ["torch", "seqkern"])

CNN = TextCNNConfig(11, 3, embedding=5, widths=(2, 4), maps=3, dropout=0.0)
BILSTM = {p: BiLSTMConfig(11, 3, 5, 6, pool=p, attention=4, dropout=0.0) for p in POOLS}
FORWARD = BiLSTMConfig(11, 3, 5, 6, depth=2, directions=1, pool="last", dropout=0.0)
STRUCTURED = SelfAttentiveConfig(11, 3, "structured", 5, 6, 4, rows=3, dropout=0.0)
HEADS = SelfAttentiveConfig(11, 3, "heads", 5, 6, heads=2, dropout=0.0)

MODELS = {
    "textcnn": (TextCNN, CNN),
    "textcnn, stride 2": (TextCNN, TextCNNConfig(11, 3, 5, (2, 3), 3, stride=2, dropout=0.0)),
    **{f"bilstm, {p}": (BiLSTMClassifier, config) for p, config in BILSTM.items()},
    "two lstms, last": (BiLSTMClassifier, FORWARD),
    "structured": (SelfAttentive, STRUCTURED),
    "heads": (SelfAttentive, HEADS),
}
EVERY = pytest.mark.parametrize("name", MODELS)


def build(name, layers="seqkern", seed=3):
    model, config = MODELS[name]
    torch.manual_seed(seed)
    return model(config, layers)


def batch(B=5, T=9):
    lengths = torch.tensor([3, 9, 1, 5, 2][:B])
    x = torch.randint(4, 11, (B, T)).masked_fill(torch.arange(T) >= lengths[:, None], 0)
    return x, lengths


@torch.no_grad()
def pooled_by_hand(p, config, x):
    """u of one sentence of symbols (T,)."""
    forwards, backwards = bilstm_states(p, "lstm", p["embed.weight"][x])
    h = torch.cat([forwards, backwards], 1)
    if config.pool == "last":
        return torch.cat([forwards[-1], backwards[0]])
    if config.pool == "mean":
        return sum(h) / len(x)
    if config.pool == "max":
        return torch.stack([max(unit, key=float) for unit in h.T])
    e = torch.stack([torch.tanh(p["pool.w.weight"] @ h_t + p["pool.w.bias"]) for h_t in h])
    a = (e @ p["pool.v"]).exp()
    return sum(a_t * h_t for a_t, h_t in zip(a / a.sum(), h, strict=True))


def linear(p, name, u):
    return p[f"{name}.weight"] @ u + p[f"{name}.bias"]


@torch.no_grad()
def test_textcnn_is_the_equations():
    """Windows of a sentence, and of zeros after one shorter than the widest filter."""
    for name in ("textcnn", "textcnn, stride 2"):
        model = build(name).double()
        config, p = model.config, dict(model.named_parameters())
        x, lengths = batch()
        scores = model(x, lengths)
        for b, n in enumerate(lengths.tolist()):
            vectors = [p["embed.weight"][symbol] for symbol in x[b, :n]]
            vectors += [torch.zeros(5, dtype=torch.float64)] * (max(config.widths) - n)
            z = []
            for k, h in enumerate(config.widths):
                w, bias = p[f"filters.{k}.weight"], p[f"filters.{k}.bias"]
                for m in range(config.maps):
                    c = [
                        F.relu(sum(w[m, :, j] @ vectors[i + j] for j in range(h)) + bias[m])
                        for i in range(0, len(vectors) - h + 1, config.stride)
                    ]
                    z.append(max(c, key=float))
            expected = linear(p, "output", torch.stack(z))
            torch.testing.assert_close(scores[b], expected, rtol=1e-12, atol=1e-13)


def test_textcnn_rows_are_no_longer_than_max_norm():
    model = build("textcnn")
    with torch.no_grad():
        model.output.weight.mul_(torch.tensor([[100.0], [0.01], [1.0]]))
    before = model.output.weight.clone()
    model.constrain()
    norms = before.norm(dim=1)
    assert norms[0] > 3 > norms[1]
    torch.testing.assert_close(model.output.weight[0], before[0] * 3 / norms[0])
    assert torch.equal(model.output.weight[1:], before[1:])
    free = TextCNN(TextCNNConfig(11, 3, max_norm=0))
    with torch.no_grad():
        free.output.weight.mul_(100)
    before = free.output.weight.clone()
    free.constrain()
    assert torch.equal(free.output.weight, before)


def test_textcnn_vectors_start_uniform():
    weight = TextCNN(TextCNNConfig(500, 3, embedding=40)).embed.weight
    assert not weight[0].any()
    assert -0.25 <= weight.min() < -0.24
    assert 0.24 < weight.max() <= 0.25


@pytest.mark.parametrize("model", [BiLSTMClassifier, SelfAttentive])
def test_vectors_of_the_recurrent_models_start_small(model):
    config = BiLSTMConfig if model is BiLSTMClassifier else SelfAttentiveConfig
    weight = model(config(500, 3)).embed.weight
    assert not weight[0].any()
    assert weight[1:].std().item() == pytest.approx(0.1, rel=0.02)


@BOTH
@pytest.mark.parametrize("pool", POOLS)
def test_bilstm_is_the_equations(pool, layers):
    model = build(f"bilstm, {pool}", layers).double()
    p = dict(model.named_parameters())
    x, lengths = batch()
    scores = model(x, lengths)
    for b, n in enumerate(lengths.tolist()):
        expected = linear(p, "output", pooled_by_hand(p, model.config, x[b, :n]))
        torch.testing.assert_close(scores[b], expected, rtol=1e-12, atol=1e-13)


@BOTH
def test_the_last_state_is_that_of_the_last_layer(layers):
    model = build("two lstms, last", layers).double()
    x, lengths = batch()
    u, _ = model.represent(x, lengths)
    for b, n in enumerate(lengths.tolist()):
        states, _ = model.lstm(model.embed(x[b, :n]).unsqueeze(1))
        torch.testing.assert_close(u[b], states[-1, 0], rtol=1e-12, atol=1e-13)


@BOTH
def test_structured_is_the_equations(layers):
    model = build("structured", layers).double()
    p = dict(model.named_parameters())
    x, lengths = batch()
    y = torch.tensor([0, 1, 2, 0, 1])
    scores, attended = model(x, lengths), model.attend(x, lengths)
    losses = []
    for b, n in enumerate(lengths.tolist()):
        h = torch.cat(bilstm_states(p, "lstm", p["embed.weight"][x[b, :n]]), 1)
        e = (p["w_s2.weight"] @ torch.tanh(p["w_s1.weight"] @ h.T)).exp()  # (r, n)
        a = e / e.sum(1, keepdim=True)
        torch.testing.assert_close(attended.weights[b, :, :n], a, rtol=1e-12, atol=1e-13)
        assert not attended.weights[b, :, n:].any()
        expected = linear(p, "output", torch.cat([row @ h for row in a]))
        torch.testing.assert_close(scores[b], expected, rtol=1e-12, atol=1e-13)
        squares = sum((a[i] @ a[j] - int(i == j)) ** 2 for i in range(3) for j in range(3))
        torch.testing.assert_close(penalty(attended.weights[b : b + 1])[0], squares)
        losses.append(-expected.log_softmax(-1)[y[b]] + model.config.penalty * squares)
    torch.testing.assert_close(model.loss(x, lengths, y), torch.stack(losses).mean())


@BOTH
def test_heads_are_the_equations(layers):
    model = build("heads", layers).double()
    p = dict(model.named_parameters())
    x, lengths = batch()
    scores, weights = model(x, lengths), model.attend(x, lengths, need_weights=True).weights
    for b, n in enumerate(lengths.tolist()):
        h = torch.cat(bilstm_states(p, "lstm", p["embed.weight"][x[b, :n]]), 1)
        q, k, v = (h @ p["heads.in_proj_weight"].T + p["heads.in_proj_bias"]).chunk(3, 1)
        heads = []
        for i, of in enumerate((slice(0, 3), slice(3, 6))):
            a = (q[:, of] @ k[:, of].T / 3**0.5).softmax(-1)
            torch.testing.assert_close(weights[b, i, :n, :n], a, rtol=1e-12, atol=1e-13)
            assert weights[b, i].sum().item() == pytest.approx(n)
            heads.append(a @ v[:, of])
        z = h + torch.cat(heads, 1) @ p["heads.out_proj.weight"].T + p["heads.out_proj.bias"]
        expected = linear(p, "output", z.max(0).values)
        torch.testing.assert_close(scores[b], expected, rtol=1e-12, atol=1e-13)


@BOTH
@EVERY
def test_neighbours_and_padding_do_not_change_a_row(name, layers):
    model = build(name, layers).double()
    x, lengths = batch()
    together = model(x, lengths)
    past = torch.arange(13) >= lengths[:, None]  # and what stands there is not read
    wider = model(F.pad(x, (0, 4)).masked_fill(past, 7), lengths)
    torch.testing.assert_close(wider, together, rtol=1e-12, atol=1e-13)
    for b in range(len(x)):
        alone = model(x[b : b + 1, : lengths[b]], lengths[b : b + 1])
        torch.testing.assert_close(alone[0], together[b], rtol=1e-12, atol=1e-13)


@EVERY
def test_one_seed_gives_both_the_same_parameters(name):
    ours, theirs = build(name).state_dict(), build(name, "torch").state_dict()
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert torch.equal(value, theirs[key]), key


@EVERY
def test_both_layers_train_alike(name):
    """Scores and gradients in float64 to rounding, and the losses of 50 steps in float32."""
    x, lengths = batch()
    y = torch.tensor([0, 1, 2, 2, 1])
    found = []
    for layers in ("torch", "seqkern"):
        model = build(name, layers).double()
        model.loss(x, lengths, y).backward()
        gradients = {n: p.grad for n, p in model.named_parameters()}
        losses, model = [], build(name, layers)
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        for _ in range(50):
            loss = model.loss(x, lengths, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        scores = model.double().eval()(x, lengths)  # a model that is trained in float32
        found.append((scores, gradients, losses, build(name, layers).double()(x, lengths)))
    (_, gradients, losses, scores), (_, our_gradients, our_losses, our_scores) = found
    torch.testing.assert_close(our_scores, scores, rtol=1e-10, atol=1e-12)
    for key, gradient in gradients.items():
        assert gradient is not None, key
        torch.testing.assert_close(our_gradients[key], gradient, rtol=1e-9, atol=1e-12, msg=key)
    assert our_losses[:3] == pytest.approx(losses[:3], rel=1e-5)
    assert our_losses == pytest.approx(losses, rel=1e-4)
    assert losses[-1] < 0.8 * losses[0]


@EVERY
def test_empty_sequences_are_refused(name):
    model = build(name)
    with pytest.raises(ValueError, match=r"lengths must be in 1 .. 3, got 0 .. 3"):
        model(torch.ones(2, 3, dtype=torch.int64), torch.tensor([3, 0]))
    with pytest.raises(ValueError, match=r"B >= 1, got \(2, 3\) and \(1,\)"):
        model(torch.ones(2, 3, dtype=torch.int64), torch.tensor([3]))


@pytest.mark.parametrize(
    ("config", "wrong", "message"),
    [
        (TextCNNConfig, {"widths": ()}, r"widths must be whole numbers of at least 1, got \(\)"),
        (TextCNNConfig, {"widths": [3, 0]}, r"at least 1, got \(3, 0\)"),
        (TextCNNConfig, {"max_norm": -1.0}, "max_norm must not be negative, got -1"),
        (TextCNNConfig, {"stride": 0}, "stride must be at least 1, got 0"),
        (BiLSTMConfig, {"pool": "sum"}, r"pool must be one of .* got 'sum'"),
        (BiLSTMConfig, {"hidden": 7}, "hidden must be even, half for each direction, got 7"),
        (BiLSTMConfig, {"directions": 3}, "directions must be 1 or 2, got 3"),
        (BiLSTMConfig, {"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        (SelfAttentiveConfig, {"kind": "soft"}, r"kind must be one of .* got 'soft'"),
        (SelfAttentiveConfig, {"penalty": -0.5}, "penalty must not be negative, got -0.5"),
        (SelfAttentiveConfig, {"kind": "heads", "heads": 3}, "multiple of heads = 3, got 200"),
        (SelfAttentiveConfig, {"hidden": 5}, "hidden must be even, half for each direction, got 5"),
    ],
)
def test_bad_sizes_are_refused(config, wrong, message):
    with pytest.raises(ValueError, match=message):
        config(11, 3, **wrong)


@EVERY
def test_other_layers_are_refused(name):
    with pytest.raises(ValueError, match=r"layers must be one of .* got 'cudnn'"):
        build(name, "cudnn")


def train(model: nn.Module, draw, steps, lr=3e-3, rows=32):
    optimizer = torch.optim.Adam(model.parameters(), lr)
    for _ in range(steps):
        loss = model.loss(*draw(rows))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    x, lengths, y = draw(512)
    with torch.no_grad():
        return (model(x, lengths).argmax(-1) == y).double().mean().item()


def keyword(rows, T=20, symbols=40, labels=4):
    """One of `labels` words somewhere in a sentence of other words: which one?"""
    x = torch.randint(labels, symbols, (rows, T))
    lengths, y = torch.randint(5, T + 1, (rows,)), torch.randint(labels, (rows,))
    x[torch.arange(rows), (torch.rand(rows) * lengths).long()] = y
    return x, lengths, y


def first_word(rows, T=100, symbols=12, labels=4):
    """The first of T words decides, and what follows is noise of other words."""
    x = torch.randint(labels, symbols, (rows, T))
    x[:, 0] = torch.randint(labels, (rows,))
    return x, torch.full((rows,), T), x[:, 0].clone()


def test_textcnn_spots_keywords():
    torch.manual_seed(1)
    model = TextCNN(TextCNNConfig(40, 4, embedding=16, maps=16, dropout=0.1, pad=39))
    assert train(model, keyword, 250) >= 0.99


@pytest.mark.parametrize("kind", ["structured", "heads"])
def test_self_attention_spots_keywords(kind):
    torch.manual_seed(1)
    config = SelfAttentiveConfig(40, 4, kind, 16, 16, 16, rows=2, dropout=0.0, pad=39)
    model = SelfAttentive(config)
    assert train(model, keyword, 200, 1e-2) >= 0.99


@pytest.mark.parametrize("pool", ["last", "max", "attention"])
def test_what_a_long_sentence_lets_through(pool):
    """Max pooling has h_1 itself; the last state of a forward LSTM has to carry it 99 steps."""
    torch.manual_seed(1)
    sizes = {"embedding": 16, "hidden": 16, "directions": 1, "attention": 16, "dropout": 0.0}
    accuracy = train(
        BiLSTMClassifier(BiLSTMConfig(12, 4, pool=pool, **sizes)), first_word, 120, 1e-2
    )
    if pool == "last":
        assert accuracy <= 0.5
    else:
        assert accuracy >= 0.99


def test_textcnn_example(example, tmp_path):
    out = example("textcnn.py", "--steps", "50", "it was dull", "it was fine")
    assert re.search(r"^step 50: loss \d", out, re.MULTILINE)
    assert float(re.search(r"sentences: ([\d.]+)% right", out)[1]) >= 90
    assert re.findall(r"^(\w+)\t(.*)$", out, re.MULTILINE)[1] == ("good", "it was fine")
    path = tmp_path / "own.tsv"
    path.write_text("".join(f"a\tx{i}\nb\ty{i}\n" for i in range(20)))
    assert re.search(r"^[ab]\tx1$", example("textcnn.py", "--data", str(path), "x1"), re.MULTILINE)


def test_bilstm_example(example):
    out = example("bilstm.py", "--length", "5", "--steps", "2")
    assert re.findall(r"^(\w+)\t[\d.]+% right$", out, re.MULTILINE) == list(POOLS)


@pytest.mark.parametrize("kind", ["structured", "heads"])
def test_self_attentive_example(example, kind):
    out = example("self_attentive.py", "--kind", kind, "--steps", "2")
    for line in out.splitlines()[1:]:
        assert sum(map(int, re.findall(r"(\d+)%", line))) == pytest.approx(100, abs=4)
