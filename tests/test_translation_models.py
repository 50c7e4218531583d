"""Encoder-decoders without recurrent attention: their equations, their steps, their two layers."""

import math

import pytest
import torch
from torch.nn import functional as F

from seqkern.models import Seq2Seq, Seq2SeqConfig, Transformer, TransformerConfig
from seqkern.models.transformer import positions_of
from seqkern.tasks.decoding import beam_search, map_state
from seqkern.tasks.vocab import PAD
from tests.cells_by_hand import gru_step

MODELS = {
    "lstm": lambda layers: Seq2Seq(Seq2SeqConfig(11, 9, "lstm", 5, 6, depth=2), layers),
    "gru": lambda layers: Seq2Seq(Seq2SeqConfig(11, 9, "gru", 5, 6, 1, context=True), layers),
    "post": lambda layers: Transformer(TransformerConfig(11, 9, 8, 2, 12, 2, 0.0), layers),
    "pre": lambda layers: Transformer(
        TransformerConfig(11, 11, 8, 2, 12, 2, 0.0, shared=True, norm_first=True), layers
    ),
}


def make(name, layers="seqkern", seed=3):
    torch.manual_seed(seed)
    model = MODELS[name](layers)
    with torch.no_grad():  # norms and biases that are not their first values
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def batch(B=5, Tx=8, Ty=6):
    lengths = torch.tensor([3, 8, 1, 5, 8][:B])
    x = torch.randint(4, 11, (B, Tx)).masked_fill(torch.arange(Tx) >= lengths[:, None], PAD)
    return x, lengths, torch.randint(1, 9, (B, Ty))


@pytest.mark.parametrize("name", MODELS)
def test_both_layers_agree_forward_and_backward(name):
    """In float64 the two differ by rounding alone, in every gradient."""
    x, lengths, y = batch()
    found = []
    for layers in ("seqkern", "torch"):
        model = make(name, layers).double()
        scores = model(x, lengths, y[:, :-1])
        F.cross_entropy(scores.flatten(0, 1), y[:, 1:].flatten()).backward()
        found.append({"scores": scores, **{n: p.grad for n, p in model.named_parameters()}})
    assert found[0].keys() == found[1].keys()
    for part, value in found[0].items():
        torch.testing.assert_close(value, found[1][part], rtol=1e-9, atol=1e-12, msg=part)


@pytest.mark.parametrize("layers", ["seqkern", "torch"])
@pytest.mark.parametrize("name", MODELS)
def test_steps_are_teacher_forcing(name, layers):
    """Written symbol by symbol, each source in K copies, the probabilities are the same."""
    model = make(name, layers).double().eval()
    x, lengths, y = batch()
    with torch.no_grad():
        expected = model(x, lengths, y).log_softmax(-1)
        memory, s = model.encode(x, lengths)
        s = map_state(lambda t: t.unsqueeze(1).expand(5, 2, *t.shape[1:]), s)
        for i in range(y.size(1)):
            log_p, s, alignment = model.step(y[:, i : i + 1].expand(5, 2), s, memory)
            for k in range(2):
                torch.testing.assert_close(log_p[:, k], expected[:, i], rtol=1e-10, atol=1e-12)
            assert alignment.shape == (5, 2, 8)
            if isinstance(model, Transformer):
                torch.testing.assert_close(alignment.sum(-1), torch.ones(5, 2).double())
                assert not alignment[:, 0][torch.arange(8) >= lengths[:, None]].any()


