"""seqkern.nn.RNN, LSTM and GRU against torch.nn: values, gradients, dropout masks and errors."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence

import seqkern.nn

# torch.nn.LSTM warns of its own slow path.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported")

NAMES = ("RNN", "LSTM", "GRU")


def pair(name: str, *args: Any, **kwargs: Any) -> tuple[torch.nn.Module, torch.nn.Module]:
    """torch's layer and ours with the same weights."""
    theirs = getattr(torch.nn, name)(*args, **kwargs)
    ours = getattr(seqkern.nn, name)(*args, **kwargs)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def tensors(result: Any) -> list[Tensor]:
    """All tensors of a layer's result, in order."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, PackedSequence):
        return [result.data]
    return [t for part in result for t in tensors(part)]


def state(name: str, *shapes: tuple[int, ...], **kwargs: Any) -> Any:
    h = torch.randn(shapes[0], **kwargs)
    return (h, torch.randn(shapes[-1], **kwargs)) if name == "LSTM" else h


def run_with_gradients(layer: torch.nn.Module, x: Any, hx: Any, seed: int) -> list[Tensor]:
    """Outputs and all gradients of a loss that weighs every output differently."""
    leaves = [] if hx is None else [hx] if isinstance(hx, Tensor) else list(hx)
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    hx = None if hx is None else leaves[0] if isinstance(hx, Tensor) else tuple(leaves)
    data = (x.data if isinstance(x, PackedSequence) else x).clone().requires_grad_()
    torch.manual_seed(seed)
    outputs = tensors(layer(x._replace(data=data) if isinstance(x, PackedSequence) else data, hx))
    weights = torch.Generator().manual_seed(1)
    loss = sum(
        (out * torch.randn(out.shape, generator=weights, dtype=torch.float64)).sum()
        for out in outputs
    )
    assert isinstance(loss, Tensor)
    inputs = [data, *leaves, *layer.parameters()]
    return [out.detach() for out in outputs] + list(torch.autograd.grad(loss, inputs))


def assert_within_budget(actual: Tensor, peer: Tensor, exact: Tensor) -> None:
    """At most twice the peer's distance from the exact value, and one rounding of the largest."""
    assert actual.dtype == peer.dtype
    assert actual.shape == peer.shape
    if actual.numel() == 0:
        return
    band = torch.finfo(actual.dtype).eps * max(1.0, exact.abs().max().item())
    budget = 2 * (peer.double() - exact).abs().max().item() + band
    error = (actual.double() - exact).abs().max().item()
    assert error <= budget, f"error {error:.2e} over the budget {budget:.2e}"


@st.composite
def layer_calls(draw: st.DrawFn, dtype: torch.dtype) -> dict[str, Any]:
    """Constructor arguments, and a call that suits them.

    Dropout masks depend on the dtype, so the float32 grid, which has a float64 run beside it,
    keeps to the probabilities 0 and 1.
    """
    name = draw(st.sampled_from(NAMES))
    hidden = draw(st.integers(1, 9))
    layers = draw(st.integers(1, 3))
    rates = [0.0, 1.0] if dtype == torch.float32 else [0.0, 0.4]
    kwargs: dict[str, Any] = {
        "num_layers": layers,
        "bias": draw(st.booleans()),
        "batch_first": draw(st.booleans()),
        "dropout": draw(st.sampled_from(rates)) if layers > 1 else 0.0,
        "bidirectional": draw(st.booleans()),
        "dtype": dtype,
    }
    if name == "LSTM":
        kwargs["proj_size"] = draw(st.integers(0, hidden - 1))
    if name == "RNN":
        kwargs["nonlinearity"] = draw(st.sampled_from(["tanh", "relu"]))
    return {
        "name": name,
        "args": (draw(st.integers(1, 7)), hidden),
        "kwargs": kwargs,
        "form": draw(st.sampled_from(["batch", "unbatched", "sorted", "unsorted"])),
        "lengths": draw(st.lists(st.integers(1, 6), min_size=1, max_size=5)),
        "given_state": draw(st.booleans()),
    }


