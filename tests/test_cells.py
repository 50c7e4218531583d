"""seqkern.nn.RNNCell, LSTMCell and GRUCell against torch.nn: values, gradients and errors."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import seqkern.nn

CELLS = ("RNNCell", "LSTMCell", "GRUCell")


def pair(name: str, *args: Any, **kwargs: Any) -> tuple[torch.nn.Module, torch.nn.Module]:
    """torch's cell and ours with the same weights."""
    theirs = getattr(torch.nn, name)(*args, **kwargs)
    ours = getattr(seqkern.nn, name)(*args, **kwargs)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def state(name: str, *shape: int, **kwargs: Any) -> Any:
    h = torch.randn(shape, **kwargs)
    return (h, torch.randn(shape, **kwargs)) if name == "LSTMCell" else h


def run_with_gradients(cell: torch.nn.Module, x: Tensor, hx: Any) -> list[Tensor]:
    """Outputs and all gradients over two steps."""
    leaves = [] if hx is None else [hx] if isinstance(hx, Tensor) else list(hx)
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    hx = None if hx is None else leaves[0] if isinstance(hx, Tensor) else tuple(leaves)
    x = x.clone().requires_grad_()
    result = cell(x * 0.5, cell(x, hx))
    outputs = list(result) if isinstance(result, tuple) else [result]
    loss = sum(((i + 1.0) * out).sin().sum() for i, out in enumerate(outputs))
    assert isinstance(loss, Tensor)
    gradients = torch.autograd.grad(loss, [x, *leaves, *cell.parameters()])
    return [out.detach() for out in outputs] + list(gradients)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(CELLS),
    inputs=st.integers(1, 9),
    hidden=st.integers(1, 17),
    batch=st.one_of(st.none(), st.integers(0, 5)),
    bias=st.booleans(),
    given_state=st.booleans(),
    relu=st.booleans(),
)
def test_values_and_gradients_equal_torch(
    name: str,
    inputs: int,
    hidden: int,
    batch: int | None,
    bias: bool,
    given_state: bool,
    relu: bool,
) -> None:
    kwargs = {"nonlinearity": "relu"} if relu and name == "RNNCell" else {}
    theirs, ours = pair(name, inputs, hidden, bias, dtype=torch.float64, **kwargs)
    shape = () if batch is None else (batch,)
    x = torch.randn(*shape, inputs, dtype=torch.float64)
    hx = state(name, *shape, hidden, dtype=torch.float64) if given_state else None
    expected = run_with_gradients(theirs, x, hx)
    actual = run_with_gradients(ours, x, hx)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("hidden", [1, 33, 64])
def test_float32_is_within_the_budget(name: str, hidden: int) -> None:
    theirs, ours = pair(name, 7, hidden)
    x, hx = torch.randn(3, 7), state(name, 3, hidden)
    expected, actual = run_with_gradients(theirs, x, hx), run_with_gradients(ours, x, hx)
    hx = tuple(h.double() for h in hx) if name == "LSTMCell" else hx.double()
    exact = run_with_gradients(theirs.double(), x.double(), hx)
    for ours_t, theirs_t, exact_t in zip(actual, expected, exact, strict=True):
        assert ours_t.dtype == torch.float32
        band = torch.finfo(torch.float32).eps * max(1.0, exact_t.abs().max().item())
        budget = 2 * (theirs_t - exact_t).abs().max().item() + band
        assert (ours_t - exact_t).abs().max().item() <= budget


