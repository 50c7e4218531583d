"""What is particular to the recurrent ops: peers, invariances of their bits, transforms, errors."""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jvp, vmap
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import seqkern
from seqkern.ops.choice import Sizes, has_native_kernel
from seqkern.ops.recurrent import recurrent
from seqkern.reference import recurrent as reference
from seqkern.reference.cells import GATES
from tests.recurrent_layers import layer_arguments, states, torch_layer

NATIVE = has_native_kernel("recurrent", "cpu")
MODES = list(GATES)

every_mode = pytest.mark.parametrize("mode", MODES)


# ---- an independent oracle ----------------------------------------------------------------


@pytest.mark.parametrize("ragged", [False, True], ids=["dense", "ragged"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["uni", "bi"])
@pytest.mark.parametrize(("mode", "proj"), [*((m, 0) for m in MODES), ("LSTM", 3)])
def test_equals_torch(mode: str, proj: int, bidirectional: bool, bias: bool, ragged: bool) -> None:
    """PyTorch's own layers in float64, results and gradients."""
    kwargs = {"proj_size": proj} if proj else {}
    layer = torch_layer(mode, 4, 17, bidirectional=bidirectional, bias=bias, **kwargs).double()
    x = torch.randn(6, 3, 4, dtype=torch.float64, requires_grad=True)
    h0, c0 = states(mode, 1 + bidirectional, 3, 17, torch.float64, proj)
    leaves = [t.requires_grad_() for t in (h0, c0) if t is not None]
    packed = pack_padded_sequence(x, [6, 4, 1]) if ragged else x
    y, state = layer(packed, h0 if c0 is None else (h0, c0))
    y = y.data if isinstance(y, PackedSequence) else y
    theirs = [y, *(state if isinstance(state, tuple) else [state])]

    weights = list(layer._flat_weights)
    data, sizes = (packed.data, packed.batch_sizes) if ragged else (x, None)
    ours = [t for t in recurrent(mode, data, h0, c0, weights, batch_sizes=sizes) if t is not None]
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)

    grads = [torch.randn_like(t) for t in ours]
    inputs = [x, *leaves, *weights]
    expected = torch.autograd.grad(theirs, inputs, grads, retain_graph=True)
    actual = torch.autograd.grad(ours, inputs, grads)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


@every_mode
def test_the_reference_keeps_its_dtypes_under_autocast(mode: str) -> None:
    """Autocast reaches into an op that is made of PyTorch operations."""
    x, h0, c0, weights = layer_arguments(mode, 3, 2, 4, 17)
    call = (x, None, h0, c0, weights)

    def run() -> list[Tensor]:
        y, h_n, _, gates, cells = reference.recurrent(*call, mode)
        grads = (y, h_n, None)
        dx, dh0, _, dweights = reference.recurrent_backward(grads, *call, (y, gates, cells), mode)
        return [y, h_n, dx, dh0, *dweights]

    plain = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = run()
    assert all(torch.equal(a, b) for a, b in zip(inside, plain, strict=True))


# ---- weights that change --------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 9])
@every_mode
def test_a_change_through_data_is_seen(mode: str, steps: int) -> None:
    x, h0, c0, weights = layer_arguments(mode, steps, 3, 5, 33)
    before = recurrent(mode, x, h0, c0, weights)[0]
    for w in weights:
        version = w._version
        w.data.mul_(0.5)
        assert w._version == version
    after = recurrent(mode, x, h0, c0, weights)[0]
    fresh = recurrent(mode, x, h0, c0, [w.clone() for w in weights])[0]
    assert not torch.equal(after, before)
    assert torch.equal(after, fresh)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_mode
def test_packed_weights_are_a_snapshot(mode: str, dtype: torch.dtype) -> None:
    x, h0, c0, weights = layer_arguments(mode, 9, 3, 5, 33, D=2, dtype=dtype)
    before = recurrent(mode, x, h0, c0, weights)
    packed = torch.ops.seqkern.recurrent_pack(weights, mode, 2)
    weights[1].zero_()
    after = recurrent(mode, x, h0, c0, weights, packed=packed)
    assert all(torch.equal(a, b) for a, b in zip(before[:2], after[:2], strict=True))


# ---- derivatives and transforms -----------------------------------------------------------


