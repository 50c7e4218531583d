"""Whatever is wrong, the error names the function or the layer that was called, and the argument
by the name that it has there, not those of the ops behind them."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import seqkern
from seqkern import nn

I, H, A = 4, 5, 6
Call = tuple[Callable[..., Any], dict[str, Any]]
WRONG: dict[str, Callable[[Tensor], Any]] = {
    "a list": lambda t: t.tolist(),
    "another dtype": lambda t: t.long() if t.is_floating_point() else t.double(),
    "another rank": lambda t: t[None, None, None, None],
    "another device": lambda t: t.to("meta"),
}


def draw(*shape: int) -> Tensor:
    return torch.randn(shape)


def cell(gates: int) -> dict[str, Tensor]:
    """The tensors of a cell function."""
    states = {"h": draw(2, H)} | ({"c": draw(2, H)} if gates == 4 else {})
    weights = {"w_ih": draw(gates * H, I), "w_hh": draw(gates * H, H)}
    return {"x": draw(2, I), **states, **weights, "b_ih": draw(gates * H), "b_hh": draw(gates * H)}


def layer(function: Callable[..., Any], gates: int) -> Call:
    """A function of one recurrent layer, its weights by their names."""

    def call(x, h0, w_ih, w_hh, b_ih, b_hh, **given):
        return function(x, h0, weights=[w_ih, w_hh, b_ih, b_hh], **given)

    given = cell(gates)
    states = {f"{name}0": given.pop(name)[None] for name in "hc" if name in given}
    return call, {**given, **states, "x": draw(3, 2, I)}


def one_head(module: nn.DotAttention | nn.GeneralAttention | nn.AdditiveAttention) -> Call:
    key = draw(2, 3, H) if isinstance(module, nn.DotAttention) else draw(2, 3, I)
    given = {"query": draw(2, 2, H), "value": draw(2, 3, 7), "mask": draw(2, 3)}
    return module, {**given, "key": key, "k_lens": torch.tensor([3, 1])}


def decoder(cell: Any, attention: Any) -> Call:
    """The states of an LSTM by their names."""
    module = nn.AttentionDecoder(cell(I + 7, H), attention)

    def call(x, h, key, c=None, **given):
        return module(x, h if c is None else (h, c), key, **given)

    states = {"h": draw(2, H)} | ({"c": draw(2, H)} if cell is nn.LSTMCell else {})
    given = {"x": draw(2, 2, I), **states, "key": draw(2, 3, I), "value": draw(2, 3, 7)}
    return call, {**given, "k_lens": torch.tensor([3, 1])}


def projected(call: Callable[..., Any], given: dict[str, Any], u: torch.nn.Module) -> Call:
    """The same with u_key, beside which key is not read."""
    key = given.pop("key")
    return partial(call, key=key), {**given, "u_key": u(key).detach()}


def calls() -> dict[str, Call]:
    q, kv, rows, cu = draw(2, 4, 1, 8), draw(2, 2, 3, 8), draw(3, 4, 8), torch.tensor([0, 1, 3])
    extras = {"sinks": draw(4), "alibi_slopes": draw(4), "bias": draw(1, 3)}
    lens = {"k_lens": torch.tensor([1, 2])}
    packed = {"q": rows, "k": rows, "v": rows, "cu_q": cu, "cu_k": cu, **extras, "bias": draw(2, 2)}
    cached = {
        "q": q,
        "k_cache": kv,
        "v_cache": kv.clone(),
        "k_new": kv[:, :, :1],
        "v_new": q[:, :2],
    }
    additive = {"query": draw(2, 1, A), "key": draw(2, 3, A), "value": draw(2, 3, 7), "v": draw(A)}
    attention, luong, dot = (
        nn.AdditiveAttention(H, I, A),
        nn.GeneralAttention(H, I),
        nn.DotAttention(),
    )
    return {
        "lstm": layer(seqkern.lstm, 4),
        "gru": layer(seqkern.gru, 3),
        "rnn": layer(seqkern.rnn, 1),
        "lstm_cell": (seqkern.lstm_cell, cell(4)),
        "gru_cell": (seqkern.gru_cell, cell(3)),
        "rnn_cell": (seqkern.rnn_cell, cell(1)),
        "attention": (seqkern.attention, {"q": q, "k": kv, "v": kv, **extras, **lens}),
        "attention_varlen": (seqkern.attention_varlen, packed),
        "attention_decode": (
            seqkern.attention_decode,
            {**cached, **lens, "sinks": draw(4), "alibi_slopes": draw(4)},
        ),
        "additive_attention": (
            seqkern.additive_attention,
            {**additive, **lens, "bias": draw(A), "g": draw(), "mask": draw(1, 3)},
        ),
        "DotAttention": one_head(dot),
        "GeneralAttention": one_head(luong),
        "AdditiveAttention": one_head(attention),
        "DotAttention with u_key": projected(*one_head(dot), dot.u),
        "AdditiveAttention with u_key": projected(*one_head(attention), attention.u),
        "AttentionDecoder with u_key": projected(*decoder(nn.GRUCell, attention), attention.u),
        "AttentionDecoder of a GRUCell": decoder(nn.GRUCell, attention),
        "AttentionDecoder of an LSTMCell": decoder(nn.LSTMCell, attention),
        "AttentionDecoder with Luong's attention": decoder(nn.LSTMCell, luong),
    }


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("name", calls())
def test_errors_name_what_was_called(name: str, wrong: str, autocast: bool) -> None:
    call, given = calls()[name]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        call(**given)
        for argument, t in given.items():
            with pytest.raises((TypeError, ValueError)) as caught:
                call(**given | {argument: WRONG[wrong](t)})
            pattern = rf"{name.split()[0]}: .*\b({argument}|state)\b"
            assert re.match(pattern, str(caught.value)), argument


def test_heads_without_features_and_a_flag_that_is_no_bool() -> None:
    q, cache = draw(2, 4, 1, 0), draw(2, 2, 3, 8)
    with pytest.raises(ValueError, match=r"^attention_decode: q must be .* got \(2, 4, 1, 0\)"):
        seqkern.attention_decode(q, cache, cache, k_lens=torch.tensor([1, 2]))
    tensors: Any = draw(2, 1, A), draw(2, 3, A), draw(2, 3, 7), draw(A)
    o, weights = seqkern.additive_attention(*tensors, return_weights=1)
    assert torch.equal(o, seqkern.additive_attention(*tensors))
    assert weights.shape == (2, 1, 3)


def test_bounds_are_refused_by_the_name_of_the_function() -> None:
    rows, cu = draw(3, 4, 8), torch.tensor([0, 1, 3])
    for wrong, match in [(cu - 1, "cu_q must rise from 0"), (cu[:1], "cu_k must be")]:
        with pytest.raises(ValueError, match=f"^attention_varlen: {match}"):
            seqkern.attention_varlen(rows, rows, rows, wrong, cu)


def test_parts_that_are_no_list() -> None:
    for argument, given in (("os", draw(1, 3, 4)), ("lses", draw(1, 3))):
        parts: dict[str, Any] = {"os": [draw(3, 4)], "lses": [draw(3)], argument: given}
        message = f"^combine_partials: {argument} must be a list or a tuple, got Tensor$"
        with pytest.raises(TypeError, match=message):
            seqkern.combine_partials(**parts)
