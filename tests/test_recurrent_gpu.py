"""The recurrent kernels on a GPU: every skeleton's values against the float64 reference, that none
hangs, and what a layer has to bear there: graphs, streams, other devices, autocast, compilation,
derivatives of derivatives, the switch of TF32."""

import copy
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import seqkern
from seqkern.ops import _recurrent_block as block
from seqkern.testing import assert_within_budget, neighbours
from tests.cuda_graph import capture, check_captured_training
from tests.simt.emulator import Kind
from tests.test_cuda_kernels import DTYPES, KINDS, Problem, Results, named

pytestmark = pytest.mark.gpu
DEVICE = "cuda"

# From one block to clusters, grids and a launch for each step, as far as each card has them; on one
# like the H200 forward and backward in each of these ways, as test_cuda_build.py computes.
HIDDEN = (1, 17, 100, 280, 500, 600, 768, 1000, 2056)
SHAPES = [{"T": 1, "B": 1}, {"T": 4, "B": 19, "D": 2}, {"lengths": (7, 7, 5, 2, 1), "D": 2}]


def on_device(problem: Problem, device: str = DEVICE) -> Results:
    """The results of the ops on a GPU."""
    there = problem.replaced(t.to(device) for t in problem.tensors())
    args = (there.x, there.batch_sizes, there.h0, there.c0, there.weights)
    ops = torch.ops.seqkern
    with torch.backends.cudnn.flags(allow_tf32=problem.kind == "tf32"):
        out = ops.recurrent(*args, there.mode)
        saved = (out[0], out[3], out[4])
        grads = ops.recurrent_backward(*there.grads, *args, *saved, there.mode, True, True)
    return named(out, grads)


def assert_right(problem: Problem, got: Results) -> None:
    """Problem.assert_right with references on the GPU: of large layers they take a core minutes,
    and so many results are no less telling without the neighbours."""
    dtype = torch.float16 if problem.kind == "tf32" else problem.x.dtype
    neighbouring = 4 if problem.h0.size(-1) < 500 else 0

    def reference(tensors: Iterable[Tensor]) -> Results:
        return problem.replaced(t.to(DEVICE) for t in tensors).reference()

    assert {t.dtype for t in got.values()} == {problem.x.dtype}
    exact = reference(t.double() for t in problem.tensors())
    same = map(reference, neighbours([t.to(dtype) for t in problem.tensors()], neighbouring))
    assert_within_budget({n: t.to(dtype) for n, t in got.items()}, exact, list(same), dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("H", HIDDEN)
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("mode", ["LSTM", "GRU", "RNN_TANH", "RNN_RELU"])
def test_values_against_float64(mode: str, kind: Kind, H: int, shape: dict) -> None:
    problem = Problem(mode, kind, H=H, **shape)
    assert_right(problem, on_device(problem))


STEPS = [*SHAPES, {"T": 2, "B": 300}, {"T": 2, "B": 0}, {"T": 3, "B": 2, "bias": False}]


@pytest.mark.parametrize("shape", STEPS, ids=str)
@pytest.mark.parametrize("H", [1, 5, 24, 64, 100])
@pytest.mark.parametrize("kind", DTYPES, ids=str)
@pytest.mark.parametrize("mode", ["LSTM", "GRU", "RNN_TANH", "RNN_RELU"])
def test_values_of_a_launch_for_each_step(mode, kind, H, shape, monkeypatch) -> None:
    monkeypatch.setattr(block, "room", lambda *of: "")
    problem = Problem(mode, kind, H=H, **shape)
    assert_right(problem, on_device(problem))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_skeleton_is_among_the_sizes(kind: Kind) -> None:
    """A card of compute capability 9.0 runs an LSTM of these sizes in all four ways, forward and
    backward."""
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("older cards have no clusters")
    dtype = torch.float32 if isinstance(kind, str) else kind
    with torch.backends.cudnn.flags(allow_tf32=kind == "tf32"):
        products = block.products(dtype)
        for backward in (False, True):
            rooms = [block.room("LSTM", products, H, backward, 0) for H in HIDDEN]
            assert {room.partition(" ")[0] for room in rooms} == {"block", "cluster", "grid", ""}


def test_same_bits_again() -> None:
    for H in HIDDEN:
        problem = Problem("LSTM", torch.bfloat16, T=6, B=9, H=H, D=2)
        first, second = on_device(problem), on_device(problem)
        assert all(torch.equal(t, second[name]) for name, t in first.items()), H


MANY = f"""
import torch, seqkern
for mode in (seqkern.nn.LSTM, seqkern.nn.GRU, seqkern.nn.RNN):
    for dtype in (torch.bfloat16, torch.float32):
        for H in {HIDDEN}:
            for T, B in ((1, 1), (33, 1), (3, 2500)):
                layer = mode(8, H, bidirectional=True).to("{DEVICE}", dtype)
                x = torch.randn(T, B, 8, device="{DEVICE}", dtype=dtype, requires_grad=True)
                layer(x)[0].sum().backward()
torch.{DEVICE}.synchronize()
print("done")
"""


def test_nothing_hangs() -> None:
    """Also where there are more slices than a card runs at once."""
    done = subprocess.run(
        [sys.executable, "-c", MANY], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.stdout == "done\n", done.stderr[-3000:]


@pytest.mark.parametrize("H", HIDDEN)
def test_a_graph_and_another_stream_give_the_bits_of_a_plain_call(H: int) -> None:
    layer = seqkern.nn.LSTM(8, H).to(DEVICE).eval()
    x = torch.randn(5, 3, 8, device=DEVICE)
    with torch.no_grad():
        expected = layer(x)[0]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            there = layer(x)[0]
        torch.cuda.current_stream().wait_stream(stream)
        graph, captured = capture(lambda: layer(x)[0])
        graph.replay()
    assert torch.equal(there, expected)
    assert torch.equal(captured, expected)


@pytest.mark.parametrize("H", HIDDEN)
def test_a_captured_training_step(H: int) -> None:
    check_captured_training(seqkern.nn.LSTM(8, H).to(DEVICE), torch.randn(5, 3, 8, device=DEVICE))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("H", HIDDEN)
def test_a_device_that_is_not_the_current_one(H: int) -> None:
    problem = Problem("LSTM", torch.bfloat16, T=4, B=9, H=H, D=2)
    got = on_device(problem, "cuda:1")
    assert {t.device for t in got.values()} == {torch.device("cuda:1")}
    assert torch.cuda.current_device() == 0
    assert_right(problem, {name: t.to(DEVICE) for name, t in got.items()})


def gradients(layer: torch.nn.Module, x: Tensor, call: Callable[[Tensor], Any]) -> list[Tensor]:
    """The output, and the gradients of a function of it and of the states."""
    x = x.detach().clone().requires_grad_()
    y, states = call(x)
    results = y, *(states if isinstance(states, tuple) else (states,))
    loss = torch.stack([t.float().sin().sum() for t in results]).sum()
    return [y.detach(), *torch.autograd.grad(loss, [x, *layer.parameters()])]


every_layer = pytest.mark.parametrize("mode", ["LSTM", "GRU", "RNN"])


@pytest.mark.parametrize("H", HIDDEN)
@every_layer
def test_autocast_gives_the_bits_of_a_layer_in_its_dtype(mode: str, H: int) -> None:
    layer = getattr(seqkern.nn, mode)(8, H, 2, bidirectional=True).to(DEVICE)
    x = torch.randn(5, 3, 8, device=DEVICE)

    def under_autocast(x: Tensor) -> Any:
        with torch.autocast(DEVICE, torch.bfloat16):
            return layer(x)

    got = gradients(layer, x, under_autocast)
    assert got[0].dtype == torch.bfloat16
    assert {t.dtype for t in got[1:]} == {torch.float32}
    there = copy.deepcopy(layer).bfloat16()
    expected = gradients(there, x.bfloat16(), there)
    assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("H", HIDDEN)
@every_layer
def test_backward_in_eval_mode(mode: str, H: int) -> None:
    """Which cuDNN refuses."""
    layer = getattr(seqkern.nn, mode)(8, H, 2, bidirectional=True).to(DEVICE)
    x = torch.randn(5, 3, 8, device=DEVICE)
    expected, got = (gradients(layer.train(on), x, layer) for on in (True, False))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend: str) -> None:
    layer = seqkern.nn.LSTM(8, 100, 2, bidirectional=True).to(DEVICE)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=backend)
    for T, B in ((4, 3), (6, 9)):
        x = torch.randn(T, B, 8, device=DEVICE)
        got, expected = (gradients(layer, x, call) for call in (compiled, layer))
        torch.testing.assert_close(got, expected)


