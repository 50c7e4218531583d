"""The choice of cuDNN for recurrent layers, and the way there, as far as it goes without a GPU: the
table has a row for every layer here, and cuDNN's ops are emulated (cudnn_cases)."""

import importlib
import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import seqkern
from seqkern.ops import _recurrent_block as block
from seqkern.ops import _recurrent_cudnn as cudnn
from seqkern.ops.choice import Sizes
from seqkern.ops.recurrent import recurrent
from tests.cudnn_cases import EmulatedCudnn, assert_right, results, rows, use_table
from tests.test_cuda_kernels import Problem

ops = importlib.import_module("seqkern.ops.recurrent")
BACKWARD = torch.ops.seqkern.recurrent_backward
CARD, H, B = "a card", 6, 3
every_mode = pytest.mark.parametrize("mode", list(cudnn.MODES))


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A row for every layer of the tests on what stands for a card, and cuDNN is there."""
    use_table(monkeypatch, rows(CARD, H, (B, B)))
    monkeypatch.setattr(cudnn, "card", lambda device: CARD)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(block, "built", lambda device: True)
    yield
    cudnn._rows.cache_clear()


@pytest.fixture
def calls(table: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The calls of the emulated cuDNN; CPU tensors go where CUDA ones would."""

    def cast(*args: Any) -> None:
        raise AssertionError("under autocast PyTorch makes float16 of what cuDNN is given")

    machine = EmulatedCudnn()

    def emulated(call: Callable) -> Callable:
        def run(*args: Any) -> Any:
            with machine:
                return call(*args)

        return run

    monkeypatch.setattr(cudnn, "forward", emulated(cudnn.forward))
    monkeypatch.setattr(cudnn, "backward", emulated(cudnn.backward))
    there = SimpleNamespace(default=ops._recurrent_backward_cuda)
    monkeypatch.setattr(torch.ops.seqkern, "recurrent_backward", there)
    monkeypatch.setattr(ops, "_inference_op", ops._recurrent_inference_cuda)
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_cudnn_rnn", cast, "AutocastCPU")
        yield machine.calls


# ---- values

