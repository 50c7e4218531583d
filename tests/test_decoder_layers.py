"""seqkern.nn.AttentionDecoder: every cell with every attention, sequences and single steps."""

import pytest
import torch
from torch import Tensor, nn

import seqkern.nn
from seqkern.nn import AdditiveAttention, AttentionDecoder, DotAttention, GeneralAttention
from seqkern.nn.decoder import only_attention
from seqkern.ops.choice import HAS_TRITON

H, I, C = 6, 3, 5
CELLS = {
    "gru": lambda: seqkern.nn.GRUCell(I + C, H),
    "gru-torch": lambda: nn.GRUCell(I + C, H, bias=False),
    "lstm": lambda: seqkern.nn.LSTMCell(I + C, H),
    "rnn": lambda: seqkern.nn.RNNCell(I + C, H),
    "relu": lambda: seqkern.nn.RNNCell(I + C, H, nonlinearity="relu"),
}
ATTENTIONS = {
    "additive": lambda: AdditiveAttention(H, H, 4),
    "normalized": lambda: AdditiveAttention(H, H, 4, bias=False, normalize=True),
    "dot": DotAttention,
    "general": lambda: GeneralAttention(H, H),
}
every_cell = pytest.mark.parametrize("cell", CELLS)
every_attention = pytest.mark.parametrize("attention", ATTENTIONS)


def module(cell: str, attention: str) -> AttentionDecoder:
    torch.manual_seed(1)
    return AttentionDecoder(CELLS[cell](), ATTENTIONS[attention]()).double()


def inputs(cell: str, B: int = 3, K: int = 2, T: int = 4):
    torch.manual_seed(2)
    x = torch.randn(B * K, T, I, dtype=torch.float64)
    h, c = torch.randn(2, B * K, H, dtype=torch.float64)
    key = torch.randn(B, 5, H, dtype=torch.float64)
    value = torch.randn(B, 5, C, dtype=torch.float64)
    return x, (h, c) if cell == "lstm" else h, key, value, torch.tensor([5, 1, 3])


def output(state) -> Tensor:
    return state[0] if isinstance(state, tuple) else state


