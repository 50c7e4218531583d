"""The recurrent kernels on a GPU: every skeleton's values against the float64 reference, that none
hangs, and what a layer has to bear there: graphs, streams, the switch of TF32."""

import subprocess
import sys
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor

import seqkern
from seqkern.ops import _recurrent_block as block
from seqkern.testing import assert_within_budget, neighbours
from tests.simt.emulator import Kind
from tests.test_cuda_kernels import DTYPES, KINDS, Problem, Results, named

pytestmark = pytest.mark.gpu
DEVICE = "cuda"

# From one block to clusters, grids and a launch for each step, as far as each card has them.
HIDDEN = (1, 17, 100, 300, 500, 1000, 2056)
SHAPES = [{"T": 1, "B": 1}, {"T": 4, "B": 19, "D": 2}, {"lengths": (7, 7, 5, 2, 1), "D": 2}]


def on_device(problem: Problem) -> Results:
    """The results of the ops on a GPU."""
    there = problem.replaced(t.to(DEVICE) for t in problem.tensors())
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
    """A card of compute capability 9.0 runs an LSTM of these sizes in all four ways."""
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("older cards have no clusters")
    dtype = torch.float32 if isinstance(kind, str) else kind
    with torch.backends.cudnn.flags(allow_tf32=kind == "tf32"):
        reasons = " ".join(block.reason("LSTM", dtype, H, 0) for H in HIDDEN)
    assert all(word in reasons for word in ("block", "cluster of", "grid of", "each step"))


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
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = layer(x)[0]
        graph.replay()
    assert torch.equal(there, expected)
    assert torch.equal(captured, expected)


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
