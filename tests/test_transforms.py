"""The layers and cells under PyTorch's transforms: compile, export, func, autocast, checkpoint."""

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, jacrev, stack_module_state, vmap
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import seqkern.nn

LAYERS = ("RNN", "LSTM", "GRU")
CELLS = ("RNNCell", "LSTMCell", "GRUCell")
F64 = torch.float64


def build(name: str, *args: Any, **kwargs: Any) -> tuple[torch.nn.Module, torch.nn.Module]:
    """torch's module and ours with the same weights, in float64 unless said."""
    kwargs = {"dtype": F64, **kwargs}
    theirs = getattr(torch.nn, name)(*args, **kwargs)
    ours = getattr(seqkern.nn, name)(*args, **kwargs)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def flat(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [t for part in result for t in flat(part)]


def make_input(name: str, steps: int = 4, batch: int = 3, features: int = 3) -> Tensor:
    shape = (steps, batch, features) if name in LAYERS else (batch, features)
    return torch.randn(shape, dtype=F64)


def loss_of(result: Any) -> Tensor:
    return torch.stack([((i + 1.0) * t).sin().sum() for i, t in enumerate(flat(result))]).sum()


def gradients(module: torch.nn.Module, x: Tensor, call: Any = None) -> list[Tensor]:
    x = x.detach().clone().requires_grad_()
    result = (module if call is None else call)(x)
    inputs = [x, *module.parameters()]
    return [*[t.detach() for t in flat(result)], *torch.autograd.grad(loss_of(result), inputs)]


# ---- compile and export -------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_compile_fullgraph_dynamic(name: str) -> None:
    extra = {"num_layers": 2, "bidirectional": True, "batch_first": True, "dropout": 0.0}
    theirs, ours = build(name, 3, 4, **(extra if name in LAYERS else {}))
    torch.compiler.reset()
    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend="aot_eager")
    for steps, batch in ((4, 3), (6, 2), (5, 7)):
        x = make_input(name, steps, batch)
        expected = gradients(theirs, x)
        torch.testing.assert_close(gradients(ours, x, compiled), expected)
        with torch.no_grad():
            torch.testing.assert_close(flat(compiled(x)), expected[: len(flat(ours(x)))])


# Inductor's own imports warn.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_compile_with_inductor() -> None:
    theirs, ours = build("LSTM", 3, 4, dtype=torch.float32)
    torch.compiler.reset()
    compiled = torch.compile(ours, fullgraph=True, dynamic=True)
    for steps, batch in ((4, 3), (5, 2)):
        x, h, c = torch.randn(steps, batch, 3), *torch.randn(2, 1, batch, 4)
        with torch.no_grad():
            torch.testing.assert_close(flat(compiled(x, (h, c))), flat(theirs(x, (h, c))))


def test_compile_sees_changed_weights() -> None:
    _, ours = build("GRU", 3, 4)
    torch.compiler.reset()
    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend="aot_eager")
    x = make_input("GRU")
    for _ in range(2):
        torch.testing.assert_close(compiled(x)[0], ours(x)[0])
        ours.weight_hh_l0.data.mul_(2)


@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_export(name: str) -> None:
    theirs, ours = build(name, 3, 4)
    x = make_input(name)
    batch_dim = 1 if name in LAYERS else 0
    dims = {batch_dim: torch.export.Dim("batch", min=2, max=64)}
    if name in LAYERS:
        dims[0] = torch.export.Dim("steps", min=2, max=64)
    program = torch.export.export(ours.eval(), (x,), dynamic_shapes=({**dims},))
    for steps, batch in ((4, 3), (7, 5)):
        x = make_input(name, steps, batch)
        torch.testing.assert_close(flat(program.module()(x)), flat(theirs(x)))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", ["GRU", "LSTMCell"])
def test_an_exported_program_has_gradients_whatever_the_grad_mode_was(
    name: str, frozen: bool
) -> None:
    theirs, ours = build(name, 3, 4)
    before = torch.nn.Linear(3, 3, dtype=F64)
    x = make_input(name)
    if name in LAYERS:
        ours.prepack()
    expected = gradients(torch.nn.Sequential(before, theirs), x)
    model = torch.nn.Sequential(before, ours).requires_grad_(not frozen)
    # Neither the input nor a frozen layer asks for a gradient when the graph is taken.
    with torch.set_grad_enabled(frozen):
        program = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(gradients(program.requires_grad_(), x), expected)