def second_derivatives(layer: torch.nn.Module, tensors: Sequence[Tensor]) -> Results:
    """Of a penalty on the gradients of x and the parameters, which stand in `tensors`."""
    x, *weights = (t.detach().clone().requires_grad_() for t in tensors)
    names = [name for name, _ in layer.named_parameters()]
    given = dict(zip(names, weights, strict=True))
    y, _ = torch.func.functional_call(layer, given, (x,))
    first = torch.autograd.grad(y.sin().sum(), (x, *weights), create_graph=True)
    penalty = torch.stack([g.square().sum() for g in first]).sum()
    return dict(zip(("x", *names), torch.autograd.grad(penalty, (x, *weights)), strict=True))


@every_layer
def test_double_backward(mode: str) -> None:
    layer = getattr(seqkern.nn, mode)(3, 20, bidirectional=True)
    tensors = [torch.randn(4, 2, 3), *(p.detach() for p in layer.parameters())]
    got = second_derivatives(layer, [t.to(DEVICE) for t in tensors])
    exact = second_derivatives(layer, [t.double() for t in tensors])
    same = [second_derivatives(layer, near) for near in neighbours(tensors)]
    assert_within_budget({n: t.cpu() for n, t in got.items()}, exact, same, torch.float32)


@pytest.mark.parametrize("H", HIDDEN)
def test_tf32_follows_the_switch_of_cudnn(H: int) -> None:
    layer = seqkern.nn.LSTM(8, H).to(DEVICE).eval()
    x = torch.randn(30, 4, 8, device=DEVICE)
    exact = layer.double()(x.double())[0]
    layer.float()
    errors = []
    for allowed in (False, True):
        with torch.backends.cudnn.flags(allow_tf32=allowed):
            said = str(seqkern.explain(layer, x))
            errors.append((layer(x)[0] - exact).abs().max().item())
            assert ("in TF32" in said) == (allowed and "each step" not in said)
    assert errors[0] < 1e-5
    assert errors[1] < 2e-3