SHAPES = [
    {"T": 4, "B": B},
    {"T": 1, "B": B, "D": 2, "bias": False},
    {"lengths": (5, 3, 1), "D": 2},
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_mode
def test_values_against_float64(calls, mode: str, dtype: torch.dtype, shape: dict) -> None:
    problem = Problem(mode, dtype, H=H, I=H, **shape)
    got = results(problem)
    assert calls == ["training", "backward"]
    assert_right(problem, got)
    args = (problem.mode, problem.x, problem.h0, problem.c0, problem.weights)
    plain = recurrent(*args, batch_sizes=problem.batch_sizes)
    assert calls[2:] == ["inference"]
    for name, t in zip(("y", "h_n", "c_n"), plain, strict=True):
        assert t is None or torch.equal(t, got[name]), name


def layer_and_input(mode: str = "LSTM", **options: Any) -> tuple[torch.nn.RNNBase, Tensor]:
    layer = getattr(seqkern.nn, mode)(H, H, **options)
    return layer, torch.randn(4, B, H, requires_grad=True)


def gradients(layer: torch.nn.RNNBase, x: Tensor, call: Callable | None = None) -> list[Tensor]:
    y, _ = (layer if call is None else call)(x)
    return list(torch.autograd.grad(y.float().sin().sum(), [x, *layer.parameters()]))


def by_torch(layer: torch.nn.RNNBase) -> torch.nn.RNNBase:
    kind = getattr(torch.nn, type(layer).__name__)
    twin = kind(H, H, layer.num_layers, bidirectional=layer.bidirectional)
    twin.load_state_dict(layer.state_dict())
    return twin


@pytest.mark.parametrize("mode", ["LSTM", "GRU", "RNN"])
def test_a_layer_in_eval_mode_and_its_weights(calls, mode: str) -> None:
    layer, x = layer_and_input(mode, num_layers=2)
    before = {name: (t.data_ptr(), t.clone()) for name, t in layer.state_dict().items()}
    got = gradients(layer.eval(), x)
    assert calls == ["training"] * 2 + ["backward"] * 2
    torch.testing.assert_close(got, gradients(by_torch(layer), x))
    for name, t in layer.state_dict().items():
        assert t.data_ptr() == before[name][0]
        assert torch.equal(t, before[name][1])


def test_a_graph_is_walked_again(calls) -> None:
    layer, x = layer_and_input()
    y = layer(x)[0].sum()
    first, second = (torch.autograd.grad(y, x, retain_graph=True)[0] for _ in range(2))
    assert calls == ["training", "backward", "backward"]
    assert torch.equal(first, second)


def test_second_derivatives_and_batched_gradients_are_the_reference_s(calls) -> None:
    layer, x = layer_and_input()

    def penalty(of: Any) -> list[Tensor]:
        inputs = [x, *of.parameters()]
        first = torch.autograd.grad(of(x)[0].sin().sum(), inputs, create_graph=True)
        loss = torch.stack([g.square().sum() for g in first]).sum()
        return list(torch.autograd.grad(loss, inputs))

    twin = by_torch(layer)
    torch.testing.assert_close(penalty(layer), penalty(twin))
    assert calls == ["training", "backward", "backward"]  # the last of the way through sin(y)
    y, expected = layer(x)[0], twin(x)[0]
    several = torch.randn(2, *y.shape)
    (got,) = torch.autograd.grad(y, x, several, is_grads_batched=True)
    each = [torch.autograd.grad(expected, x, g, retain_graph=True)[0] for g in several]
    torch.testing.assert_close(got, torch.stack(each))


def test_what_needs_no_gradient_and_strides(calls) -> None:
    p = Problem("LSTM", torch.float32, T=4, B=B, H=H, I=H, D=2)
    odd = [w.t().contiguous().t() if w.dim() == 2 else w for w in p.weights]
    h0 = p.h0.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    y, _, _ = recurrent("LSTM", p.x, h0, p.c0, odd)
    (dh0,) = torch.autograd.grad(y, h0, p.grads[0].transpose(0, 1).contiguous().transpose(0, 1))
    p.grads = (p.grads[0], torch.zeros_like(p.h0), torch.zeros_like(p.h0))
    assert calls == ["training", "backward"]
    torch.testing.assert_close(dh0, p.reference()["dh0"])


def test_autocast(calls) -> None:
    layer, x = layer_and_input()
    with torch.autocast("cpu", torch.bfloat16):
        got = gradients(layer, x)
        with torch.no_grad():
            assert layer(x)[0].dtype == torch.bfloat16
    assert calls == ["training", "backward", "inference"]
    expected = gradients(by_torch(layer).bfloat16(), x.detach().bfloat16().requires_grad_())
    torch.testing.assert_close(got, [g.float() for g in expected])


def test_prepacked_weights_are_those_of_the_snapshot(calls) -> None:
    layer, x = layer_and_input()
    weights = [w.detach().clone() for w in layer.parameters()]
    with torch.no_grad():
        expected = layer(x)[0]
        zeros = [torch.zeros_like(w) for w in weights]
        h0 = torch.zeros(1, B, H)
        y, _, _ = recurrent("LSTM", x, h0, h0, zeros, packed=weights)
    assert calls == ["inference"] * 2
    assert torch.equal(y, expected)


# ---- the context


CONTEXTS = {
    "off": lambda: torch.backends.cudnn.flags(enabled=False),
    "deterministic": lambda: torch.backends.cudnn.flags(enabled=True, deterministic=True),
    "vmap": nullcontext,
    "compile": nullcontext,
}


@pytest.mark.parametrize("context", CONTEXTS)
def test_seqkern_s_own_ops_stay_in_charge(calls, context: str, monkeypatch) -> None:
    """Where cuDNN is not to be asked, or what asks needs an op of known shapes."""
    monkeypatch.setattr(torch.ops.seqkern, "recurrent_backward", BACKWARD)
    layer, x = layer_and_input()
    torch.compiler.reset()
    call = {
        "vmap": lambda x: torch.func.vmap(layer)(x[None]),
        "compile": torch.compile(layer, backend="aot_eager", fullgraph=True),
    }.get(context)
    with CONTEXTS[context]():
        assert (cudnn.refusal(False) is None) == (context in ("vmap", "compile"))
        got = gradients(layer, x, call)
    assert calls == []
    torch.testing.assert_close(got, gradients(by_torch(layer), x))


def test_so_they_do_under_torch_func(calls, monkeypatch) -> None:
    monkeypatch.setattr(torch.ops.seqkern, "recurrent_backward", BACKWARD)
    layer, x = layer_and_input()
    got = torch.func.grad(lambda x: layer(x)[0].sin().sum())(x.detach())
    assert calls == []
    torch.testing.assert_close(got, gradients(by_torch(layer), x)[0])


def test_the_op_owes_the_gates(calls, monkeypatch) -> None:
    p = Problem("LSTM", torch.float32, T=2, B=B, H=H, I=H)
    launch = SimpleNamespace(default=None)
    monkeypatch.setattr(torch.ops.seqkern, "recurrent_block", launch, raising=False)
    monkeypatch.setattr(block, "fits", lambda *of: True)
    monkeypatch.setattr(block, "forward", lambda *of: "its own")
    assert ops._recurrent_cuda(p.x, None, p.h0, p.c0, p.weights, "LSTM") == "its own"
    assert calls == []


def test_deterministic_algorithms(table) -> None:
    try:
        torch.use_deterministic_algorithms(True)
        assert "deterministic" in (cudnn.refusal(False) or "")
    finally:
        torch.use_deterministic_algorithms(False)
    assert cudnn.refusal(False) is cudnn.refusal(True) is None


def test_a_mode_sees_the_op_of_known_shapes(table) -> None:
    with FakeTensorMode():
        assert "a mode of PyTorch" in (cudnn.refusal(True) or "")
        assert cudnn.refusal(False) is None


@pytest.mark.parametrize(
    ("name", "value", "refused"),
    [("batch_sizes", torch.tensor([3, 3]), "add up to"), ("h0", torch.zeros(B, H), "h0 must be"),
     ("weights", [torch.zeros(24, H)], "weights must hold"),
     ("weights", [torch.zeros(24, H), torch.zeros(H, 24)], "w_hh must be")],
)  # fmt: skip
def test_bad_arguments_are_refused(calls, name: str, value: Any, refused: str) -> None:
    p = Problem("LSTM", torch.float32, lengths=(4, 4, 4), H=H, I=H)
    given = {"x": p.x.requires_grad_(), "h0": p.h0, "c0": p.c0, "weights": p.weights}
    given |= {"batch_sizes": p.batch_sizes} | {name: value}
    with pytest.raises(ValueError, match=refused):
        recurrent("LSTM", **given)
    assert calls == []


def test_the_backward_op_checks_what_is_not_saved_by_cudnn(calls) -> None:
    p = Problem("GRU", torch.float32, T=2, B=B, H=H, I=H)
    args, y = (p.x, None, p.h0, None, p.weights), p.grads[0]
    with pytest.raises(ValueError, match="dy must be"):
        ops._recurrent_backward_cuda(
            y[:1], None, None, *args, y, torch.ones(13, dtype=torch.uint8), y, "GRU", True, True
        )
    odd, reserve = y.transpose(0, 1).contiguous().transpose(0, 1), torch.ones(13).byte()
    ops._recurrent_backward_cuda(y, None, y, *args, odd, reserve, y, "GRU", True, True)
    assert calls == ["backward"]
    reserve = torch.ones(13, dtype=torch.uint8, device="meta")
    with pytest.raises(ValueError, match="gates must be on the device of x, cpu, got meta"):
        ops._recurrent_backward_cuda(y, None, None, *args, y, reserve, y, "GRU", True, True)


@every_mode
def test_the_op_itself_gives_its_shapes_on_fake_cuda_tensors(mode: str) -> None:
    p = Problem(mode, torch.bfloat16, T=4, B=B, H=H, I=H, D=2)
    with FakeTensorMode(allow_non_fake_inputs=True):
        x, h0 = (torch.empty(t.shape, dtype=t.dtype, device="cuda") for t in (p.x, p.h0))
        c0 = None if p.c0 is None else torch.empty_like(h0)
        weights = [torch.empty(w.shape, dtype=w.dtype, device="cuda") for w in p.weights]
        y, h_n, c_n, reserve, _ = cudnn.forward(x, None, h0, c0, weights, mode, True)
        assert cudnn.weight_buffer(weights, 2).numel() == sum(w.numel() for w in weights)
    assert (y.shape, y.dtype, y.device.type) == ((4, B, 2 * H), torch.bfloat16, "cuda")
    assert h_n.shape == h0.shape
    assert c_n.shape == (h0.shape if mode == "LSTM" else (0,))
    assert reserve.dtype == torch.uint8


# ---- the table


def test_a_row_holds_for_what_was_measured() -> None:
    row = rows(CARD, 256, (8, 64), T=128)[0]
    for sizes, holds in {
        Sizes(128, 8, 256, 256, 1): True,
        Sizes(2000, 64, 256, 256, 1): True,
        Sizes(128, 24, 256, 256, 1): True,
        Sizes(128, 20, 256, 256, 1): False,
        Sizes(128, 72, 256, 256, 1): False,
        Sizes(127, 8, 256, 256, 1): False,
        Sizes(128, 8, 255, 256, 1): False,
    }.items():
        assert row.holds(sizes) == holds, sizes


def test_a_row_is_of_one_layer(table) -> None:
    sizes = Sizes(4, B, H, H, 1)
    found = cudnn.row("GRU", torch.float32, 0, sizes, ragged=False, training=True)
    assert found is not None
    assert found[1:6] == ("GRU", "float32", 1, False, True)
    with torch.backends.cudnn.flags(allow_tf32=True):
        found = cudnn.row("GRU", torch.float32, 0, sizes, ragged=True, training=False)
    assert found is not None
    assert found[1:6] == ("GRU", "tf32", 1, True, False)
    assert cudnn.row("GRU", torch.float64, 0, sizes, False, True) is None
    assert cudnn.row("GRU", torch.float32, 0, Sizes(4, B, 5, 5, 1), False, True) is None


def test_other_cards_and_what_is_no_card(table, monkeypatch) -> None:
    monkeypatch.undo()
    use_table(monkeypatch, rows(CARD, H, (B, B)))
    sizes = Sizes(4, B, H, H, 1)
    assert cudnn.row("GRU", torch.float32, -1, sizes, False, True) is None
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: [CARD, "another"][i])
    assert cudnn.row("GRU", torch.float32, 0, sizes, False, True)
    assert cudnn.row("GRU", torch.float32, 1, sizes, False, True) is None
    cudnn._rows.cache_clear()