@pytest.mark.parametrize("name", ["GRU", "LSTMCell"])
def test_a_compiled_call_without_gradient_keeps_nothing_for_one(name: str) -> None:
    """It is no export: its graph has the inference op."""
    _, ours = build(name, 3, 4)
    ops: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]):
        ops.extend(str(node.target) for node in graph.graph.nodes if "seqkern" in str(node.target))
        return graph

    torch.compiler.reset()
    with torch.no_grad():
        torch.compile(ours, fullgraph=True, backend=backend)(make_input(name))
    assert ops == ["seqkern.recurrent_inference.default"]


# Sizes that are checked are constants of a trace, PyTorch warns.
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("grad_mode", [False, True])
@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_jit_trace(name: str, grad_mode: bool) -> None:
    """With its gradients, at other sizes, and from a file."""
    theirs, ours = build(name, 3, 4, **({"num_layers": 2} if name in LAYERS else {}))
    with torch.set_grad_enabled(grad_mode):
        traced, file = torch.jit.trace(ours, (make_input(name),)), io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    x = make_input(name, 6, 2)
    torch.testing.assert_close(gradients(torch.jit.load(file), x), gradients(theirs, x))


# ---- torch.func ---------------------------------------------------------------------------


def loss_with(module: torch.nn.Module) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
    return lambda weights, x: loss_of(functional_call(module, weights, (x,)))


@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_functional_call_reads_the_given_weights(name: str) -> None:
    theirs, ours = build(name, 3, 4)
    x = make_input(name)
    weights = {key: torch.randn_like(w) for key, w in ours.named_parameters()}
    before = flat(ours(x))
    torch.testing.assert_close(
        flat(functional_call(ours, weights, (x,))), flat(functional_call(theirs, weights, (x,)))
    )
    assert all(torch.equal(a, b) for a, b in zip(flat(ours(x)), before, strict=True))


@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_func_grad(name: str) -> None:
    theirs, ours = build(name, 3, 4)
    x = make_input(name)
    weights = {key: w.detach() for key, w in ours.named_parameters()}
    actual = grad(loss_with(ours), argnums=(0, 1))(weights, x)
    expected = gradients(theirs, x)[-len(weights) - 1 :]
    torch.testing.assert_close([actual[1], *actual[0].values()], expected)


@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_per_sample_gradients(name: str) -> None:
    _, ours = build(name, 3, 4)
    samples = torch.stack([make_input(name, batch=1) for _ in range(5)])
    weights = {key: w.detach() for key, w in ours.named_parameters()}
    actual = vmap(grad(loss_with(ours)), in_dims=(None, 0))(weights, samples)
    for i, sample in enumerate(samples):
        expected = grad(loss_with(ours))(weights, sample)
        torch.testing.assert_close({key: g[i] for key, g in actual.items()}, expected)


@pytest.mark.parametrize("name", LAYERS + CELLS)
@pytest.mark.parametrize("in_dim", [0, 1])
def test_vmap_over_the_input(name: str, in_dim: int) -> None:
    theirs, ours = build(name, 3, 4)
    samples = torch.stack([make_input(name) for _ in range(3)], in_dim)
    actual = flat(vmap(ours, in_dims=in_dim)(samples))
    for i in range(3):
        torch.testing.assert_close([t[i] for t in actual], flat(theirs(samples.select(in_dim, i))))


@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_vmap_over_an_ensemble(name: str) -> None:
    models = [build(name, 3, 4)[1] for _ in range(3)]
    weights, buffers = stack_module_state(models)
    x = make_input(name)
    actual = flat(vmap(lambda w, b: functional_call(models[0], (w, b), (x,)))(weights, buffers))
    for i, model in enumerate(models):
        torch.testing.assert_close([t[i] for t in actual], flat(model(x)))


def test_jacrev() -> None:
    theirs, ours = build("GRU", 2, 3)
    x = make_input("GRU", 3, 1, 2)
    expected = torch.autograd.functional.jacobian(lambda v: theirs(v)[0], x)
    torch.testing.assert_close(jacrev(lambda v: ours(v)[0])(x), expected)


