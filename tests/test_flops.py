"""What FlopCounterMode counts: by hand, beside layers written in PyTorch's products, and whether it
knows the ops whichever is imported first."""

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.rnn import pack_sequence
from torch.utils.flop_counter import FlopCounterMode

import seqkern
from seqkern import nn
from seqkern.ops._flops import FORMULAS


def counted(call: Callable[[], Any]) -> dict[str, int]:
    """The counts of a call by the names of the ops."""
    with FlopCounterMode(display=False) as counter:
        call()
    return {str(op): n for op, n in counter.get_flop_counts().get("Global", {}).items()}


def trained(call: Callable[[], Tensor]) -> tuple[int, int]:
    """What the forward counts, and what the backward does."""
    with FlopCounterMode(display=False) as counter:
        out = call()
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    return counter.get_total_flops(), backward.get_total_flops()


def draw(*shape: int, grad: bool = True) -> Tensor:
    return torch.randn(shape, requires_grad=grad)


# ---- recurrent layers ---------------------------------------------------------------------


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("name", ["GRU", "RNN"])
def test_recurrent_layers_count_as_pytorchs(name: str, bidirectional: bool) -> None:
    """Those that PyTorch computes by products that it counts."""
    x, h0 = draw(5, 3, 4), draw(2 * (1 + bidirectional), 3, 6)
    theirs, ours = (
        getattr(package, name)(4, 6, num_layers=2, bidirectional=bidirectional)
        for package in (torch.nn, seqkern.nn)
    )
    assert trained(lambda: ours(x, h0)[0]) == trained(lambda: theirs(x, h0)[0])
    with torch.no_grad():
        assert sum(counted(lambda: ours(x)).values()) == sum(counted(lambda: theirs(x)).values())


def test_lstm() -> None:
    T, B, I, H, P = 5, 3, 4, 6, 2
    layer = nn.LSTM(I, H, proj_size=P)
    matrices = 4 * H * (I + P) + P * H
    forward, backward = 2 * T * B * matrices, 2 * T * B * (2 * matrices - 4 * H * I)
    x = draw(T, B, I, grad=False)
    assert trained(lambda: layer(x)[0]) == (forward, backward)
    x.requires_grad_()
    assert trained(lambda: layer(x)[0]) == (forward, backward + 2 * T * B * 4 * H * I)
    with torch.no_grad():
        assert counted(lambda: layer(x)) == {"seqkern.recurrent_inference": forward}
    rows = pack_sequence([draw(n, I) for n in (5, 2, 1)])
    assert trained(lambda: layer(rows)[0].data) == tuple(
        n // (T * B) * 8 for n in (forward, backward + 2 * T * B * 4 * H * I)
    )
    layer.requires_grad_(False)
    only = 2 * T * B * matrices
    assert trained(lambda: layer(x)[0]) == (forward, only)


# ---- attention ----------------------------------------------------------------------------


