"""Every op on every case on a GPU, against the reference."""

import pytest
import torch

from seqkern.testing import all_cases, assert_matches_reference, cotangents, named
from seqkern.testing.additive import additive_case

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# More than one tile of the kernels in every dimension.
WIDE = [
    additive_case("wide", B=2, Tq=20, Tk=150, D=1000, Dv=1024, lens=(150, 77), weights=True),
    additive_case("wider", B=1, Tq=3, Tk=40, D=24, Dv=1500),
    additive_case("step-long", B=2, Tq=1, Tk=3000, D=256, Dv=512, lens=(3000, 1111)),
    additive_case("tiles", B=3, Tq=65, Tk=257, D=129, Dv=100, bias=(1, 65, 257), weights=True),
]
CASES = all_cases() + WIDE
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
