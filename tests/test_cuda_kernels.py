"""The recurrent CUDA kernels on an emulator of threads, warps and shared memory: their values
against the float64 reference, and their bits.

The text of the kernels is what nvcc compiles; tests/simt stands in for the machine. Nothing here
says anything of speed, nor of the rounding inside a tensor core.
"""

import importlib
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from seqkern.ops import _recurrent_block as block
from seqkern.ops import _recurrent_steps as steps
from seqkern.reference import recurrent as reference
from seqkern.reference.cells import GATES
from seqkern.testing.tolerance import assert_within_budget, neighbours, relative_error
from tests.recurrent_layers import layer_arguments
from tests.simt.emulator import Emulator, Kind, fits

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = [*DTYPES, "tf32"]  # the last is float32 where products may take 11 bits of a factor
every_mode = pytest.mark.parametrize("mode", list(GATES))
every_kind = pytest.mark.parametrize("kind", KINDS, ids=str)

Results = dict[str, Tensor]


def arguments(mode: str, T: int, B: int, I: int, H: int, D: int, dtype, bias: bool = True):
    x, h0, c0, weights = layer_arguments(mode, T, B, max(I, 1), H, D=D, dtype=dtype)
    if I == 0:  # cells may have no inputs, layers of torch.nn may not
        x = x[..., :0]
        first = range(0, len(weights), len(weights) // D)
        weights = [w[:, :0] if i in first else w for i, w in enumerate(weights)]
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

    def __init__(self, mode: str, kind: Kind, T=2, B=3, H=5, D=1, lengths=(), bias=True, I=3):
        dtype = torch.float32 if isinstance(kind, str) else kind
        if lengths:
            T, B = lengths[0], len(lengths)
        x, self.h0, self.c0, self.weights = arguments(mode, T, B, I, H, D, dtype, bias)
        self.mode, self.kind, self.batch_sizes = mode, kind, None
        if lengths:
            self.batch_sizes = torch.tensor([sum(n > t for n in lengths) for t in range(T)])
            x = x.flatten(0, 1)[: sum(lengths)]
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
        new.mode, new.kind, new.batch_sizes = self.mode, self.kind, self.batch_sizes
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
        forward, backward = machine.forward, machine.backward
        if skeleton == "steps":
            forward = partial(steps.forward, Emulator(seed).step)
            backward = partial(steps.backward, Emulator(seed).step_backward)
        with torch.backends.cudnn.flags(allow_tf32=self.kind == "tf32"):
            out = block.forward(forward, *args, self.mode, True)
            of = (*args, (out[0], out[3], out[4]), self.mode)
            return named(out, block.backward(backward, self.grads, *of, True, True))

    def assert_right(self, got: Results) -> None:
        """Within the budget of the dtype; TF32's is float16's, which keeps as many bits."""
        tensors = self.tensors()
        exact = self.replaced(t.double() for t in tensors).reference()
        dtype = tensors[0].dtype
        if self.kind == "tf32":
            assert {t.dtype for t in got.values()} == {torch.float32}
            dtype = torch.float16
            tensors, got = [t.half() for t in tensors], {n: t.half() for n, t in got.items()}
        same = [self.replaced(near).reference() for near in neighbours(tensors)]
        assert_within_budget(got, exact, same, dtype)


# H around and beyond a warp's units; one slice of the batch, and several with rows to spare.
SHAPES = [
    {"T": 9, "B": 3, "H": 1},
    {"T": 2, "B": 17, "H": 5, "D": 2},
    {"T": 1, "B": 1, "H": 16},
    {"T": 9, "B": 3, "H": 33, "bias": False},
    {"T": 2, "B": 1, "H": 64, "D": 2},
    {"T": 2, "B": 3, "H": 100},
    {"T": 2, "B": 3, "H": 5, "I": 0},
    {"lengths": (9, 7, 7, 2, 1), "H": 5, "D": 2},
    {"lengths": (5, *[4] * 7, 3, 1, 1), "H": 17, "D": 2},
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "-".join(f"{k}{v}" for k, v in s.items()))
@every_kind
@every_mode
def test_values_against_float64(mode: str, kind: Kind, shape: dict) -> None:
    problem = Problem(mode, kind, **shape)
    problem.assert_right(problem.block())


# Of a step, threads take 16 bytes (H = 64, 8 values of two bytes) or one value (odd H); of 300 rows
# there are several blocks of threads, and the last has threads without rows.
STEPS = [*SHAPES, {"T": 2, "B": 300, "H": 3}, {"lengths": (5, 3, 3, 1), "H": 24, "D": 2}]
STEPS += [{"T": 2, "B": 0, "H": 5}]


@pytest.mark.parametrize("shape", STEPS, ids=lambda s: "-".join(f"{k}{v}" for k, v in s.items()))
@pytest.mark.parametrize("kind", DTYPES, ids=str)
@every_mode
def test_values_of_a_launch_for_each_step(mode: str, kind: Kind, shape: dict) -> None:
    problem = Problem(mode, kind, **shape)
    problem.assert_right(problem.block(1, "steps"))


# Two to four blocks share a slice, of 16 to 48 units each, and one to four warps a group of units;
# of three groups, two have three warps and one has two (in the float32 forward two each). As many
# slices as the emulated device holds run at once; the others follow.
SHARED = [
    ({"T": 4, "B": 3, "H": 20}, 1),
    ({"T": 1, "B": 1, "H": 33, "D": 2, "bias": False}, 1),
    ({"lengths": (5, *[4] * 7, 3, 1, 1), "H": 60, "D": 2}, 1),
    ({"lengths": (3, 2), "H": 40, "D": 2}, 2),
    ({"T": 2, "B": 3, "H": 100}, 3),
]


@pytest.mark.parametrize("shape", SHARED, ids=lambda s: f"H{s[0]['H']}-{s[1]}")
@pytest.mark.parametrize("skeleton", ["cluster", "grid"])
@every_kind
@every_mode
def test_values_of_blocks_that_share_a_slice(mode, kind: Kind, skeleton: str, shape) -> None:
    problem = Problem(mode, kind, **shape[0])
    problem.assert_right(problem.block(3, skeleton, shape[1]))


@every_mode
def test_values_of_many_blocks(mode: str) -> None:
    """Eight warps for each group of units, of which four have cells, and one step of k for most."""
    problem = Problem(mode, torch.bfloat16, T=3, B=2, H=125)
    cluster, grid = problem.block(1, "cluster", 1), problem.block(2, "grid", 1)
    problem.assert_right(cluster)
    problem.assert_right(grid)
    assert_equal(forward_of(grid), forward_of(cluster))


@every_kind
@every_mode
def test_values_where_weights_of_a_cluster_lie_in_shared_memory(mode: str, kind: Kind) -> None:
    """Three blocks of eight groups: beyond what registers hold, of pairs of tiles too, and the last
    block has units that do not exist."""
    problem = Problem(mode, kind, T=2, B=2, H=360)
    problem.assert_right(problem.block(1, "cluster", 8))


@pytest.mark.parametrize(("H", "lengths"), [(768, (2,)), (760, (3, 3, 2, 1))], ids=str)
def test_values_of_the_largest_lstm_of_a_cluster(H: int, lengths) -> None:
    """16 blocks of 3 groups each, whose warps share out k unevenly; in the backward each warp has 3
    pairs of output tiles, with weights in registers and in shared memory."""
    problem = Problem("LSTM", torch.bfloat16, lengths=lengths, H=H)
    problem.assert_right(problem.block(1, "cluster", 3))


def assert_equal(got: Results, expected: Results) -> None:
    for name, t in expected.items():
        assert torch.equal(got[name], t), name


def forward_of(results: Results) -> Results:
    """Which has the same order of sums in a cluster and in a grid; the backward has not."""
    names = ("y", "h_n", "c_n", "gates", "cells")
    return {name: t for name, t in results.items() if name in names}


@every_kind
@every_mode
def test_any_order_of_threads_gives_the_same_bits(mode: str, kind: Kind) -> None:
    problem = Problem(mode, kind, lengths=(5, 4, 4, 4, 4, 2, 2, 2, 2, 1), H=33, D=2)
    expected = problem.block()
    for seed in (1, 2):
        assert_equal(problem.block(seed), expected)


@every_kind
@every_mode
def test_any_order_of_blocks_gives_the_same_bits(mode: str, kind: Kind) -> None:
    """And the forward whether h goes through a cluster or a grid."""
    problem = Problem(mode, kind, lengths=(6, 5, 5, 5, 5, 2, 2, 2, 2, 1), H=35, D=2)
    expected = {skeleton: problem.block(0, skeleton) for skeleton in ("cluster", "grid")}
    assert_equal(forward_of(expected["grid"]), forward_of(expected["cluster"]))
    for skeleton, found in expected.items():
        for seed in (1, 2):
            assert_equal(problem.block(seed, skeleton), found)


@pytest.mark.parametrize("skeleton", ["block", "cluster", "grid"])
@every_kind
@every_mode
def test_a_row_has_the_same_bits_in_any_batch(mode, kind: Kind, skeleton: str, monkeypatch) -> None:
    """As far as the launch goes: PyTorch's products around it promise no bits, and are rounded from
    float64 here."""
    monkeypatch.setattr(block, "product", lambda a, b: (a.double() @ b.double()).float())
    T, B, H = 3, 11, 20
    whole = Problem(mode, kind, T=T, B=B, H=H, D=2)
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
def test_tf32_is_taken_where_the_switch_of_cudnn_allows_it(mode: str) -> None:
    """And changes the sums of products alone: what is stored has all bits of float32."""
    problem = Problem(mode, torch.float32, T=3, B=2, H=40)
    tensors = [t.double() for t in problem.tensors()]
    exact, got = problem.replaced(tensors).reference(), {}
    for problem.kind in ("tf32", torch.float32):
        got[problem.kind] = problem.block()
    errors = {kind: relative_error(r["y"], exact["y"]) for kind, r in got.items()}
    assert 1e-5 < errors["tf32"] < 2e-3
    assert errors[torch.float32] < 1e-6
    assert block.products(torch.float32) == "float32"
    with torch.backends.cudnn.flags(allow_tf32=True):
        assert [block.products(dtype) for dtype in DTYPES] == ["tf32", "16 bit", "16 bit"]
    y = got["tf32"]["y"]
    assert not torch.equal(y, (y.view(torch.int32) & -(1 << 13)).view(torch.float32))


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


@pytest.mark.parametrize("skeleton", ["block", "steps"])
@every_mode
def test_autocast_does_not_reach_into_the_ops(mode: str, skeleton: str) -> None:
    p = Problem(mode, torch.float32, lengths=(3, 2), H=5, D=2)
    expected = p.block(0, skeleton)
    with torch.autocast("cpu", torch.bfloat16):
        got = p.block(0, skeleton)
    assert all(torch.equal(got[name], t) for name, t in expected.items())


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
    p.assert_right(p.block())


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
    launch("recurrent_step", Emulator().step)
    launch("recurrent_step_backward", Emulator().step_backward)

    def room(mode: str, products: str, hidden: int, backward: bool, device: int) -> str:
        kinds: dict[str, Kind] = {"16 bit": torch.bfloat16, "float32": torch.float32}
        return "block" if fits(mode, kinds.get(products, products), hidden, 163 << 10) else ""

    monkeypatch.setattr(block, "room", room)
    monkeypatch.setattr(block, "built", lambda device: device < 1)
    return importlib.import_module("seqkern.ops.recurrent"), launched


@pytest.mark.parametrize(
    ("dtype", "H", "skeleton"),
    [(torch.float32, 5, "block"), (torch.float32, 96, "step"), (torch.float64, 5, None)],
    ids=str,
)
def test_the_kernels_that_the_ops_have_on_cuda(cuda_ops, dtype, H: int, skeleton) -> None:
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
    # Three steps in two directions each, where they are not one launch.
    name, each = f"recurrent_{skeleton}", 6 if skeleton == "step" else 1
    names = [name] * 2 * each + [f"{name}_backward"] * each
    assert launched == (names if skeleton else [])


@every_mode
@pytest.mark.parametrize("backward", [False, True])
def test_one_pass_may_go_step_by_step(cuda_ops, monkeypatch, mode: str, backward: bool) -> None:
    """The one that is `backward`, or the forward alone."""
    ops, launched = cuda_ops
    rooms = {backward: "", not backward: "block"}
    monkeypatch.setattr(block, "room", lambda mode, products, H, which, device: rooms[which])
    p = Problem(mode, torch.float32, lengths=(3, 2), H=5, D=2)
    args = (p.x, p.batch_sizes, p.h0, p.c0, p.weights)
    out = ops._recurrent_cuda(*args, mode)
    grads = ops._recurrent_backward_cuda(*p.grads, *args, out[0], *out[3:], mode, True, True)
    p.assert_right(named(out, grads))
    steps_of, at_once = ("_backward", "") if backward else ("", "_backward")
    names = [f"recurrent_block{at_once}", *[f"recurrent_step{steps_of}"] * 6]
    assert sorted(launched) == sorted(names)
    told = block.reason(mode, torch.float32, 5, True, 0).split("; ")
    assert told[not backward].split(": ")[1].startswith("all steps run in one launch")
    assert told[backward].split(": ")[1] == "a product and a launch for each step"
    assert block.reason(mode, torch.float32, 5, False, 0) in told[0]


def test_what_a_layer_runs_is_explained(cuda_ops) -> None:
    assert block.refusal(torch.bfloat16, False, 0) is None
    assert "projection" in (block.refusal(torch.bfloat16, True, 0) or "")
    assert "float64" in (block.refusal(torch.float64, False, 0) or "")
    assert "no CUDA kernel was compiled" in (block.refusal(torch.bfloat16, False, 1) or "")
    assert block.reason("LSTM", torch.bfloat16, 144, False, 0).endswith(": block")
    assert "step: W_hh of 145 units does not fit" in block.reason(
        "LSTM", torch.bfloat16, 145, True, 0
    )
    assert block.reason("LSTM", torch.float32, 88, True, 0).endswith(": block, block")
    with torch.backends.cudnn.flags(allow_tf32=True):
        assert block.reason("LSTM", torch.float32, 96, True, 0).endswith("block, in TF32")
