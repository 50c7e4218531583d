"""The attention kernels on a GPU: the interpreter's cases with the tiles of the tables, and what
only fits there."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels are Triton's")

import seqkern
from tests.attention_cases import (
    DESCRIPTORS,
    FEATURES,
    SIZES,
    Case,
    assert_right,
    bf16,
    computed,
    fp16,
    fp32,
    name_of,
)
from tests.cuda_graph import capture
from tests.offline.memory import poisoned_memory

pytestmark = pytest.mark.gpu
DEVICE = "cuda"


def large(D: int, dtype: torch.dtype = bf16, **features) -> Case:
    return Case(B=1, H=2, Hkv=1, Tq=300, Tk=500, D=D, Dv=D, dtype=dtype, **features)


# Several tiles of every kernel in both directions, at the head sizes of the tables.
LARGE = [
    large(32, causal="top_left"),
    large(64, causal="bottom_right"),
    large(128, fp16, causal="bottom_right", sinks=True),
    large(256, window=(150, 40)),
    large(512, causal="bottom_right"),
    large(64, fp32, window=(200, 10)),
    large(128, fp32, causal="bottom_right"),
    large(256, fp32, alibi="h"),
    large(128, mask=(1, 1, 300, 500), dropout_p=0.2),
    large(64, fp16, mask=(1, 2, 300, 500), bias=(1, 1, 300, 500)),
    large(128, bias=(1, 2, 300, 500), softcap=5.0),
    Case(3, 4, 2, 300, 500, 128, 128, bf16, ((300, 129, 1), (131, 500, 257))),
    Case(
        *(4, 4, 2, 257, 400, 128, 64, bf16, ((257, 0, 130, 3), (129, 64, 400, 0))),
        packed=True,
        causal="bottom_right",
        alibi="h",
    ),
]


@pytest.mark.parametrize("case", [*SIZES, *FEATURES, *DESCRIPTORS, *LARGE], ids=name_of)
def test_values(case: Case) -> None:
    """Fresh memory holds NaN, and so does what a kernel has no business to read."""
    t, ops = case.tensors(), torch.ops.seqkern
    there = {name: None if x is None else x.to(DEVICE) for name, x in t.items()}
    with poisoned_memory():
        results = computed(ops.attention, ops.attention_backward, there, case)
    assert_right(case, t, {name: x.cpu() for name, x in results.items()})


def inputs_of(B: int, H: int, Hkv: int, T: int, D: int, dtype=torch.bfloat16) -> list[Tensor]:
    return [
        torch.randn(B, h, T, D, device="cuda", dtype=dtype, requires_grad=True)
        for h in (H, Hkv, Hkv)
    ]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend: str) -> None:
    q, k, v = inputs_of(2, 4, 2, 129, 64)
    lens = torch.tensor([129, 40], device="cuda", dtype=torch.int32)

    def attend(q, k, v, lens):
        return seqkern.attention(q, k, v, k_lens=lens, causal="bottom_right").float().sum()

    torch.compiler.reset()
    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend=backend)
    expected, grads = (
        torch.autograd.grad(run(q, k, v, lens), (q, k, v)) for run in (attend, compiled)
    )
    torch.testing.assert_close(grads, expected)


@pytest.mark.parametrize("dropout", [{}, {"dropout_p": 0.3, "dropout_seed": 5}])
def test_cuda_graph(dropout: dict) -> None:
    """Lengths are read on the device: a captured graph follows them, and nothing synchronises."""
    q, k, v = inputs_of(2, 4, 2, 200, 64)
    lens = torch.tensor([200, 70], device="cuda", dtype=torch.int32)
    do = torch.randn_like(q)

    def step():
        o = seqkern.attention(q, k, v, k_lens=lens, causal="bottom_right", **dropout)
        return [o.detach(), *torch.autograd.grad(o, (q, k, v), do)]

    graph, captured = capture(step)
    for new in ([33, 200], [1, 0]):
        lens.copy_(torch.tensor(new, dtype=torch.int32))
        graph.replay()
        torch.testing.assert_close(captured, step(), rtol=0, atol=0)


def rows_alone(q: Tensor, k: Tensor, v: Tensor, rows: list[int], causal: bool) -> Tensor:
    """The rows of the first head's result, in float32."""
    picked = q[0, 0, rows].float() @ k[0, 0].float().T * q.size(-1) ** -0.5
    if causal:
        later = torch.arange(k.size(2), device="cuda") > torch.tensor(rows, device="cuda")[:, None]
        picked = picked.masked_fill(later, -torch.inf)
    return picked.softmax(-1) @ v[0, 0].float()


@pytest.mark.parametrize("T", [16384, 65536])
def test_long_sequences(T: int) -> None:
    q, k, v = inputs_of(1, 2, 1, T, 128)
    o = seqkern.attention(q, k, v, causal="top_left")
    rows = [0, 1, 63, 64, T // 2 + 1, T - 1]
    expected = rows_alone(q, k, v, rows, True)
    torch.testing.assert_close(o[0, 0, rows].float(), expected, rtol=2e-2, atol=2e-2)
    (dv,) = torch.autograd.grad(o[0, 0, 0].float().sum(), v)
    # The first query sees the first key alone.
    assert torch.equal(dv[0, 0, 0].float(), torch.ones(128, device="cuda"))
    assert not dv[0, 0, 1:].any()


def test_more_than_two_to_the_31_elements() -> None:
    """The last head lies beyond what 32 bits address, and so do the last rows of a wide stride."""
    q = torch.randn(1, 33, 2**19, 128, device="cuda", dtype=torch.bfloat16)
    assert q.numel() > 2**31
    few = q[:, -1:, :64]
    o = seqkern.attention(few, few, few)
    torch.testing.assert_close(o[0, 0].float(), rows_alone(few, few, few, list(range(64)), False),
                               rtol=2e-2, atol=2e-2)  # fmt: skip
    wide = q.view(1, 2**19, 33, 128)[:, :: 2**13].transpose(1, 2)
    o = seqkern.attention(wide, wide, wide)
    expected = seqkern.attention(*[wide.contiguous()] * 3)
    torch.testing.assert_close(o, expected, rtol=0, atol=0)


def test_dropout_is_the_cpus() -> None:
    q, k, v = inputs_of(2, 4, 2, 97, 64, torch.float32)
    options = {"dropout_p": 0.3, "dropout_seed": 2**40 + 5}
    ours = seqkern.attention(q, k, v, **options)
    expected = seqkern.attention(q.cpu(), k.cpu(), v.cpu(), **options)
    torch.testing.assert_close(ours.cpu(), expected)