def test_the_installed_table_is_read(monkeypatch) -> None:
    text = json.dumps([rows(CARD, H, (B, B))[0]._asdict()])
    monkeypatch.setattr(cudnn.Path, "read_text", lambda path: text)
    cudnn.table.cache_clear()
    try:
        (row,) = cudnn.table()
        assert (row.device, row.H, row.ratio, list(row.B)) == (CARD, H, 1.5, [B, B])
    finally:
        cudnn.table.cache_clear()


# ---- explain


@pytest.fixture
def fake(table, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """A layer and an input on what is taken for a GPU with seqkern's kernels."""
    explain = importlib.import_module("seqkern.ops.explain")
    monkeypatch.setattr(explain, "has_native_kernel", lambda op, device: True)
    monkeypatch.setattr(block, "room", lambda *of: "block")

    def make(*shape: int, **options: Any) -> tuple[torch.nn.RNNBase, Tensor]:
        with FakeTensorMode():
            x = torch.empty(shape, device="cuda")
        return seqkern.nn.LSTM(shape[-1], H, **options), x

    return make


def test_explain_names_cudnn_and_the_measurement(fake) -> None:
    layer, x = fake(4, B, H)
    (trained,) = seqkern.explain(layer, x)
    assert (trained.kernel, trained.op) == ("cudnn", "aten::_cudnn_rnn")
    assert trained.reason.startswith("measured 1.5x as fast as seqkern's on a card, a test")
    assert "torch.compile" in trained.reason
    with torch.no_grad():
        (plain,) = seqkern.explain(layer, x)
        assert (plain.kernel, plain.op) == ("cudnn", "seqkern::recurrent_inference")
        assert "torch.compile" not in plain.reason
        with torch.backends.cudnn.flags(enabled=False):
            (own,) = seqkern.explain(layer, x)
    assert own.kernel == "native"
    assert "not cuDNN, measured 1.5x" in own.reason
    assert "switched off" in own.reason


def test_explain_where_no_row_matches(fake) -> None:
    kernels = [line.kernel for line in seqkern.explain(*fake(4, B, 7, num_layers=2))]
    assert kernels == ["native", "cudnn"]
    kernels = [
        line.kernel for line in seqkern.explain(*fake(4, B, H, num_layers=2, bidirectional=True))
    ]
    assert kernels == ["cudnn", "native"]
    assert "projection" in seqkern.explain(*fake(4, B, H, proj_size=2))[0].reason


def test_explain_of_a_ragged_batch(fake) -> None:
    layer, rows = fake(7, H)
    sizes = pack_padded_sequence(torch.empty(4, B, H), torch.tensor([4, 2, 1])).batch_sizes
    (line,) = seqkern.explain(layer, PackedSequence(rows, sizes))
    assert (line.kernel, line.sizes.T) == ("cudnn", 0)