def loss_of(mode: str, h0: Tensor, c0: Tensor | None, batch_sizes: Tensor | None = None):
    def loss(weights: list[Tensor], x: Tensor) -> Tensor:
        y, h_n, _ = recurrent(mode, x, h0, c0, weights, batch_sizes=batch_sizes)
        return (y * y).sum() + h_n.sin().sum()

    return loss


def loops(function, xs: Tensor):
    results = [function(x) for x in xs]
    if isinstance(results[0], Tensor):
        return torch.stack(results)
    return [torch.stack(same) for same in zip(*results, strict=True)]


@pytest.mark.parametrize("ragged", [False, True], ids=["dense", "ragged"])
@every_mode
def test_vmap_and_per_sample_gradients(mode: str, ragged: bool) -> None:
    _, h0, c0, weights = layer_arguments(mode, 3, 2, 3, 5, D=2, dtype=torch.float64)
    sizes = torch.tensor([2, 2, 1]) if ragged else None
    xs = torch.randn(4, *([5, 3] if ragged else [3, 2, 3]), dtype=torch.float64)
    loss = loss_of(mode, h0, c0, sizes)
    losses = vmap(loss, in_dims=(None, 0))(weights, xs)
    torch.testing.assert_close(losses, loops(lambda x: loss(weights, x), xs))
    with torch.no_grad():
        torch.testing.assert_close(vmap(loss, in_dims=(None, 0))(weights, xs), losses)
    per_sample = vmap(grad(loss), in_dims=(None, 0))(weights, xs)
    torch.testing.assert_close(per_sample, loops(lambda x: grad(loss)(weights, x), xs))
    batch_first = vmap(grad(loss, argnums=1), in_dims=(None, 1))(weights, xs.movedim(0, 1))
    torch.testing.assert_close(batch_first, loops(lambda x: grad(loss, argnums=1)(weights, x), xs))
    outside = grad(lambda w: vmap(loss, in_dims=(None, 0))(w, xs).sum())(weights)
    torch.testing.assert_close(outside, [g.sum(0) for g in per_sample])


@every_mode
def test_vmap_over_weights(mode: str) -> None:
    """An ensemble: one set of weights and one input for each member."""
    x, h0, c0, _ = layer_arguments(mode, 3, 2, 3, 5)
    members = [layer_arguments(mode, 3, 2, 3, 5)[3] for _ in range(3)]
    stacked = [torch.stack(same) for same in zip(*members, strict=True)]
    loss = loss_of(mode, h0, c0)
    losses = vmap(loss, in_dims=(0, None))(stacked, x)
    torch.testing.assert_close(losses, torch.stack([loss(w, x) for w in members]))


# PyTorch scripts its own derivatives when forward mode is first used.
ignore_script = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")


@ignore_script
@every_mode
def test_higher_derivatives(mode: str) -> None:
    x, h0, c0, weights = layer_arguments(mode, 2, 1, 2, 3, dtype=torch.float64)
    loss = loss_of(mode, h0, c0)
    x.requires_grad_()
    (first,) = torch.autograd.grad(loss(weights, x), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x, create_graph=True)
    (third,) = torch.autograd.grad(second.square().sum(), x)
    x = x.detach()
    gradient = grad(loss, argnums=1)
    squared = grad(lambda x: gradient(weights, x).square().sum())
    torch.testing.assert_close(squared(x), second.detach())
    torch.testing.assert_close(grad(lambda x: squared(x).square().sum())(x), third)
    matrix = hessian(loss, argnums=1)(weights, x).reshape(x.numel(), x.numel())
    product = 2 * matrix @ gradient(weights, x).flatten()
    torch.testing.assert_close(product, second.detach().flatten())


@ignore_script
@every_mode
def test_forward_mode(mode: str) -> None:
    x, h0, c0, weights = layer_arguments(mode, 3, 2, 3, 5, D=2, dtype=torch.float64)
    loss, direction = loss_of(mode, h0, c0), torch.randn_like(x)
    _, tangent = jvp(lambda x: loss(weights, x), (x,), (direction,))
    expected = (grad(loss, argnums=1)(weights, x) * direction).sum()
    torch.testing.assert_close(tangent, expected)


@every_mode
def test_transforms_inside_compile(mode: str) -> None:
    x, h0, c0, weights = layer_arguments(mode, 3, 2, 3, 5)
    loss = loss_of(mode, h0, c0)
    torch.compiler.reset()
    compiled = torch.compile(grad(loss), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(weights, x), grad(loss)(weights, x))


