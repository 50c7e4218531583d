"""The attention kernels on a GPU: every case against the reference, and what only fits there."""

import shutil
import subprocess
import sys

import pytest
import torch
from torch import Tensor

import seqkern
from seqkern.testing import all_cases, assert_matches_reference, cotangents, named

pytestmark = pytest.mark.gpu

CASES = [case for case in all_cases() if case.name.startswith("attention")]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@every_case
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_values_and_gradients(case, dtype: torch.dtype) -> None:
    inputs = [t.cuda().requires_grad_() for t in case.tensors(dtype)]
    out = case.op(*inputs)
    grads = cotangents(out, dtype)
    actual = named(out, torch.autograd.grad(out, inputs, grads))
    assert_matches_reference(case, actual, inputs, grads, dtype)


@every_case
def test_same_bits_again_and_no_uninitialised_memory(case) -> None:
    runs = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            inputs = [t.cuda().requires_grad_() for t in case.tensors(torch.bfloat16)]
            out = case.op(*inputs)
            grads = cotangents(out, torch.bfloat16)
            runs.append([*out, *torch.autograd.grad(out, inputs, grads)])
    finally:
        torch.use_deterministic_algorithms(False)
    assert not any(t.isnan().any() for t in runs[0])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("case", [c for c in CASES if c.small], ids=lambda case: case.name)
def test_opcheck(case) -> None:
    for op, args in case.raw(tuple(t.cuda().requires_grad_() for t in case.tensors(torch.float32))):
        torch.library.opcheck(op, args)


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


def test_cuda_graph() -> None:
    """Lengths are read on the device: a captured graph follows them, and nothing synchronises."""
    q, k, v = inputs_of(2, 4, 2, 200, 64)
    lens = torch.tensor([200, 70], device="cuda", dtype=torch.int32)
    do = torch.randn_like(q)

    def step():
        o = seqkern.attention(q, k, v, k_lens=lens, causal="bottom_right")
        return [o.detach(), *torch.autograd.grad(o, (q, k, v), do)]

    step()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.graph(graph):
            captured = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
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


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_compute_sanitizer(tool: str) -> None:
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    program = """
import torch, seqkern
q = torch.randn(2, 4, 97, 40, device="cuda", dtype=torch.bfloat16, requires_grad=True)
lens = torch.tensor([97, 13], device="cuda", dtype=torch.int32)
bias = torch.randn(1, 4, 1, 97, device="cuda", requires_grad=True)
seqkern.attention(q, q, q, k_lens=lens, bias=bias, causal="top_left").sum().backward()
"""
    done = subprocess.run(
        [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", program],
        capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