def test_functional_call_of_a_parametrized_layer() -> None:
    results = []
    x = make_input("LSTM")
    for module in build("LSTM", 3, 4):
        module = parametrizations.weight_norm(module, "weight_hh_l0")
        weights = {key: w.detach() * 1.5 for key, w in module.named_parameters()}
        results.append(flat(functional_call(module, weights, (x,))))
    torch.testing.assert_close(results[1], results[0])


# ---- autograd -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_double_backward(name: str) -> None:
    results = []
    x0 = make_input(name)
    for module in build(name, 3, 4):
        x = x0.clone().requires_grad_()
        inputs = [x, *module.parameters()]
        first = torch.autograd.grad(loss_of(module(x)), inputs, create_graph=True)
        penalty = torch.stack([g.square().sum() for g in first]).sum()
        results.append(torch.autograd.grad(penalty, inputs))
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_backward_in_eval_mode(name: str) -> None:
    theirs, ours = build(name, 3, 4)
    x = make_input(name)
    torch.testing.assert_close(gradients(ours.eval(), x), gradients(theirs, x))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(name: str, reentrant: bool) -> None:
    _, ours = build(name, 3, 4, 2, dropout=0.5)
    x = make_input(name)

    def call(v: Tensor) -> Any:
        # Reentrant checkpointing follows no tensor in a nested tuple.
        return checkpoint(lambda u: tuple(flat(ours(u))), v, use_reentrant=reentrant)

    def with_backward(run: Any) -> list[Tensor]:
        # Reentrant checkpointing knows backward() alone, not torch.autograd.grad.
        torch.manual_seed(2)
        ours.zero_grad()
        leaf = x.clone().requires_grad_()
        loss_of(run(leaf)).backward()
        return [g for g in (leaf.grad, *[p.grad for p in ours.parameters()]) if g is not None]

    torch.testing.assert_close(with_backward(call), with_backward(ours), rtol=0, atol=0)


def test_backward_twice_needs_retain_graph() -> None:
    _, ours = build("LSTM", 3, 4)
    loss = loss_of(ours(make_input("LSTM")))
    loss.backward(retain_graph=True)
    first = [p.grad.clone() for p in ours.parameters()]
    loss.backward()
    torch.testing.assert_close([p.grad for p in ours.parameters()], [2 * g for g in first])
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_a_bias_changed_before_the_backward_is_an_error(name: str) -> None:
    """The backward is an op that takes all weights; torch.nn lets some of them change."""
    _, ours = build(name, 3, 4)
    loss = loss_of(ours(make_input(name)))
    with torch.no_grad():
        ours.get_parameter("bias_hh_l0" if name in LAYERS else "bias_hh").add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inference_mode_and_no_grad_need_no_graph() -> None:
    _, ours = build("LSTM", 3, 4, 2)
    x = make_input("LSTM")
    expected = [t.detach() for t in flat(ours(x))]
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            actual = flat(ours(x))
        assert not any(t.requires_grad for t in actual)
        torch.testing.assert_close(actual, expected)


# ---- autocast -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYERS + CELLS)
@pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16])
def test_autocast(name: str, input_dtype: torch.dtype) -> None:
    theirs, ours = build(name, 3, 8, dtype=torch.float32)
    x = make_input(name).to(input_dtype)
    with torch.autocast("cpu", torch.bfloat16):
        result = flat(ours(x))
        loss = loss_of(result)
    assert {t.dtype for t in result} == {torch.bfloat16}
    loss.backward()
    exact = flat(theirs.to(F64)(x.to(F64)))
    loss_of(exact).backward()
    ulp = torch.finfo(torch.bfloat16).eps
    for actual, wanted in zip(result, exact, strict=True):
        torch.testing.assert_close(actual.to(F64), wanted, rtol=0, atol=4 * ulp)
    for ours_p, theirs_p in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert ours_p.grad is not None
        assert ours_p.grad.dtype == torch.float32
        scale = theirs_p.grad.abs().max().item()
        torch.testing.assert_close(ours_p.grad.to(F64), theirs_p.grad, rtol=0, atol=8 * ulp * scale)