@every_mode
def test_backward_in_eval_mode_of_a_frozen_layer(mode: str) -> None:
    """Only the input takes a gradient, as for saliency; training flags play no part."""
    x, h0, c0, weights = layer_arguments(mode, 3, 2, 3, 5, dtype=torch.float64)
    x.requires_grad_()
    y = recurrent(mode, x, h0, c0, weights)[0]
    assert torch.autograd.grad(y.sum(), x)[0].abs().sum() > 0


@every_mode
def test_compiled_and_exported_sizes_are_free(mode: str) -> None:
    """One graph serves other T and B; an exported program too."""

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            # torch.compile refuses a module that holds one of torch.nn's recurrent layers.
            self.weights = torch.nn.ParameterList(torch_layer(mode, 5, 7).parameters())

        def forward(self, x: Tensor) -> Tensor:
            h0 = x.new_zeros(1, x.size(1), 7)
            c0 = h0 if mode == "LSTM" else None
            return recurrent(mode, x, h0, c0, list(self.weights))[0]

    model, x = Model(), torch.randn(3, 2, 5)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    dims = {0: torch.export.Dim("T", min=2), 1: torch.export.Dim("B", min=2)}
    exported = torch.export.export(model, (x,), dynamic_shapes={"x": dims}).module()
    compiled(x)
    with torch.compiler.set_stance("fail_on_recompile"):
        for T, B in ((3, 2), (4, 6), (11, 9)):
            x = torch.randn(T, B, 5)
            assert torch.equal(compiled(x), model(x))
            assert torch.equal(exported(x), model(x))


def test_functional_call_and_parametrized_weights() -> None:
    """Weights that are results of a computation take gradients through it."""
    layer = seqkern.nn.GRU(3, 5).double()
    torch.nn.utils.parametrizations.weight_norm(layer, "weight_hh_l0")
    x = torch.randn(3, 2, 3, dtype=torch.float64)
    y, _ = layer(x)
    y.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    doubled = {name: 2 * p for name, p in layer.named_parameters()}
    assert not torch.equal(functional_call(layer, doubled, (x,))[0], y)


# ---- functions, errors, explanations ------------------------------------------------------


def test_functions_and_cells_agree_with_torch() -> None:
    for mode in MODES:
        x, h0, c0, weights = layer_arguments(mode, 1, 3, 4, 5, dtype=torch.float64)
        cell_args = [t[0] for t in (x, h0, c0) if t is not None]
        if mode == "LSTM":
            cell = torch.lstm_cell(x[0], (h0[0], c0[0]), *weights)
            torch.testing.assert_close(seqkern.lstm_cell(*cell_args, *weights), cell)
            torch.testing.assert_close(seqkern.lstm(x, h0, c0, weights)[1][0], cell[0])
        elif mode == "GRU":
            cell = torch.gru_cell(*cell_args, *weights)
            torch.testing.assert_close(seqkern.gru_cell(*cell_args, *weights), cell)
            torch.testing.assert_close(seqkern.gru(x, h0, weights)[1][0], cell)
        else:
            name = mode[4:].lower()
            cell = getattr(torch, f"rnn_{name}_cell")(*cell_args, *weights)
            ours = seqkern.rnn_cell(*cell_args, *weights, nonlinearity=name)
            torch.testing.assert_close(ours, cell)
            y = seqkern.rnn(x, h0, weights, nonlinearity=name)[0]
            torch.testing.assert_close(y[0], cell)


