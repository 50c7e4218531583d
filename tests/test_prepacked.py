"""Layers after prepack(): the direct call on the snapshot, when it is taken, what it refuses."""

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._pytree import tree_map

import seqkern
import seqkern.nn
from seqkern.nn import rnn
from seqkern.ops.choice import has_native_kernel
from seqkern.ops.recurrent import prepacked_op

pytestmark = pytest.mark.skipif(
    not has_native_kernel("recurrent_prepacked", "cpu"), reason="the C++ extension was not built"
)

NAMES = ("RNN", "LSTM", "GRU")


def layer(name: str, *args: Any, **kwargs: Any) -> Any:
    return getattr(seqkern.nn, name)(*args, **kwargs)


def assert_equal(a: torch.Tensor, b: torch.Tensor) -> None:
    assert torch.equal(a, b)


SHAPES = [{}, {"batch_first": True, "bidirectional": True}, {"bias": False}]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What `prepacked_op` was called with."""
    seen: list[Any] = []

    def record(*args: Any) -> Any:
        seen.append(args)
        return prepacked_op(*args)

    monkeypatch.setattr(rnn, "prepacked_op", record)
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kwargs", [*SHAPES, {"proj_size": 3}], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_the_direct_call_of_a_snapshot_has_the_bits_of_the_ordinary_one(
    name: str, kwargs: dict[str, Any], dtype: torch.dtype, calls: list[Any]
) -> None:
    if name != "LSTM" and "proj_size" in kwargs:
        pytest.skip("only LSTM has projections")
    ours = layer(name, 5, 24, **kwargs).to(dtype)
    x = torch.randn(6, 3, 5, dtype=dtype)
    with torch.no_grad():
        y, states = ours(x)
        again, final = ours(x, states)
        ours.prepack()
        for given in (x, x.mT.contiguous().mT, x.clone().requires_grad_()):
            packed, packed_states = ours(given)
            tree_map(assert_equal, (packed, packed_states), (y, states))
        tree_map(assert_equal, ours(x, states), (again, final))
    assert len(calls) == 4


def test_only_plain_calls_without_gradient_are_direct(calls: list[Any]) -> None:
    ours = layer("LSTM", 3, 8)
    x = torch.randn(4, 2, 3)
    ours.prepack()
    ours(x)
    with torch.no_grad():
        ours(x[:, 0])
        ours(pack_padded_sequence(x, torch.tensor([4, 2])))
        torch.func.vmap(ours)(x.unsqueeze(0))
        with FakeTensorMode(allow_non_fake_inputs=True):
            ours(x)
        with pytest.raises(RuntimeError, match="LSTM bfloat16"), torch.autocast("cpu"):
            ours(x)
        assert calls == []
        negated = torch.view_as_complex(torch.stack([x, -x], -1)).conj().imag
        assert negated.is_neg()
        assert torch.equal(ours(negated)[0], ours(x)[0])
        assert len(calls) == 2


# The layers' checks read sizes, which a trace holds constant.
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning")
@pytest.mark.parametrize("num_layers", [1, 2])
def test_a_trace_holds_the_weights_and_no_snapshot(num_layers: int) -> None:
    ours = layer("LSTM", 3, 8, num_layers)
    x = torch.randn(4, 2, 3)
    ours.prepack()
    with torch.no_grad():
        traced = torch.jit.trace(ours, (x,))
        for parameter in ours.parameters():
            parameter.mul_(0.5)
        ours.unpack()
        x = torch.randn(6, 1, 3)
        tree_map(assert_equal, traced(x), ours(x))


@pytest.mark.parametrize("name", NAMES)
def test_a_prepacked_layer_raises_what_it_raises_unpacked(name: str) -> None:
    ours = layer(name, 3, 8)
    x, h = torch.randn(4, 2, 3), torch.zeros(1, 2, 8)
    state = (h, h) if name == "LSTM" else h
    wrong = [
        (x[..., :2], None),
        (x.double(), None),
        (x[:0], None),
        (x.to("meta"), None),
        (x, (h[:, :1], h) if name == "LSTM" else h[:, :1]),
        (x, (h, h, h) if name == "LSTM" else h.double()),
        (x[0, 0], state),
    ]
    with torch.no_grad():
        for given, hx in wrong:
            with pytest.raises((RuntimeError, ValueError)) as unpacked:
                ours(given, hx)
            ours.prepack()
            with pytest.raises(unpacked.type) as packed:
                ours(given, hx)
            assert str(packed.value) == str(unpacked.value)
            ours.unpack()


def test_explain_of_a_snapshot() -> None:
    ours = layer("GRU", 3, 8)
    x = torch.randn(4, 2, 3)
    ours.prepack()
    (training,) = seqkern.explain(ours, x)
    with torch.no_grad():
        (direct,) = seqkern.explain(ours, x)
        (unbatched,) = seqkern.explain(ours, x[:, 0])
    assert training.op == "seqkern::recurrent"
    assert direct.op == "seqkern::recurrent_prepacked"
    assert unbatched.op == "seqkern::recurrent_inference"
    assert ["prepack" in e.reason for e in (training, direct, unbatched)] == [False, True, True]


def test_a_snapshot_of_another_instruction_set_is_refused() -> None:
    ours = layer("RNN", 3, 16)
    x = torch.randn(4, 2, 3)
    before = torch.ops.seqkern.cpu_capability()
    if before == "portable":
        pytest.skip("this processor has one instruction set only")
    ours.prepack()
    torch.ops.seqkern.set_cpu_capability("portable")
    try:
        with torch.no_grad(), pytest.raises(RuntimeError, match=f"portable, got .* on {before}"):
            ours(x)
    finally:
        torch.ops.seqkern.set_cpu_capability(before)