def make_input(call: dict[str, Any]) -> tuple[Any, Any]:
    """The input and the state of a drawn call."""
    name, (inputs, hidden), kwargs = call["name"], call["args"], call["kwargs"]
    lengths, form, dtype = call["lengths"], call["form"], kwargs["dtype"]
    rows = kwargs["num_layers"] * (2 if kwargs["bidirectional"] else 1)
    outputs = kwargs.get("proj_size") or hidden
    B, T = len(lengths), max(lengths)
    batch = () if form == "unbatched" else (B,)
    if form == "unbatched":
        x: Any = torch.randn(T, inputs, dtype=dtype)
    else:
        sizes = (B, T) if kwargs["batch_first"] else (T, B)
        x = torch.randn(*sizes, inputs, dtype=dtype)
    if form in ("sorted", "unsorted"):
        in_order = form == "sorted"
        lengths = sorted(lengths, reverse=True) if in_order else lengths
        x = pack_padded_sequence(
            x, torch.tensor(lengths), kwargs["batch_first"], enforce_sorted=in_order
        )
    if not call["given_state"]:
        return x, None
    return x, state(name, (rows, *batch, outputs), (rows, *batch, hidden), dtype=dtype)


def double(value: Any) -> Any:
    return tuple(v.double() for v in value) if type(value) is tuple else value.double()


@settings(max_examples=50, deadline=None, derandomize=True)
@given(layer_calls(torch.float64))
def test_float64_values_and_gradients_equal_torch(call: dict[str, Any]) -> None:
    theirs, ours = pair(call["name"], *call["args"], **call["kwargs"])
    x, hx = make_input(call)
    expected = run_with_gradients(theirs, x, hx, seed=7)
    actual = run_with_gradients(ours, x, hx, seed=7)
    torch.testing.assert_close(actual, expected)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(layer_calls(torch.float32))
def test_float32_values_and_gradients_are_within_the_budget(call: dict[str, Any]) -> None:
    theirs, ours = pair(call["name"], *call["args"], **call["kwargs"])
    x, hx = make_input(call)
    expected = run_with_gradients(theirs, x, hx, seed=7)
    actual = run_with_gradients(ours, x, hx, seed=7)
    exact_hx = None if hx is None else double(hx)
    exact = run_with_gradients(theirs.double(), double(x), exact_hx, seed=7)
    for ours_t, theirs_t, exact_t in zip(actual, expected, exact, strict=True):
        assert_within_budget(ours_t, theirs_t, exact_t)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_dropout_masks_equal_torch_under_one_seed(
    name: str, packed: bool, bidirectional: bool
) -> None:
    theirs, ours = pair(name, 5, 32, 3, dropout=0.5, bidirectional=bidirectional, batch_first=True)
    x: Any = torch.randn(3, 7, 5)
    if packed:
        x = pack_padded_sequence(x, torch.tensor([7, 4, 2]), batch_first=True)
    torch.manual_seed(11)
    expected = tensors(theirs(x))
    after_theirs = torch.rand(3)
    torch.manual_seed(11)
    actual = tensors(ours(x))
    torch.testing.assert_close(actual, expected)
    assert torch.equal(torch.rand(3), after_theirs)  # as many random numbers were taken
    torch.testing.assert_close(tensors(ours.eval()(x)), tensors(theirs.eval()(x)))


def packed_input(features: int = 3, dtype: torch.dtype = torch.float32) -> PackedSequence:
    return pack_padded_sequence(torch.randn(4, 3, features, dtype=dtype), [4, 2, 1])


