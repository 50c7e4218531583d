"""The recurrent CUDA kernels on an emulator of threads, warps and shared memory: their values
against the float64 reference, and their bits.

The text of the kernels is what nvcc compiles; tests/simt stands in for the machine. Nothing here
says anything of speed, nor of the rounding inside a tensor core.
"""

import importlib
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from seqkern.ops import _recurrent_block as block
from seqkern.ops.choice import choose
from seqkern.reference import recurrent as reference
from seqkern.reference.cells import GATES
from seqkern.testing.tolerance import assert_within_budget, neighbours
from tests.recurrent_layers import layer_arguments
from tests.simt.emulator import Emulator, fits

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
every_mode = pytest.mark.parametrize("mode", list(GATES))
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)

Results = dict[str, Tensor]


def arguments(mode: str, T: int, B: int, I: int, H: int, D: int, dtype, bias: bool = True):
    x, h0, c0, weights = layer_arguments(mode, T, B, I, H, D=D, dtype=dtype)
    if not bias:
        weights = [w for w in weights if w.dim() == 2]
    return x, h0, c0, weights


def named(results: tuple, grads: tuple) -> Results:
    y, h_n, c_n, gates, cells = results
    dx, dh0, dc0, dweights = grads
    given = {"y": y, "h_n": h_n, "c_n": c_n, "gates": gates, "cells": cells}
    given |= {"dx": dx, "dh0": dh0, "dc0": dc0}
    given |= {f"dweights[{i}]": w for i, w in enumerate(dweights)}
    return {name: t for name, t in given.items() if t.numel()}


class Problem:
    """One layer's inputs, and gradients of its outputs."""

    def __init__(self, mode: str, dtype, T=2, B=3, H=5, D=1, lengths=(), bias=True):
        if lengths:
            T, B = lengths[0], len(lengths)
        x, self.h0, self.c0, self.weights = arguments(mode, T, B, 3, H, D, dtype, bias)
        self.mode, self.batch_sizes = mode, None
        if lengths:
            self.batch_sizes = torch.tensor([sum(n > t for n in lengths) for t in range(T)])
            x = x.reshape(T * B, -1)[: sum(lengths)]
        self.x = x
        dy = torch.randn(*x.shape[:-1], D * H).to(dtype)
        dc_n = None if self.c0 is None else torch.randn(self.h0.shape).to(dtype)
        self.grads = (dy, torch.randn(self.h0.shape).to(dtype), dc_n)

    def tensors(self) -> list[Tensor]:
        given = [self.x, self.h0, self.c0, *self.grads, *self.weights]
        return [t for t in given if t is not None]

    def replaced(self, tensors) -> "Problem":
        """The same problem with other tensors, in the order of `tensors()`."""
        new, left = object.__new__(Problem), list(tensors)
        new.mode, new.batch_sizes = self.mode, self.batch_sizes
        new.x, new.h0 = left.pop(0), left.pop(0)
        new.c0 = None if self.c0 is None else left.pop(0)
        new.grads = (left.pop(0), left.pop(0), None if self.c0 is None else left.pop(0))
        new.weights = left
        return new

    def reference(self) -> Results:
        args = (self.x, self.batch_sizes, self.h0, self.c0, self.weights)
        out = reference.recurrent(*args, self.mode)
        saved = (out[0], out[3], out[4])
        return named(out, reference.recurrent_backward(self.grads, *args, saved, self.mode))

    def block(self, seed: int = 0, skeleton: str = "block", groups: int = 1) -> Results:
        args = (self.x, self.batch_sizes, self.h0, self.c0, self.weights)
        machine = Emulator(seed, skeleton, groups)
        out = block.forward(machine.forward, *args, self.mode, True)
        saved = (out[0], out[3], out[4])
        grads = block.backward(machine.backward, self.grads, *args, saved, self.mode, True, True)
        return named(out, grads)


# H around and beyond a warp's units; one slice of the batch, and several with rows to spare.
SHAPES = [
    {"T": 9, "B": 3, "H": 1},
    {"T": 2, "B": 17, "H": 5, "D": 2},
    {"T": 1, "B": 1, "H": 16},
    {"T": 9, "B": 3, "H": 33, "bias": False},
    {"T": 2, "B": 1, "H": 64, "D": 2},
    {"T": 2, "B": 3, "H": 100},
    {"lengths": (9, 7, 7, 2, 1), "H": 5, "D": 2},
    {"lengths": (5, *[4] * 7, 3, 1, 1), "H": 17, "D": 2},
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "-".join(f"{k}{v}" for k, v in s.items()))
@every_dtype
@every_mode
def test_values_against_float64(mode: str, dtype: torch.dtype, shape: dict) -> None:
    problem = Problem(mode, dtype, **shape)
    tensors = problem.tensors()
    exact = problem.replaced(t.double() for t in tensors).reference()
    same = [problem.replaced(near).reference() for near in neighbours(tensors)]
    assert_within_budget(problem.block(), exact, same, dtype)