def assert_same(decoder: AttentionDecoder, results: tuple, expected: tuple) -> None:
    """Results of two ways through the decoder, and their gradients by its parameters."""
    torch.testing.assert_close(results, expected, rtol=1e-10, atol=1e-12)
    parameters = list(decoder.parameters())
    ours, theirs = (
        torch.autograd.grad(sum(t.square().sum() for t in r[:3]), parameters)
        for r in (results, expected)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@every_cell
@every_attention
def test_is_attention_then_cell_at_every_step(cell: str, attention: str) -> None:
    decoder = module(cell, attention)
    x, state, key, value, lens = inputs(cell)
    results = decoder(x, state, key, value, k_lens=lens)
    steps = []
    for x_i in x.unbind(1):
        query = output(state).unflatten(0, (3, 2))
        c, a = decoder.attention(query, key, value, k_lens=lens, need_weights=True)
        state = decoder.cell(torch.cat([x_i, c.flatten(0, 1)], -1), state)
        steps.append((output(state), c.flatten(0, 1), a.flatten(0, 1)))
    expected = (*(torch.stack(t, 1) for t in zip(*steps, strict=True)), state)
    assert_same(decoder, results, expected)


@every_cell
def test_one_step_after_another_is_the_one_call(cell: str, monkeypatch) -> None:
    """As on a device that has a kernel for the attention alone."""
    decoder = module(cell, "normalized")
    x, state, key, value, lens = inputs(cell)
    expected = decoder(x, state, key, value, k_lens=lens)
    monkeypatch.setattr("seqkern.nn.decoder.only_attention", lambda device: True)
    monkeypatch.setattr("seqkern.nn.decoder.attention_decoder", None)
    results = decoder(x, state, key, value, k_lens=lens)
    assert_same(decoder, results, expected)


def test_a_gpu_has_kernels_for_the_attention_alone() -> None:
    assert only_attention("cuda") == HAS_TRITON
    assert not only_attention("cpu")
    assert not only_attention("meta")


@every_cell
@every_attention
def test_steps_are_the_sequence(cell: str, attention: str) -> None:
    decoder = module(cell, attention)
    x, state, key, value, lens = inputs(cell)
    s, contexts, weights, last = decoder(x, state, key, value, k_lens=lens)
    u_key = decoder.attention.u(key)
    for i, x_i in enumerate(x.unbind(1)):
        state, c, a = decoder.step(x_i, state, key, value, k_lens=lens, u_key=u_key)
        torch.testing.assert_close(output(state), s[:, i], rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(c, contexts[:, i], rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(a, weights[:, i], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(state, last, rtol=1e-12, atol=1e-13)


# Sizes that are checked are constants of a trace, PyTorch warns.
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("part", ["decoder", "attention"])
def test_jit_trace(part: str) -> None:
    """A graph taken without a gradient has one, and takes other sizes."""
    decoder = module("gru", "additive")
    called = decoder if part == "decoder" else decoder.attention

    def arguments(**sizes: int) -> tuple[Tensor, ...]:
        x, state, key, value, _ = inputs("gru", K=1, **sizes)
        return (x, state, key, value) if part == "decoder" else (state[:, None], key, value)

    with torch.no_grad():
        traced = torch.jit.trace(called, arguments())
    given, found = arguments(B=2, T=6), []
    for function in (traced, called):
        results = function(*given)
        results = results if part == "decoder" else (results,)
        total = torch.stack([t.square().sum() for t in results]).sum()
        found.append([*results, *torch.autograd.grad(total, list(function.parameters()))])
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-13)


def test_the_keys_are_the_values_where_none_are_given() -> None:
    decoder = AttentionDecoder(seqkern.nn.GRUCell(I + H, H), AdditiveAttention(H, H, 4)).double()
    x, state, key, _, _ = inputs("gru")
    for a, b in zip(decoder(x, state, key), decoder(x, state, key, key), strict=True):
        assert torch.equal(a, b)


def test_parameters_are_those_of_cell_and_attention() -> None:
    names = set(module("gru", "additive").state_dict())
    cell = {f"cell.{n}" for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
    assert names == cell | {f"attention.{n}" for n in ("w.weight", "w.bias", "u.weight", "v")}


@pytest.mark.parametrize(
    ("cell", "attention", "error", "message"),
    [
        (nn.GRU(3, 4), DotAttention(), TypeError, "cell must be a GRUCell, .* got GRU"),
        (nn.GRUCell(3, 4), nn.Linear(3, 4), TypeError, "attention must be .* got Linear"),
        (
            nn.GRUCell(3, 4),
            AdditiveAttention(5, 4, 2),
            ValueError,
            "attention must have query_size = hidden_size = 4 of cell, got 5",
        ),
    ],
)
def test_what_does_not_fit_is_refused(cell, attention, error, message) -> None:
    with pytest.raises(error, match=f"AttentionDecoder: {message}"):
        AttentionDecoder(cell, attention)


@every_attention
def test_no_sources_and_no_rows(attention: str) -> None:
    decoder = module("lstm", attention)
    for B, K in ((0, 2), (2, 0)):
        x, state, key, value, _ = inputs("lstm", B, K)
        s, contexts, weights, last = decoder(x, state, key, value)
        assert (s.shape, contexts.shape, weights.shape) == ((0, 4, H), (0, 4, C), (0, 4, 5))
        assert last[1].shape == (0, H)


@every_attention
def test_a_list_for_a_pair(attention: str) -> None:
    decoder = module("lstm", attention)
    x, state, key, value, _ = inputs("lstm")
    expected = decoder(x, state, key, value)
    torch.testing.assert_close(decoder(x, list(state), key, value), expected, rtol=0, atol=0)


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64)


@every_attention
@pytest.mark.parametrize(
    ("cell", "changed", "error", "message"),
    [
        ("gru", {"x": zeros(6, 0, I)}, ValueError, "x must be .* T >= 1"),
        ("gru", {"x": zeros(5, 4, I)}, ValueError, "x must be .* N = 6"),
        ("gru", {"x": zeros(6, I)}, ValueError, r"x must be \(N, T, I\)"),
        ("gru", {"x": zeros(6, 4, I + 1)}, ValueError, "I [+] C|features of the cell's input"),
        ("gru", {"x": zeros(6, 4, I).float()}, ValueError, "float32.*float64|float64.*float32"),
        ("gru", {"x": 1}, TypeError, "x must be a Tensor, got int"),
        ("gru", {"state": zeros(5, H)}, ValueError, "state must have a multiple of B = 3"),
        ("gru", {"state": (zeros(6, H),) * 2}, TypeError, "state must be a Tensor, got tuple"),
        ("gru", {"state": zeros(6, H + 1)}, ValueError, r"must be .* = \("),
        ("gru", {"key": zeros(3, 5)}, ValueError, r"key must be \(B, Tk, "),
        ("gru", {"key": None}, TypeError, "key must be a Tensor, got NoneType"),
        ("gru", {"value": zeros(3, C)}, ValueError, r"value must be \(B, Tk, C\)"),
        ("gru", {"k_lens": [5, 1, 3]}, TypeError, "k_lens must be a Tensor, got list"),
        ("gru", {"k_lens": torch.tensor([5])}, ValueError, r"k_lens must be .*\(3,\), got \(1,\)"),
        ("gru", {"k_lens": zeros(3)}, ValueError, r"k_lens must be torch\.int32"),
        ("gru", {"u_key": 1}, TypeError, "u_key must be a Tensor, got int"),
        ("gru", {"u_key": zeros(3, 4, H)}, ValueError, r"u_key must be .*\(3, 5, [46]\), got"),
        ("gru", {"u_key": zeros(3, 5, 1)}, ValueError, r"u_key must be .*\(3, 5, [46]\), got"),
        ("lstm", {"state": zeros(6, H)}, TypeError, r"state must be \(s_0, c_0\), got Tensor"),
        ("lstm", {"state": (zeros(6, H), None)}, TypeError, "must be a Tensor, got NoneType"),
        (
            "lstm",
            {"state": (zeros(6, H), zeros(6, H + 1))},
            ValueError,
            r"state must be \(N, H\) = \(6, 6\)",
        ),
    ],
)
def test_wrong_calls_name_the_argument(cell, attention, changed, error, message) -> None:
    decoder = module(cell, attention)
    given = dict(zip(("x", "state", "key", "value"), inputs(cell), strict=False)) | changed
    with pytest.raises(
        error, match=f"(AttentionDecoder|attention_decoder|attention_with_weights): .*{message}"
    ):
        decoder(**given)