def wrong_calls(name: str) -> dict[str, Callable[[torch.nn.Module], Any]]:
    """Calls that a layer (3, 4) of the given kind refuses."""
    x = torch.randn(2, 2, 3)

    def hx(*shape: int, **kwargs: Any) -> Any:
        return state(name, shape, **kwargs)

    calls: dict[str, Callable[[torch.nn.Module], Any]] = {
        "1-D input": lambda m: m(x[0, 0]),
        "4-D input": lambda m: m(x[None]),
        "input size": lambda m: m(torch.randn(2, 2, 5)),
        "input size without batch": lambda m: m(torch.randn(2, 5)),
        "input dtype": lambda m: m(x.double()),
        "integer input": lambda m: m(x.long()),
        "input is None": lambda m: m(None),
        "input is a list": lambda m: m([[1.0]]),
        "input on another device": lambda m: m(x.to("meta")),
        "no time step": lambda m: m(x[:0]),
        "no time step without batch": lambda m: m(x[:0, 0]),
        "2-D state for a batch": lambda m: m(x, hx(1, 4)),
        "3-D state without batch": lambda m: m(x[0], hx(1, 1, 4)),
        "state batch": lambda m: m(x, hx(1, 3, 4)),
        "state layers": lambda m: m(x, hx(2, 2, 4)),
        "state size": lambda m: m(x, hx(1, 2, 5)),
        "state dtype": lambda m: m(x, hx(1, 2, 4, dtype=torch.float64)),
        "one state too many": lambda m: m(x, (torch.zeros(1, 2, 4),) * 3),
        "one state of a pair": lambda m: m(x, (torch.zeros(1, 2, 4),)),
        "packed input size": lambda m: m(packed_input(5)),
        "packed input dtype": lambda m: m(packed_input(dtype=torch.float64)),
        "packed 3-D data": lambda m: m(pack_sequence([torch.randn(2, 3, 3)])),
        "packed state batch": lambda m: m(packed_input(), hx(1, 4, 4)),
        "packed state layers": lambda m: m(packed_input(), hx(2, 3, 4)),
        "packed state size": lambda m: m(packed_input(), hx(1, 3, 5)),
        "packed state dtype": lambda m: m(packed_input(), hx(1, 3, 4, dtype=torch.float64)),
    }
    if name == "LSTM":
        calls["one tensor for a pair"] = lambda m: m(x, torch.zeros(1, 2, 4))
    else:
        calls["a pair for one tensor"] = lambda m: m(x, (torch.zeros(1, 2, 4),) * 2)
        calls["packed 2-D state"] = lambda m: m(packed_input(), hx(1, 4))
    return calls


def raised(call: Callable[[], Any]) -> type[BaseException]:
    with pytest.raises(Exception) as caught:  # noqa: PT011 - the type is the result
        call()
    return caught.type


@pytest.mark.parametrize(("name", "case"), [(n, case) for n in NAMES for case in wrong_calls(n)])
def test_wrong_call_raises_the_type_that_torch_raises(name: str, case: str) -> None:
    theirs, ours = pair(name, 3, 4)
    call = wrong_calls(name)[case]
    expected = raised(lambda: call(theirs))
    assert raised(lambda: call(ours)) is expected


def test_inherited_checks_of_a_pair() -> None:
    theirs, ours = pair("LSTM", 3, 4, proj_size=2)
    x, hx = torch.randn(5, 3, 3), (torch.randn(1, 3, 2), torch.randn(1, 3, 4))
    for layer in (theirs, ours):
        layer.check_forward_args(x, hx, None)
        with pytest.raises(RuntimeError, match=r"hidden\[0\]"):
            layer.check_forward_args(x, hx[::-1], None)
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(ours.permute_hidden(hx, order), theirs.permute_hidden(hx, order))


@pytest.mark.parametrize("name", NAMES)
def test_message_names_the_expected_and_the_given_size(name: str) -> None:
    ours = getattr(seqkern.nn, name)(3, 4)
    with pytest.raises(RuntimeError, match=r"input_size = 3, got \(2, 2, 5\)"):
        ours(torch.randn(2, 2, 5))
    with pytest.raises(RuntimeError, match=r"Expected hidden.* size \(1, 2, 4\), got \[1, 3, 4\]"):
        ours(torch.randn(2, 2, 3), state(name, (1, 3, 4)))


