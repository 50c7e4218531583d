"""cuDNN in the place of the recurrent kernels on a GPU, with a row of the table for every layer:
its values against the float64 reference, and the promises that seqkern's own kernels keep."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import seqkern
from seqkern.ops import _recurrent_cudnn as cudnn
from seqkern.testing import assert_within_budget, neighbours
from tests.cuda_graph import capture, check_captured_training
from tests.cudnn_cases import assert_right, results, rows, use_table
from tests.simt.emulator import Kind
from tests.test_cuda_kernels import DTYPES, KINDS, Problem
from tests.test_recurrent_gpu import DEVICE, gradients, second_derivatives

pytestmark = pytest.mark.gpu
every_mode = pytest.mark.parametrize("mode", list(cudnn.MODES))
every_layer = pytest.mark.parametrize("mode", ["LSTM", "GRU", "RNN"])
ROW = rows("any card", 1, (1, 1))[0]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A row for whatever is asked, and the calls of cuDNN."""
    made: list[str] = []

    def counted(name: str) -> Callable:
        call = getattr(cudnn, name)
        return lambda *args: made.append(name) or call(*args)

    use_table(monkeypatch, (ROW,))
    monkeypatch.setattr(cudnn, "row", lambda *of: ROW)
    for name in ("forward", "backward"):
        monkeypatch.setattr(cudnn, name, counted(name))
    return made


# Small hidden sizes, sizes for which cuDNN keeps float16 weights resident, and odd ones.
SHAPES = [
    {"T": 5, "B": 3, "H": 20},
    {"T": 1, "B": 1, "H": 17, "D": 2, "bias": False},
    {"T": 4, "B": 8, "H": 256},
    {"T": 3, "B": 9, "H": 300, "D": 2},
    {"lengths": (7, 7, 5, 2, 1), "H": 40, "D": 2},
    {"lengths": (4, 2), "H": 256},
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
@every_mode
def test_values_against_float64(calls, mode: str, kind: Kind, shape: dict) -> None:
    problem = Problem(mode, kind, I=shape["H"], **shape)
    there = problem.replaced(t.to(DEVICE) for t in problem.tensors())
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=kind == "tf32"):
        got = results(there)
        args = (there.x, there.batch_sizes, there.h0, there.c0, there.weights, [], mode)
        y, h_n, _ = torch.ops.seqkern.recurrent_inference(*args)
    assert calls == ["forward", "backward", "forward"]
    assert_right(problem, got, DEVICE)
    assert_right(problem, got | {"y": y, "h_n": h_n}, DEVICE)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_mode
def test_the_weights_lie_where_cudnn_has_them(mode: str, dtype, D: int, bias: bool) -> None:
    problem = Problem(mode, dtype, H=24, I=10, D=D, bias=bias)
    weights = [w.to(DEVICE) for w in problem.weights]
    # It moves the tensors that it is given into the buffer.
    given, layer = [w.clone() for w in weights], (cudnn.MODES[mode], 24, 0, 1, False, D == 2)
    expected = torch._cudnn_rnn_flatten_weight(given, len(given) // D, 10, *layer)
    assert torch.equal(cudnn.weight_buffer(weights, D), expected)


@every_layer
def test_backward_in_eval_mode_and_again(calls, mode: str) -> None:
    layer = getattr(seqkern.nn, mode)(32, 32, 2).to(DEVICE)
    x = torch.randn(5, 8, 32, device=DEVICE)
    expected, got = (gradients(layer.train(on), x, layer) for on in (True, False))
    assert calls == ["forward", "forward", "backward", "backward"] * 2
    torch.testing.assert_close(got, expected)
    x.requires_grad_()
    y = layer(x)[0].sum()
    first, second = (torch.autograd.grad(y, x, retain_graph=True)[0] for _ in range(2))
    torch.testing.assert_close(first, second)


@every_layer
def test_double_backward(calls, mode: str) -> None:
    layer = getattr(seqkern.nn, mode)(3, 20, bidirectional=True)
    tensors = [torch.randn(4, 2, 3), *(p.detach() for p in layer.parameters())]
    got = second_derivatives(layer, [t.to(DEVICE) for t in tensors])
    assert calls == ["forward", "backward", "backward"]
    exact = second_derivatives(layer, [t.double() for t in tensors])
    same = [second_derivatives(layer, near) for near in neighbours(tensors)]
    assert_within_budget({n: t.cpu() for n, t in got.items()}, exact, same, torch.float32)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(calls, backend: str) -> None:
    """A graph with gradients holds seqkern's op, one without runs cuDNN."""
    layer = seqkern.nn.LSTM(32, 32, 2, bidirectional=True).to(DEVICE)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=backend)
    for T, B in ((4, 3), (6, 9)):
        x = torch.randn(T, B, 32, device=DEVICE)
        got = gradients(layer, x, compiled)
        assert calls == []
        torch.testing.assert_close(got, gradients(layer, x, layer))
        calls.clear()
        with torch.no_grad():
            y = compiled(x)[0]
            assert calls == ["forward"] * 2
            torch.testing.assert_close(y, layer(x)[0])
        calls.clear()


@pytest.mark.parametrize("H", [32, 256, 300])
def test_graphs_of_a_dense_batch(calls, H: int) -> None:
    layer = seqkern.nn.LSTM(H, H).to(DEVICE)
    x = torch.randn(5, 8, H, device=DEVICE)
    with torch.no_grad():
        expected = layer(x)[0]
        graph, captured = capture(lambda: layer(x)[0])
        graph.replay()
    torch.testing.assert_close(captured, expected)
    check_captured_training(layer, x)


@every_layer
def test_autocast(calls, mode: str) -> None:
    layer = getattr(seqkern.nn, mode)(32, 32).to(DEVICE)
    x = torch.randn(5, 8, 32, device=DEVICE)

    def under_autocast(x: Tensor) -> Any:
        with torch.autocast(DEVICE, torch.bfloat16):
            return layer(x)

    got = gradients(layer, x, under_autocast)
    there = copy.deepcopy(layer).bfloat16()
    expected = gradients(there, x.bfloat16(), there)
    assert calls == ["forward", "backward"] * 2
    torch.testing.assert_close(got, [t.to(g.dtype) for t, g in zip(expected, got, strict=True)])


def test_explain(calls) -> None:
    layer, x = seqkern.nn.LSTM(32, 32).to(DEVICE), torch.randn(5, 8, 32, device=DEVICE)
    assert {line.kernel for line in seqkern.explain(layer, x)} == {"cudnn"}
    with torch.backends.cudnn.flags(enabled=False):
        assert {line.kernel for line in seqkern.explain(layer, x)} == {"native"}
        gradients(layer, x, layer)
    assert calls == []