# Two to four blocks share a slice, of 16 or 32 units each, and one to four warps a group of units.
# As many slices as the emulated device holds run at once; the others follow.
SHARED = [
    ({"T": 4, "B": 3, "H": 20}, 1),
    ({"T": 1, "B": 1, "H": 33, "D": 2, "bias": False}, 1),
    ({"lengths": (5, *[4] * 7, 3, 1, 1), "H": 60, "D": 2}, 1),
    ({"lengths": (3, 2), "H": 40, "D": 2}, 2),
]


@pytest.mark.parametrize("shape", SHARED, ids=lambda s: f"H{s[0]['H']}-{s[1]}")
@pytest.mark.parametrize("skeleton", ["cluster", "grid"])
@every_dtype
@every_mode
def test_values_of_blocks_that_share_a_slice(mode, dtype, skeleton: str, shape) -> None:
    problem = Problem(mode, dtype, **shape[0])
    tensors = problem.tensors()
    exact = problem.replaced(t.double() for t in tensors).reference()
    same = [problem.replaced(near).reference() for near in neighbours(tensors)]
    got = problem.block(3, skeleton, shape[1])
    assert_within_budget(got, exact, same, dtype)


@every_mode
def test_values_of_many_blocks(mode: str) -> None:
    """Eight warps for each group of units, of which four have cells, and one step of k for most."""
    problem = Problem(mode, torch.bfloat16, T=3, B=2, H=125)
    tensors = problem.tensors()
    exact = problem.replaced(t.double() for t in tensors).reference()
    same = [problem.replaced(near).reference() for near in neighbours(tensors)]
    got = problem.block(1, "cluster", 1)
    assert_within_budget(got, exact, same, torch.bfloat16)
    assert_equal(problem.block(2, "grid", 1), got)


def assert_equal(got: Results, expected: Results) -> None:
    for name, t in expected.items():
        assert torch.equal(got[name], t), name


@every_dtype
@every_mode
def test_any_order_of_threads_gives_the_same_bits(mode: str, dtype: torch.dtype) -> None:
    problem = Problem(mode, dtype, lengths=(5, 4, 4, 4, 4, 2, 2, 2, 2, 1), H=33, D=2)
    expected = problem.block()
    for seed in (1, 2):
        assert_equal(problem.block(seed), expected)


@every_dtype
@every_mode
def test_any_order_of_blocks_gives_the_same_bits(mode: str, dtype: torch.dtype) -> None:
    """Whether the values go through a cluster or a grid."""
    problem = Problem(mode, dtype, lengths=(6, 5, 5, 5, 5, 2, 2, 2, 2, 1), H=35, D=2)
    expected = problem.block(0, "cluster")
    for skeleton, seeds in (("cluster", (1, 2)), ("grid", (0, 1, 2))):
        for seed in seeds:
            assert_equal(problem.block(seed, skeleton), expected)


@pytest.mark.parametrize("skeleton", ["block", "grid"])
@every_dtype
@every_mode
def test_a_row_has_the_same_bits_in_any_batch(mode: str, dtype, skeleton: str) -> None:
    T, B, H = 3, 11, 20
    whole = Problem(mode, dtype, T=T, B=B, H=H, D=2)
    expected = whole.block(0, skeleton)
    for first, last in ((0, 1), (3, 5), (8, 11)):
        rows = slice(first, last)
        part = whole.replaced(
            t[:, rows].contiguous() if t.dim() == 3 else t for t in whole.tensors()
        )
        got = part.block(0, skeleton)
        for name in ("y", "h_n", "c_n", "dx", "dh0", "dc0"):
            if name in expected:
                assert torch.equal(got[name], expected[name][:, rows]), (name, rows)


@every_mode
def test_inference_keeps_nothing_and_has_the_bits_of_training(mode: str) -> None:
    p = Problem(mode, torch.bfloat16, T=3, B=2, H=20)
    args = (p.x, p.batch_sizes, p.h0, p.c0, p.weights)
    y, h_n, c_n, gates, cells = block.forward(Emulator().forward, *args, mode, False)
    trained = block.forward(Emulator().forward, *args, mode, True)
    assert gates.numel() == cells.numel() == 0
    assert all(torch.equal(a, b) for a, b in zip((y, h_n, c_n), trained, strict=False))


@pytest.mark.parametrize("given", [(), (0,), (1,), (2,)])
def test_a_gradient_that_is_absent_is_zero(given) -> None:
    p = Problem("LSTM", torch.float32, lengths=(3, 2, 1), H=5, D=2)
    assert p.grads[2] is not None
    kept = [g if i in given else None for i, g in enumerate(p.grads)]
    absent = (kept[0], kept[1], kept[2])
    filled = [
        torch.zeros_like(p.h0 if i else p.grads[0]) if g is None else g for i, g in enumerate(kept)
    ]
    zeros = (filled[0], filled[1], filled[2])
    args = (p.x, p.batch_sizes, p.h0, p.c0, p.weights)
    y, _, _, gates, cells = block.forward(Emulator().forward, *args, p.mode, True)
    got, expected = (
        block.backward(Emulator().backward, g, *args, (y, gates, cells), p.mode, True, True)
        for g in (absent, zeros)
    )
    for a, b in zip((*got[:3], *got[3]), (*expected[:3], *expected[3]), strict=True):
        assert torch.equal(a, b)