WRONG_CONSTRUCTIONS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "no sizes": ((), {}),
    "no hidden size": ((3,), {}),
    "input size 0": ((0, 4), {}),
    "input size of float": ((3.0, 4), {}),
    "hidden size 0": ((3, 0), {}),
    "hidden size of str": ((3, "4"), {}),
    "no layers": ((3, 4, 0), {}),
    "bias of int": ((3, 4), {"bias": 1}),
    "batch_first of int": ((3, 4), {"batch_first": 1}),
    "dropout over 1": ((3, 4, 2), {"dropout": 1.5}),
    "dropout of bool": ((3, 4, 2), {"dropout": True}),
    "dropout of str": ((3, 4, 2), {"dropout": "a"}),
    "proj_size too large": ((3, 4), {"proj_size": 4}),
    "proj_size negative": ((3, 4), {"proj_size": -1}),
    "unknown argument": ((3, 4), {"heads": 2}),
    "unknown nonlinearity": ((3, 4), {"nonlinearity": "gelu"}),
    "unknown nonlinearity by position": ((3, 4, 1, "gelu"), {}),
    "unknown dtype": ((3, 4), {"dtype": "float32"}),
    "too many arguments": ((3, 4, 1, True, False, 0.0, False, 0, None, None, None, None), {}),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", WRONG_CONSTRUCTIONS)
def test_wrong_construction_raises_the_type_that_torch_raises(name: str, case: str) -> None:
    args, kwargs = WRONG_CONSTRUCTIONS[case]
    expected = raised(lambda: getattr(torch.nn, name)(*args, **kwargs))
    assert raised(lambda: getattr(seqkern.nn, name)(*args, **kwargs)) is expected


@pytest.mark.parametrize("name", NAMES)
def test_dropout_with_one_layer_warns(name: str) -> None:
    with pytest.warns(UserWarning, match="dropout"):
        getattr(seqkern.nn, name)(3, 4, dropout=0.5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("given_state", [False, True])
def test_empty_batch(name: str, given_state: bool) -> None:
    theirs, ours = pair(name, 3, 4, 2, bidirectional=True, dtype=torch.float64)
    x = torch.randn(5, 0, 3, dtype=torch.float64)
    hx = state(name, (4, 0, 4), dtype=torch.float64) if given_state else None
    expected = run_with_gradients(theirs, x, hx, seed=0)
    actual = run_with_gradients(ours, x, hx, seed=0)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("wanted", ["x", "hx", "weight_hh_l0", "bias_ih_l0"])
def test_gradient_of_one_input_alone(name: str, wanted: str) -> None:
    theirs, ours = pair(name, 3, 5, dtype=torch.float64)
    gradients = []
    for layer in (theirs, ours):
        torch.manual_seed(3)
        layer.requires_grad_(False)
        x, hx = torch.randn(4, 2, 3).double(), state(name, (1, 2, 5), dtype=torch.float64)
        h = hx[0] if name == "LSTM" else hx
        leaf = {"x": x, "hx": h}.get(wanted)
        leaf = getattr(layer, wanted) if leaf is None else leaf
        leaf.requires_grad_()
        out = tensors(layer(x, hx))
        gradients += torch.autograd.grad(sum(o.square().sum() for o in out), leaf)
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("name", NAMES)
def test_strided_input_and_state(name: str) -> None:
    theirs, ours = pair(name, 3, 4, 2, dtype=torch.float64)
    x = torch.randn(3, 2, 5, dtype=torch.float64).permute(2, 1, 0)  # no unit stride at the end
    hx = state(name, (4, 4, 8), dtype=torch.float64)
    cut = tuple(h[::2, ::2, ::2] for h in hx) if name == "LSTM" else hx[::2, ::2, ::2]
    expected, actual = (run_with_gradients(m, x, cut, seed=0) for m in (theirs, ours))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("name", NAMES)
def test_state_may_be_the_result_of_the_last_call(name: str) -> None:
    theirs, ours = pair(name, 3, 4, 2)
    x = torch.randn(6, 2, 3)
    with torch.no_grad():
        y, hx = ours(x[:4])
        y2, hx = ours(x[4:], hx)
        expected, expected_hx = theirs(x)
    torch.testing.assert_close(torch.cat([y, y2]), expected)
    torch.testing.assert_close(tensors(hx), tensors(expected_hx))
