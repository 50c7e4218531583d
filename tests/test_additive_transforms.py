"""seqkern.additive_attention under PyTorch's transforms: export, func, forward mode, autocast."""

import pytest
import torch
from torch.autograd import forward_ad

import seqkern
from tests.additive_inputs import F64, assert_close, attend, draw, eager, inputs_of


class Attend(torch.nn.Module):
    """The function as a module, for torch.export."""

    def __init__(self) -> None:
        super().__init__()
        self.v = torch.nn.Parameter(torch.randn(7, dtype=F64))

    def forward(self, query, key, value, k_lens):
        return attend(query, key, value, self.v, k_lens=k_lens)


def test_export() -> None:
    module = Attend()
    query, key, value, _ = inputs_of(B=4, grad=False)
    k_lens = torch.tensor([5, 2, 0, 3])
    batch, Tk = torch.export.Dim("B", min=2, max=64), torch.export.Dim("Tk", min=2, max=64)
    both = {0: batch, 1: Tk}
    program = torch.export.export(
        module, (query, key, value, k_lens), dynamic_shapes=({0: batch}, both, both, {0: batch})
    )
    names = {node.target for node in program.graph.nodes if node.op == "call_function"}
    assert torch.ops.seqkern.additive_attention.default in names
    query, key, value, _ = inputs_of(B=3, Tk=8, grad=False)
    k_lens = torch.tensor([8, 0, 5])
    exported = program.module()(query, key, value, k_lens)
    assert_close(exported, eager(query, key, value, module.v, k_lens=k_lens))


@pytest.mark.parametrize("mode", ["float", "bool"])
def test_per_sample_gradients(mode: str) -> None:
    """vmap of grad: one gradient of v, of the query and of the mask for each sample."""
    query, key, value, v = inputs_of(B=3, grad=False)
    masks = draw(3, 3, 5, grad=False) if mode == "float" else torch.rand(3, 3, 5) > 0.3
    masks = masks if mode == "float" else masks | torch.eye(3, 5, dtype=torch.bool)
    k_lens = torch.tensor([5, 3, 4])

    def loss(attention, query, v, key, value, mask, n):
        options = {"mask": mask.unsqueeze(0), "k_lens": n.unsqueeze(0)}
        o, weights, lse = attention(*(t.unsqueeze(0) for t in (query, key, value)), v, **options)
        return (o**3).sum() + (weights**2).sum() + lse.sin().sum()

    found = [
        torch.func.vmap(
            torch.func.grad(lambda *args, f=f: loss(f, *args), argnums=(0, 1)),
            in_dims=(0, None, 0, 0, 0, 0),
        )(query, v, key, value, masks, k_lens)
        for f in (attend, eager)
    ]
    assert found[0][1].shape == (3, 7)
    assert_close(*found)


@pytest.mark.parametrize("in_dims", [(0, None, 1, None), (None, 0, 0, 0), (1, 2, None, None)])
def test_vmap(in_dims: tuple) -> None:
    """Any argument may have the new dimension, anywhere, or none of it."""
    inputs = inputs_of(grad=False)
    mask = draw(1, 3, 5, grad=False)
    shapes = []
    for t, dim in zip(inputs, in_dims, strict=True):
        stacked = t if dim is None else torch.stack([t, 2 * t, -t], dim)
        shapes.append(stacked)
    ours, theirs = (
        torch.func.vmap(lambda *args, f=f: f(*args, mask=mask), in_dims=in_dims)(*shapes)
        for f in (attend, eager)
    )
    assert_close(ours, theirs)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_forward_mode() -> None:
    inputs = inputs_of(grad=False)
    tangents = [torch.randn_like(t) for t in inputs]
    options = {"k_lens": torch.tensor([4, 2])}
    _, ours = torch.func.jvp(lambda *t: attend(*t, **options), tuple(inputs), tuple(tangents))
    _, theirs = torch.func.jvp(lambda *t: eager(*t, **options), tuple(inputs), tuple(tangents))
    assert_close(ours, theirs)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(*pair) for pair in zip(inputs, tangents, strict=True)]
        results = attend(*duals, **options)
        assert_close([forward_ad.unpack_dual(t).tangent for t in results], theirs)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_hessian() -> None:
    inputs = inputs_of(B=1, Tq=2, Tk=3, D=3, Dv=2, grad=False)

    def loss(f, query):
        o, weights, lse = f(query, *inputs[1:])
        return (o**2).sum() + (weights**3).sum() + lse.cos().sum()

    ours, theirs = (
        torch.func.hessian(lambda q, f=f: loss(f, q))(inputs[0]) for f in (attend, eager)
    )
    assert_close([ours], [theirs])


def test_autocast_takes_parameters_in_float32() -> None:
    query, key, value, v = inputs_of(dtype=torch.float32)
    bias, g = draw(7, dtype=torch.float32), draw(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = query.bfloat16()
        o, weights = seqkern.additive_attention(
            half, key, value, v, bias=bias, g=g, return_weights=True
        )
    assert o.dtype == weights.dtype == torch.bfloat16
    inputs = query, key, value, v, bias, g
    grads = torch.autograd.grad(o.float().sum() + weights.float().square().sum(), inputs)
    assert all(t.dtype == torch.float32 and t.isfinite().all() for t in grads)
    with pytest.raises(ValueError, match="key must have the dtype of query"):
        seqkern.additive_attention(half, key, value, v)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_padding_is_not_read_by_other_derivatives_either() -> None:
    """Second and forward-mode ones, which come from the reference's operations."""
    query, key, value, v = inputs_of(grad=False)
    k_lens = torch.tensor([5, 2])
    beyond = (torch.arange(5) >= k_lens.unsqueeze(1)).unsqueeze(-1)
    spoilt = key.masked_fill(beyond, torch.nan), value.masked_fill(beyond, torch.nan)
    directions = [torch.randn_like(query), torch.randn_like(v)]
    found = []
    for keys, values in ((key, value), spoilt):

        def penalty(query, v, keys=keys, values=values):
            o, weights, lse = attend(query, keys, values, v, k_lens=k_lens)
            return o.square().sum() + weights.square().sum() + lse.sin().sum()

        _, tangent = torch.func.jvp(penalty, (query, v), tuple(directions))
        leaves = [query.clone().requires_grad_(), v.clone().requires_grad_()]
        grads = torch.autograd.grad(penalty(*leaves), leaves, create_graph=True)
        second = torch.autograd.grad(grads, leaves, directions)
        found.append([tangent, *second])
    assert_close(*found)