@every_mode
def test_large_values_saturate_and_nan_stays_in_its_row(mode: str) -> None:
    p = Problem(mode, torch.float32, T=2, B=3, H=5)
    p.x[:, 0] = 1e4
    p.x[:, 1] = float("nan")
    results = block.forward(Emulator().forward, p.x, None, p.h0, p.c0, p.weights, mode, True)
    exact = p.replaced(t.double() for t in p.tensors()).reference()
    assert results[0][:, 1].isnan().all()
    rest = [0, 2]
    torch.testing.assert_close(results[0][:, rest], exact["y"][:, rest].float())


def test_gradients_that_nobody_needs_are_left_out() -> None:
    p = Problem("GRU", torch.float32, T=2, B=2, H=5)
    args = (p.x, None, p.h0, None, p.weights)
    y, _, _, gates, cells = block.forward(Emulator().forward, *args, "GRU", True)
    dx, dh0, dc0, dweights = block.backward(
        Emulator().backward, p.grads, *args, (y, gates, cells), "GRU", False, False
    )
    assert dx.numel() == dc0.numel() == 0
    assert dh0.shape == p.h0.shape
    assert dweights == []


@every_mode
def test_values_of_the_largest_layer(mode: str) -> None:
    """Most of the weights lie in shared memory there, and all warps work."""
    H = max(h for h in range(193) if fits(mode, torch.bfloat16, h, 227 << 10))
    p = Problem(mode, torch.bfloat16, T=2, B=1, H=H)
    tensors = p.tensors()
    exact = p.replaced(t.double() for t in tensors).reference()
    same = [p.replaced(near).reference() for near in neighbours(tensors)]
    assert_within_budget(p.block(), exact, same, torch.bfloat16)


@pytest.fixture
def cuda_ops(monkeypatch: pytest.MonkeyPatch):
    """seqkern.ops.recurrent, whose kernels for CUDA launch on the emulator of a card of 163 KB."""
    launched = []

    def launch(name: str, call):
        def run(*args):
            launched.append(name)
            return call(*args)

        monkeypatch.setattr(torch.ops.seqkern, name, SimpleNamespace(default=run), raising=False)

    launch("recurrent_block", Emulator().forward)
    launch("recurrent_block_backward", Emulator().backward)

    def fit(mode: str, half: bool, hidden: int, device: int) -> bool:
        return fits(mode, torch.bfloat16 if half else torch.float32, hidden, 163 << 10)

    monkeypatch.setattr(block, "fits", fit)
    return importlib.import_module("seqkern.ops.recurrent"), launched


@pytest.mark.parametrize(
    ("dtype", "H", "blocks"),
    [
        (torch.float32, 5, True),
        (torch.float32, 96, False),
        (torch.float64, 5, False),
    ],
    ids=str,
)
def test_the_kernels_that_the_ops_have_on_cuda(cuda_ops, dtype, H: int, blocks: bool) -> None:
    ops, launched = cuda_ops
    p = Problem("LSTM", dtype, lengths=(3, 2), H=H, D=2)
    args = (p.x, p.batch_sizes, p.h0, p.c0, p.weights)
    out = ops._recurrent_cuda(*args, "LSTM")
    y, h_n, c_n = ops._recurrent_inference_cuda(*args, [], "LSTM")
    grads = ops._recurrent_backward_cuda(
        *p.grads, *args, out[0], out[3], out[4], "LSTM", True, True
    )
    expected = p.reference()
    for name, t in named(out, grads).items():
        torch.testing.assert_close(t, expected[name], rtol=1e-4, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip((y, h_n, c_n), out, strict=False))
    names = ["recurrent_block", "recurrent_block", "recurrent_block_backward"]
    assert launched == (names if blocks else [])


def test_a_refused_layer_is_explained(cuda_ops) -> None:
    x = torch.zeros(1, dtype=torch.bfloat16)
    assert block.refusal("LSTM", x, 144, False) is None
    assert "145 units does not fit the thread blocks" in (
        block.refusal("LSTM", x, 145, False) or ""
    )
    assert "projection" in (block.refusal("LSTM", x, 5, True) or "")
    assert "float64" in (block.refusal("LSTM", x, 5, False, torch.float64) or "")
    assert choose(native=True, device="cuda").kernel == "native"
    refused = choose(native=True, device="cuda", refusal="why")
    assert (refused.kernel, refused.reason) == ("reference", "why")
