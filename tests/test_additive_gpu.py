"""The additive attention kernels on a GPU: what only fits there."""

import dataclasses

import pytest
import torch
from torch import Tensor

import seqkern
from tests.cuda_graph import capture

pytestmark = pytest.mark.gpu


def inputs_of(B: int, Tq: int, Tk: int, D: int, Dv: int, dtype=torch.bfloat16) -> list[Tensor]:
    """query, key, value and v."""
    shapes = (B, Tq, D), (B, Tk, D), (B, Tk, Dv), (D,)
    made = [torch.randn(shape, device="cuda", dtype=dtype) for shape in shapes]
    made[3] *= D**-0.5
    return [t.requires_grad_() for t in made]


@pytest.mark.parametrize("Tq", [1, 33])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend: str, Tq: int) -> None:
    inputs = inputs_of(2, Tq, 129, 64, 40)
    lens = torch.tensor([129, 40], device="cuda", dtype=torch.int32)

    def attend(query, key, value, v, lens):
        return seqkern.additive_attention(query, key, value, v, k_lens=lens).float().sum()

    torch.compiler.reset()
    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend=backend)
    expected, grads = (
        torch.autograd.grad(run(*inputs, lens), inputs) for run in (attend, compiled)
    )
    torch.testing.assert_close(grads, expected)


@pytest.mark.parametrize("Tq", [1, 20])
def test_cuda_graph(Tq: int) -> None:
    """Lengths are read on the device: a captured graph follows them, and nothing synchronises."""
    inputs = inputs_of(2, Tq, 200, 64, 64)
    lens = torch.tensor([200, 70], device="cuda", dtype=torch.int32)
    do = torch.randn(2, Tq, 64, device="cuda", dtype=torch.bfloat16)

    def step() -> list[Tensor]:
        o = seqkern.additive_attention(*inputs, k_lens=lens)
        return [o.detach(), *torch.autograd.grad(o, inputs, do)]

    graph, captured = capture(step)
    for new in ([200, 70], [1, 0], [150, 200]):
        lens.copy_(torch.tensor(new, dtype=torch.int32))
        graph.replay()
        torch.testing.assert_close(captured, step(), rtol=0, atol=0)


def row_alone(inputs: list[Tensor], b: int, i: int) -> Tensor:
    """One row of the result, in float32."""
    query, key, value, v = (t.detach().float() for t in inputs)
    return ((query[b, i] + key[b]).tanh() @ v).softmax(0) @ value[b]


@pytest.mark.parametrize("sizes", [(1, 2000, 20000, 256, 128), (64, 1, 8192, 512, 1024)])
def test_large_sizes(sizes: tuple[int, ...]) -> None:
    """Whose tanh would take 20 GB; and single queries, split or not."""
    inputs = inputs_of(*sizes)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    o = seqkern.additive_attention(*inputs)
    torch.autograd.grad(o.float().sum(), inputs)
    for b, i in {(0, 0), (sizes[0] - 1, sizes[1] - 1)}:
        torch.testing.assert_close(o[b, i].float(), row_alone(inputs, b, i), rtol=2e-2, atol=1e-2)
    made = torch.cuda.max_memory_allocated() - before
    B, Tq, Tk, D, Dv = sizes
    assert made < 32 * B * (Tq + Tk + 256) * (D + Dv)


def test_more_than_two_to_the_31_elements() -> None:
    """The last sequence lies beyond what 32 bits address, and so do rows of a wide stride."""
    key = torch.randn(33, 2**19, 128, device="cuda", dtype=torch.bfloat16)
    assert key.numel() > 2**31
    query, v = key[:, :20], torch.randn(128, device="cuda", dtype=torch.bfloat16) / 11
    few = [query[-1:], key[-1:, :300], key[-1:, :300], v]
    o = seqkern.additive_attention(*few)
    torch.testing.assert_close(o[0, 3].float(), row_alone(few, 0, 3), rtol=2e-2, atol=1e-2)
    wide = [t.view(33, 2**19, 128)[:, :: 2**13].transpose(0, 1) for t in (key, key, key)]
    o = seqkern.additive_attention(*wide, v)
    expected = seqkern.additive_attention(*(t.contiguous() for t in wide), v)
    torch.testing.assert_close(o, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("tanh", "Tq"), [("shared", 4001), ("single", 4001), ("hardware", 4001), ("shared", 1)]
)
def test_every_way_to_take_tanh(tanh: str, Tq: int) -> None:
    """Within their bounds, on scores of one element; a single query has one way, of its own."""
    from seqkern.kernels.additive_attention import additive_attention
    from seqkern.kernels.additive_table import choose

    query = torch.linspace(-9.9, 9.9, 4001, device="cuda").view(-1, Tq, 1)
    config = dataclasses.replace(choose("forward", torch.float32), tanh=tanh)
    bound = {"shared": 6e-7, "single": 4e-7, "hardware": 6e-4}[tanh] if Tq > 1 else 4e-7
    one = torch.ones(query.size(0), 1, 1, device="cuda")
    for key in (-9.9, 0.0, 0.5, 9.0):
        args = query, one * key, one, one[0, 0], None, None, None, 1.0, False
        lse = additive_attention(*args, config=config)[2]
        exact = (query.double() + key).tanh()[..., 0]
        # The score itself is rounded twice more.
        assert (lse - exact).abs().max() < bound + 3e-7