@pytest.mark.parametrize("context", [nullcontext, forward_ad.dual_level])
def test_errors_name_the_argument(context) -> None:
    x, h, w_ih, w_hh = (torch.randn(s) for s in ((3, 2, 4), (1, 2, 5), (15, 4), (15, 5)))
    w4, w5 = torch.randn(20, 4), torch.randn(20, 5)
    packed, sizes = torch.randn(5, 4), torch.tensor([2, 2, 1])
    short = [w_ih, w_hh, torch.randn(1), torch.randn(1)]
    refused = [
        (ValueError, "x must be", lambda: seqkern.gru(x[0], h, [w_ih, w_hh])),
        (ValueError, "at least one step", lambda: seqkern.gru(x[:0], h, [w_ih, w_hh])),
        (ValueError, "batch size 2", lambda: seqkern.gru(x, h[:, :1], [w_ih, w_hh])),
        (ValueError, r"w_hh must be .* = \(15, 5\), got", lambda: seqkern.gru(x, h, [w_ih, w_ih])),
        (ValueError, "dtype of x", lambda: seqkern.gru(x, h.double(), [w_ih, w_hh])),
        (ValueError, "floating-point", lambda: seqkern.gru(x.long(), h, [w_ih, w_hh])),
        (ValueError, "weights must hold", lambda: seqkern.gru(x, h, [w_ih])),
        (TypeError, "weights must be a list .* got NoneType", lambda: seqkern.gru(x, h, None)),
        (TypeError, "c0 must be a Tensor", lambda: recurrent("LSTM", x, h, None, [w4, w5])),
        (TypeError, "c0 must be None", lambda: recurrent("GRU", x, h, h, [w_ih, w_hh])),
        (TypeError, "x must be a Tensor", lambda: seqkern.gru([1], h, [w_ih, w_hh])),
        (ValueError, "mode must be", lambda: recurrent("CRU", x, h, None, [w_ih, w_hh])),
        (ValueError, "nonlinearity", lambda: seqkern.rnn(x, h, [w_ih], nonlinearity="sin")),
        (ValueError, "h must be", lambda: seqkern.gru_cell(x[0], h, w_ih, w_hh)),
        (ValueError, r"b_ih must be .* = \(15,\), got \(1,\)", lambda: seqkern.gru(x, h, short)),
        (ValueError, "together", lambda: seqkern.gru_cell(x[0], h[0], w_ih, w_hh, w_ih[:, 0])),
    ]
    for bad in ([2, 3], [2, 2, 0, 1], [2, -1], [2, 2], [3, 2], []):
        call = lambda b=bad: seqkern.gru(  # noqa: E731  a table of calls
            packed, h, [w_ih, w_hh], batch_sizes=torch.tensor(b, dtype=torch.int64)
        )
        refused.append((ValueError, "batch_sizes must", call))
    refused.append(
        (
            ValueError,
            "int64",
            lambda: seqkern.gru(packed, h, [w_ih, w_hh], batch_sizes=sizes.int()),
        )
    )
    for error, message, call in refused:
        with context(), pytest.raises(error, match=message):
            call()


def test_meta_tensors_have_shapes() -> None:
    x, h0, c0, weights = (
        [t.to("meta") for t in a] if isinstance(a, list) else a.to("meta")
        for a in layer_arguments("LSTM", 3, 2, 4, 5, D=2)
    )
    y, h_n, c_n = recurrent("LSTM", x, h0, c0, weights)
    assert (y.shape, h_n.shape, c_n.shape) == ((3, 2, 10), (2, 2, 5), (2, 2, 5))


def test_explain() -> None:
    layer = seqkern.nn.LSTM(3, 5, num_layers=2, bidirectional=True, batch_first=True)
    x = torch.randn(2, 9, 3)
    kernel = "native" if NATIVE else "reference"
    first, second = seqkern.explain(layer, x)
    assert (first.kernel, first.op) == (kernel, "seqkern::recurrent")
    assert (first.sizes, second.sizes) == (Sizes(9, 2, 3, 5, 2), Sizes(9, 2, 10, 5, 2))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        (cell,) = seqkern.explain(seqkern.nn.GRUCell(3, 5), torch.randn(2, 3))
    assert (cell.op, cell.dtype) == ("seqkern::recurrent_inference", torch.bfloat16)
    assert str(cell).startswith(f"layer 0: GRU bfloat16 T=1 B=2 I=3 H=5 D=1 on cpu: {kernel}")
    (other,) = seqkern.explain(torch.nn.GRU(3, 5), x)
    assert other.reason.endswith("; in the place of torch.nn's own")
    assert "torch.nn" not in first.reason
    packed = pack_padded_sequence(x, [9, 4], batch_first=True)
    assert "T=ragged B=2" in str(seqkern.explain(layer, packed))
    with forward_ad.dual_level():
        assert {e.kernel for e in seqkern.explain(layer, x)} == {"reference"}
    (meta, _) = seqkern.explain(layer.to("meta"), x.to("meta"))
    assert (meta.kernel, meta.device) == ("reference", "meta")
    with pytest.raises(TypeError, match="must be recurrent"):
        seqkern.explain(torch.nn.Linear(3, 5), x)
    with pytest.raises(ValueError, match="2D or 3D"):
        seqkern.explain(layer, x[0, 0])