def wrong_calls(name: str) -> dict[str, Callable[[torch.nn.Module], Any]]:
    """Calls that a cell (3, 4) of the given kind refuses."""
    x = torch.randn(2, 3)

    def hx(*shape: int, **kwargs: Any) -> Any:
        return state(name, *shape, **kwargs)

    calls: dict[str, Callable[[torch.nn.Module], Any]] = {
        "0-D input": lambda m: m(torch.randn(())),
        "3-D input": lambda m: m(x[None]),
        "3-D state": lambda m: m(x, hx(1, 2, 4)),
        "1-D state for a batch": lambda m: m(x, hx(4)),
        "1-D state for a batch of one": lambda m: m(x[:1], hx(4)),
        "2-D state without batch": lambda m: m(x[0], hx(1, 4)),
        "input size": lambda m: m(torch.randn(2, 5)),
        "input size without batch": lambda m: m(torch.randn(5)),
        "state size": lambda m: m(x, hx(2, 5)),
        "state batch": lambda m: m(x, hx(3, 4)),
        "state batch of one": lambda m: m(x, hx(1, 4)),
        "input dtype": lambda m: m(x.double()),
        "integer input": lambda m: m(x.long()),
        "state dtype": lambda m: m(x, hx(2, 4, dtype=torch.float64)),
        "input is None": lambda m: m(None),
        "input is a list": lambda m: m([1.0]),
    }
    if name == "LSTMCell":
        calls["one tensor for a pair"] = lambda m: m(x, torch.zeros(2, 2, 4))
        calls["three states"] = lambda m: m(x, (torch.zeros(2, 4),) * 3)
    else:
        calls["a pair for one tensor"] = lambda m: m(x, (torch.zeros(2, 4),) * 2)
    if name == "RNNCell":
        calls["unknown nonlinearity"] = lambda m: type(m)(3, 4, nonlinearity="gelu")(x)
    return calls


@pytest.mark.parametrize(("name", "case"), [(n, case) for n in CELLS for case in wrong_calls(n)])
def test_wrong_call_raises_the_type_that_torch_raises(name: str, case: str) -> None:
    theirs, ours = pair(name, 3, 4)
    call = wrong_calls(name)[case]
    kinds = []
    for cell in (theirs, ours):
        with pytest.raises((ValueError, TypeError, RuntimeError, AttributeError)) as caught:
            call(cell)
        kinds.append(caught.type)
    assert kinds[1] is kinds[0]


@pytest.mark.parametrize("hx", [(None, torch.ones(2, 4)), (torch.ones(2, 4), None), (None, None)])
def test_a_pair_holds_two_tensors(hx: Any) -> None:
    with pytest.raises(TypeError, match=r"LSTMCell: h and c of hx must be Tensors, got .*NoneType"):
        seqkern.nn.LSTMCell(3, 4)(torch.randn(2, 3), hx)


@pytest.mark.parametrize("missing", ["bias_ih", "bias_hh"])
@pytest.mark.parametrize("name", CELLS)
def test_one_bias_alone(name: str, missing: str) -> None:
    theirs, ours = pair(name, 3, 4)
    x, hx = torch.randn(2, 3), state(name, 2, 4)
    for cell in (theirs, ours):
        cell.register_parameter(missing, None)
    torch.testing.assert_close(run_with_gradients(ours, x, hx), run_with_gradients(theirs, x, hx))


@pytest.mark.parametrize("name", CELLS)
def test_list_for_a_pair_and_isinstance(name: str) -> None:
    theirs, ours = pair(name, 3, 4)
    assert isinstance(ours, type(theirs))
    if name == "LSTMCell":
        x, hx = torch.randn(2, 3), list(state(name, 2, 4))
        torch.testing.assert_close(ours(x, hx), theirs(x, hx))


@pytest.mark.parametrize("name", CELLS)
def test_cell_loop_equals_the_layer(name: str) -> None:
    layer = getattr(seqkern.nn, name.removesuffix("Cell"))(3, 5)
    cell = getattr(seqkern.nn, name)(3, 5)
    cell.load_state_dict({key.removesuffix("_l0"): v for key, v in layer.state_dict().items()})
    x = torch.randn(4, 2, 3)
    y, _ = layer(x)
    hx = None
    for t in range(4):
        hx = cell(x[t], hx)
        torch.testing.assert_close(hx[0] if name == "LSTMCell" else hx, y[t])