def test_attention() -> None:
    """Five products in the backward: those of the derivative, and the scores again."""
    B, H, Hkv, Tq, Tk, D, Dv = 2, 4, 2, 3, 5, 8, 6
    q, k, v = draw(B, H, Tq, D), draw(B, Hkv, Tk, D), draw(B, Hkv, Tk, Dv)

    def products() -> Tensor:
        keys, values = (t.repeat_interleave(H // Hkv, 1) for t in (k, v))
        return (q @ keys.mT).softmax(-1) @ values

    pairs = B * H * Tq * Tk
    forward, backward = trained(products)
    assert (forward, backward) == (2 * pairs * (D + Dv), 4 * pairs * (D + Dv))
    again = 2 * pairs * D
    for options in ({}, {"causal": "top_left"}, {"softcap": 2.0, "bias": draw(Tq, Tk)}):
        attend = partial(seqkern.attention, q, k, v, **options)
        assert trained(attend) == (forward, backward + again)
    q_lens, k_lens = torch.tensor([3, 1]), torch.tensor([2, 5])
    live = H * (3 * 2 + 1 * 5)
    assert trained(lambda: seqkern.attention(q, k, v, q_lens=q_lens, k_lens=k_lens)) == (
        2 * live * (D + Dv),
        2 * live * (3 * D + 2 * Dv),
    )
    with torch.no_grad():
        only = draw(B, H, Tq, D)
    assert trained(lambda: seqkern.attention(only.requires_grad_(), k.detach(), v.detach())) == (
        forward,
        2 * pairs * (2 * D + Dv),
    )


def test_attention_of_packed_sequences() -> None:
    q, k, v = draw(4, 2, 8), draw(7, 2, 8), draw(7, 2, 6)
    bounds = torch.tensor([0, 1, 4]), torch.tensor([0, 5, 7])
    live = 2 * (1 * 5 + 3 * 2)
    assert trained(lambda: seqkern.attention_varlen(q, k, v, *bounds)) == (
        2 * live * (8 + 6),
        2 * live * (3 * 8 + 2 * 6),
    )


def test_attention_over_a_cache() -> None:
    q, new = draw(2, 4, 1, 8, grad=False), draw(2, 2, 1, 8, grad=False)
    cache, pool = torch.zeros(2, 2, 2, 9, 8), torch.zeros(2, 6, 2, 3, 8)
    lens, table = torch.tensor([3, 4]), torch.arange(6, dtype=torch.int32).view(2, 3)
    call: dict[str, Any] = {"k_lens": lens, "k_new": new, "v_new": new}
    expected = {"seqkern.attention_decode": 2 * 4 * (4 + 5) * (8 + 8)}
    assert counted(lambda: seqkern.attention_decode(q, *cache, **call)) == expected
    paged = call | {"block_table": table}
    assert counted(lambda: seqkern.attention_decode(q, *pool, **paged)) == expected


def test_lengths_without_values_count_in_full() -> None:
    with FakeTensorMode():
        q, lens = draw(2, 4, 3, 8), torch.tensor([1, 2])
        found = counted(lambda: seqkern.attention(q, q, q, k_lens=lens))
        memory, v = draw(2, 5, 4), draw(4)
        more = counted(lambda: seqkern.additive_attention(memory, memory, memory, v, k_lens=lens))
    assert found == {"seqkern.attention": 2 * 2 * 4 * 3 * 3 * (8 + 8)}
    assert more == {"seqkern.additive_attention": 2 * 2 * 5 * 5 * (4 + 4)}


# ---- additive attention and its decoder ---------------------------------------------------


def test_additive_attention() -> None:
    B, Tq, Tk, D, Dv = 2, 3, 5, 4, 6
    query, key, value, v = draw(B, Tq, D), draw(B, Tk, D), draw(B, Tk, Dv), draw(D)

    def products() -> Tensor:
        scores = torch.tanh(query[:, :, None] + key[:, None]) @ v[:, None]
        return scores.squeeze(-1).softmax(-1) @ value

    forward, backward = trained(products)
    again = 2 * B * Tq * Tk * D
    additive = seqkern.additive_attention
    assert trained(lambda: additive(query, key, value, v)) == (forward, backward + again)
    lens = torch.tensor([1, 4])
    assert trained(lambda: additive(query, key, value, v, k_lens=lens)) == tuple(
        n * 5 // (B * Tk) for n in (forward, backward + again)
    )


@pytest.mark.parametrize("mode", ["GRU", "LSTM", "RNN_TANH"])
def test_attention_decoder(mode: str) -> None:
    """With the products around the op, which are PyTorch's."""
    N, T, I, H, Tk, A, C = 4, 3, 2, 7, 5, 6, 8
    G = {"GRU": 3, "LSTM": 4}.get(mode, 1)
    state = draw(N, H)
    call = (
        draw(N, T, I),
        (state, draw(N, H)) if mode == "LSTM" else state,
        draw(2, Tk, A),
        draw(2, Tk, C),
        (draw(A, H), draw(A), draw(A)),
        (draw(G * H, I + C), draw(G * H, H), draw(G * H), draw(G * H)),
    )
    rows, products = N * T, A * H + G * H * (C + H)
    pairs = T * (N // 2) * (2 + 5)
    lens = torch.tensor([2, 5])
    forward, backward = trained(
        lambda: sum(t.sum() for t in seqkern.attention_decoder(*call, mode=mode, k_lens=lens)[:3])
    )
    assert forward == 2 * rows * (products + G * H * I) + 2 * pairs * (A + C)
    assert backward == 2 * rows * (2 * products + 2 * G * H * I) + 4 * pairs * (A + C)


# ---- registration -------------------------------------------------------------------------


def test_every_op_with_products_has_a_formula() -> None:
    """But those that are called below another one, by which they are counted, or where no mode is
    active: the short call on packed weights."""
    names = {op.split("::")[1] for op in torch._C._dispatch_get_all_op_names() if "seqkern" in op}
    without = {"recurrent_pack", "recurrent_prepacked", "cache_append"}
    without |= {n for n in names if n.startswith(("recurrent_block", "recurrent_step"))}
    without |= {n for n in names if n.endswith("cpu_capability")}
    assert names - without == set(FORMULAS)


COUNT = """
import sys, torch
{}
x = torch.zeros(2, 3, 4)
with torch.no_grad(), FlopCounterMode(display=False) as counter:
    seqkern.nn.LSTM(4, 5)(x)
assert counter.get_total_flops() == 2 * 2 * 3 * 4 * 5 * (4 + 5)
"""
COUNTER = "from torch.utils.flop_counter import FlopCounterMode"
ORDERS = {
    "seqkern first": f"import seqkern.nn\nassert 'triton' not in sys.modules\n{COUNTER}",
    "the counter first": f"{COUNTER}\nimport seqkern.nn",
}


@pytest.mark.parametrize("order", ORDERS)
def test_either_may_be_imported_first(order: str) -> None:
    """And seqkern does not import the counter, for it imports Triton."""
    command = [sys.executable, "-P", "-W", "ignore", "-c", COUNT.format(ORDERS[order])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