@pytest.mark.parametrize("name", MODELS)
def test_padding_changes_nothing(name):
    model = make(name).double().eval()
    x, lengths, y = batch()
    with torch.no_grad():
        together = model(x, lengths, y)
        for b, length in enumerate(lengths.tolist()):
            alone = model(x[b : b + 1, :length], lengths[b : b + 1], y[b : b + 1])
            torch.testing.assert_close(together[b], alone[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_no_step_sees_what_comes_after_it(name):
    model = make(name).double().eval()
    x, lengths, y = batch()
    changed = y.clone()
    changed[:, 3:] = (changed[:, 3:] + 1) % 9
    with torch.no_grad():
        before, after = model(x, lengths, y), model(x, lengths, changed)
    torch.testing.assert_close(before[:, :3], after[:, :3], rtol=1e-12, atol=1e-14)
    assert not torch.allclose(before[:, 3:], after[:, 3:])


def test_the_fixed_vector_by_hand():
    """Cho et al.: the GRU's equations symbol by symbol, c = v in every step and in the read-out."""
    model = make("gru").double()
    p = dict(model.named_parameters())

    x, y = torch.tensor([5, 9, 4]), torch.tensor([1, 7, 4])
    v = torch.zeros(6).double()
    for symbol in x:
        v = gru_step(p, "encoder", "_l0", p["embed_x.weight"][symbol], v)
    s, scores = v, []
    for symbol in y:
        e = p["embed_y.weight"][symbol]
        s = gru_step(p, "decoder", "_l0", torch.cat([e, v]), s)
        scores.append(p["output.weight"] @ torch.cat([s, e, v]) + p["output.bias"])
    found = model(x[None], torch.tensor([3]), y[None])[0]
    torch.testing.assert_close(found, torch.stack(scores), rtol=1e-12, atol=1e-13)


def test_the_transformer_by_hand():
    """Equations (1) and (2), the residuals and the positions, one position and head at a time."""
    model = make("post").double()
    p = dict(model.named_parameters())
    d, heads = 8, 2

    def linear(x, name):
        return p[f"{name}.weight"] @ x + p[f"{name}.bias"]

    def norm(x, name):
        x = (x - x.mean()) / torch.sqrt(x.var(unbiased=False) + 1e-5)
        return x * p[f"{name}.norm.weight"] + p[f"{name}.norm.bias"]

    def attend(x, others, name):
        q = linear(x, f"{name}.w_q")
        out = []
        for part in torch.arange(d).view(heads, -1):
            e = [q[part] @ linear(o, f"{name}.w_k")[part] / math.sqrt(d / heads) for o in others]
            a = torch.stack(e).softmax(0)
            values = [linear(o, f"{name}.w_v")[part] for o in others]
            out.append(sum(w * v for w, v in zip(a, values, strict=True)))
        return linear(torch.cat(out), f"{name}.w_o")

    def embed(symbols, side):
        rows = []
        for pos, symbol in enumerate(symbols):
            pe = [
                (math.sin if j % 2 == 0 else math.cos)(pos / 10000 ** ((j - j % 2) / d))
                for j in range(d)
            ]
            e = p[f"embed_{side}.weight"][symbol]
            rows.append(math.sqrt(d) * e + torch.tensor(pe, dtype=torch.float64))
        return rows

    def ffn(x, name):
        return linear(torch.relu(linear(x, f"{name}.ffn.w_1")), f"{name}.ffn.w_2")

    x, y = [5, 9, 4], [1, 7, 4, 2]
    m, s = embed(x, "x"), embed(y, "y")
    for n in range(2):
        layer = f"encoder.{n}"
        m = [norm(t + attend(t, m, f"{layer}.self_attn"), f"{layer}.after_self") for t in m]
        m = [norm(t + ffn(t, layer), f"{layer}.after_ffn") for t in m]
    for n in range(2):
        layer = f"decoder.{n}"
        s = [
            norm(t + attend(t, s[: i + 1], f"{layer}.self_attn"), f"{layer}.after_self")
            for i, t in enumerate(s)
        ]
        s = [norm(t + attend(t, m, f"{layer}.cross_attn"), f"{layer}.after_cross") for t in s]
        s = [norm(t + ffn(t, layer), f"{layer}.after_ffn") for t in s]
    expected = torch.stack(s) @ p["embed_y.weight"].T
    found = model(torch.tensor([x]), torch.tensor([3]), torch.tensor([y]))[0]
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


def test_positions_continue():
    whole = positions_of(0, 9, 6, torch.empty(0))
    torch.testing.assert_close(positions_of(4, 5, 6, torch.empty(0)), whole[4:])


@pytest.mark.parametrize("name", MODELS)
def test_beams_of_any_company(name):
    """A source decodes alone as it does among others, and a beam's score is its target's."""
    model = make(name).double().eval()
    x, lengths, _ = batch()
    together = beam_search(model, x, lengths, beam=3, max_length=7)
    for b, length in enumerate(lengths.tolist()):
        alone = beam_search(model, x[b : b + 1, :length], lengths[b : b + 1], beam=3, max_length=7)
        y = together.y[b][together.y[b] != PAD]
        assert torch.equal(y, alone.y[0][alone.y[0] != PAD])
        torch.testing.assert_close(together.score[b], alone.score[0])


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match=r"cell must be one of .* got 'rnn'"):
        Seq2SeqConfig(5, 5, "rnn")
    with pytest.raises(ValueError, match="multiple of heads, got 9 and 3"):
        TransformerConfig(5, 5, 9, 3)
    with pytest.raises(ValueError, match="one vocabulary for both sides, got 5 and 6"):
        TransformerConfig(5, 6, shared=True)
    x, lengths, y = batch()
    for name in MODELS:
        with pytest.raises(ValueError, match=r"lengths must be in 1 \.\. 8, got 0 \.\. 8"):
            make(name)(x, lengths - torch.tensor([0, 0, 1, 0, 0]), y)
        with pytest.raises(ValueError, match="layers must be one of"):
            make(name, "cudnn")
