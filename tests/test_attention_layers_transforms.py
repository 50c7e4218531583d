"""seqkern.nn's attention layers under PyTorch's transforms: compile, export, func, autocast."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, jacrev, jvp, stack_module_state, vmap
from torch.utils.checkpoint import checkpoint

from tests.attention_modules import F64, alone, build, every_name, results

# torch.nn warns of layers that its fast path does not take.
pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")


# A Transformer holds one of each. AOTAutograd takes half a minute for it, and learns nothing that
# it does not from the attention alone.
@pytest.mark.parametrize(
    ("name", "backend"), [("MultiheadAttention", "aot_eager"), ("Transformer", "eager")]
)
def test_compile_fullgraph_dynamic(name: str, backend: str) -> None:
    theirs, ours = alone(name)
    torch.compiler.reset()
    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend=backend)
    for B, T in ((2, 4), (3, 5)):
        x = torch.randn(B, T, 8, dtype=F64)
        expected = results(theirs, x)
        torch.testing.assert_close(results(ours, x, compiled), expected)


@pytest.mark.parametrize("mask_check", [False, True])
def test_compile_with_masks(mask_check: bool) -> None:
    theirs, ours = build("TransformerEncoder")
    theirs.mask_check = ours.mask_check = mask_check
    x = torch.randn(2, 4, 8, dtype=F64)
    padding = torch.arange(4) >= torch.tensor([[4], [2]])
    causal = torch.ones(4, 4, dtype=torch.bool).triu(1)

    def compiled(**kwargs: Any) -> Tensor:
        torch.compiler.reset()
        return torch.compile(ours, fullgraph=True, backend="eager")(x, **kwargs)

    masks = {"mask": causal, "src_key_padding_mask": padding}
    torch.testing.assert_close(compiled(**masks), theirs(x, **masks))
    theirs.eval(), ours.eval()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.nn warns of the nested tensor that it makes
        actual = compiled(src_key_padding_mask=padding)
        expected = theirs(x, src_key_padding_mask=padding)
    torch.testing.assert_close(actual[~padding], expected[~padding])
    if not mask_check:
        # No value of the mask decides, so the padding is left out as it is without compilation.
        torch.testing.assert_close(actual, expected)


def test_compile_of_nested_input() -> None:
    _, ours = alone("MultiheadAttention")
    torch.compiler.reset()
    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend="aot_eager")
    for bounds in ([0, 2, 7, 9], [0, 1, 1, 4, 8]):
        rows = torch.randn(bounds[-1], 8, dtype=F64)
        x = torch.nested.nested_tensor_from_jagged(rows, torch.tensor(bounds), max_seqlen=5)
        torch.testing.assert_close(compiled(x).values(), ours(x).values())


@pytest.mark.parametrize("name", ["MultiheadAttention", "Transformer"])
def test_export(name: str) -> None:
    theirs, ours = alone(name)
    dims = {i: torch.export.Dim(n, min=2, max=64) for i, n in enumerate(("batch", "steps"))}
    x = torch.randn(3, 4, 8, dtype=F64)
    program = torch.export.export(ours.eval(), (x,), dynamic_shapes=(dims,))
    x = torch.randn(5, 7, 8, dtype=F64)
    torch.testing.assert_close(program.module()(x), theirs(x))


def loss_with(module: Any) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
    return lambda weights, x: functional_call(module, weights, (x,)).sin().sum()


# Sizes that are checked are constants of a trace, PyTorch warns.
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    ("name", "grad_mode"),
    [("MultiheadAttention", False), ("MultiheadAttention", True), ("Transformer", True)],
)
def test_jit_trace(name: str, grad_mode: bool) -> None:
    """With its gradients, at other sizes."""
    theirs, ours = alone(name)
    with torch.set_grad_enabled(grad_mode):
        traced = torch.jit.trace(ours, (torch.randn(2, 3, 8, dtype=F64),))
    x = torch.randn(3, 5, 8, dtype=F64)
    torch.testing.assert_close(results(traced, x), results(theirs, x))


class Masked(torch.nn.Module):
    def __init__(self, module: Any, name: str) -> None:
        super().__init__()
        self.module, self.name = module, name

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.module(x, **{self.name: mask})


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_trace_holds_no_values_of_masks() -> None:
    x, causal = torch.randn(2, 4, 8, dtype=F64), torch.ones(4, 4, dtype=torch.bool).triu(1)
    right = torch.arange(4) >= torch.tensor([[4], [2]])
    left, encoder = right.flip(1), build("TransformerEncoder")[1].eval()
    by_mask, by_padding = Masked(encoder, "mask"), Masked(encoder, "src_key_padding_mask")
    with torch.no_grad():
        traced = torch.jit.trace(by_mask, (x, causal))
        torch.testing.assert_close(traced(x, causal.T), by_mask(x, causal.T))
        traced = torch.jit.trace(by_padding, (x, right))
        torch.testing.assert_close(traced(x, left)[~left], by_padding(x, left)[~left])


@every_name
def test_func_grad_and_per_sample_gradients(name: str) -> None:
    theirs, ours = alone(name)
    x = torch.randn(3, 4, 8, dtype=F64)
    weights = {key: w.detach() for key, w in ours.named_parameters()}
    actual = grad(loss_with(ours), argnums=(0, 1))(weights, x)
    expected = results(theirs, x)[1:]
    torch.testing.assert_close([actual[1], *actual[0].values()], expected)
    per_sample = vmap(grad(loss_with(ours)), in_dims=(None, 0))(weights, x[:, None])
    total = {key: g.sum(0) for key, g in per_sample.items()}
    torch.testing.assert_close(total, actual[0])


@pytest.mark.parametrize("need_weights", [False, True])
def test_vmap_over_inputs_and_masks(need_weights: bool) -> None:
    theirs, ours = build("MultiheadAttention")
    x = torch.randn(3, 2, 4, 8, dtype=F64)
    padding = torch.rand(3, 2, 4) < 0.4
    padding[..., 0] = False
    mask = torch.randn(3, 4, 4, dtype=F64)

    def call(module: Any) -> Callable[..., Any]:
        def run(x: Tensor, padding: Tensor, mask: Tensor) -> Any:
            options = {"key_padding_mask": padding, "attn_mask": mask}
            result = module(x, x, x, need_weights=need_weights, **options)
            return result if need_weights else result[0]

        return run

    actual = vmap(call(ours))(x, padding, mask)
    floating = torch.zeros(padding.shape, dtype=F64).masked_fill(padding, -torch.inf)
    expected = [call(theirs)(*args) for args in zip(x, floating, mask, strict=True)]
    parts = zip(*expected, strict=True) if need_weights else [expected]
    stacked = [torch.stack([*part]) for part in parts]
    torch.testing.assert_close([*actual] if need_weights else [actual], stacked)


def test_vmap_over_an_ensemble() -> None:
    models = [alone("TransformerEncoderLayer")[1] for _ in range(3)]
    weights, buffers = stack_module_state(models)
    x = torch.randn(2, 4, 8, dtype=F64)
    actual = vmap(lambda w, b: functional_call(models[0], (w, b), (x,)))(weights, buffers)
    torch.testing.assert_close(actual, torch.stack([model(x) for model in models]))


# PyTorch's forward mode compiles scripts of its own on its first call.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_higher_derivatives() -> None:
    theirs, ours = alone("MultiheadAttention")
    x, direction = torch.randn(1, 3, 8, dtype=F64), torch.randn(1, 3, 8, dtype=F64)
    expected = torch.autograd.functional.jacobian(theirs, x)
    torch.testing.assert_close(jacrev(ours)(x), expected)
    tangent = (expected.reshape(24, 24) @ direction.flatten()).view(1, 3, 8)
    torch.testing.assert_close(jvp(ours, (x,), (direction,))[1], tangent)

    def explicit(v: Tensor) -> Tensor:  # torch's fused kernel has no second derivative
        return theirs.module(v, v, v, need_weights=True)[0].sin().sum()

    second = torch.autograd.functional.hessian(lambda v: ours(v).sin().sum(), x)
    torch.testing.assert_close(second, torch.autograd.functional.hessian(explicit, x))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    _, ours = alone("TransformerEncoderLayer", dropout=0.5)
    x = torch.randn(2, 4, 8, dtype=F64)

    def gradients(run: Callable[[Tensor], Tensor]) -> list[Tensor]:
        torch.manual_seed(2)
        ours.zero_grad()
        leaf = x.clone().requires_grad_()
        run(leaf).sin().sum().backward()
        return [leaf.grad, *[p.grad for p in ours.parameters()]]  # type: ignore[list-item] # set

    actual = gradients(lambda v: checkpoint(ours, v, use_reentrant=reentrant))
    torch.testing.assert_close(actual, gradients(ours), rtol=0, atol=0)


@every_name
def test_autocast(name: str) -> None:
    theirs, ours = alone(name, dtype=torch.float32)
    x = torch.randn(2, 4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        expected, actual = theirs(x), ours(x)
    assert actual.dtype == expected.dtype
    exact = theirs.double()(x.double())
    error, their_error = ((t.double() - exact).abs().max() for t in (actual, expected))
    assert error <= 2 * their_error + torch.finfo(torch.bfloat16).eps
    actual.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in ours.parameters())
