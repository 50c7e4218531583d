"""Every op on every case: values and gradients, derivatives, torch.library, layouts, dtypes."""

import pytest
import torch
from torch import Tensor

from seqkern.ops.choice import has_native_kernel
from seqkern.testing import (
    OpCase,
    all_cases,
    assert_matches_reference,
    assert_within_budget,
    cotangents,
    named,
)

CASES = all_cases()
SMALL = [case for case in CASES if case.small]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
NATIVE = has_native_kernel("recurrent", "cpu")
# Without the extension the kernel is the reference, for which there is one path only.
CAPABILITIES = ["amx", "avx512_bf16", "avx512", "avx2", "portable"] if NATIVE else ["reference"]
KERNELS = [
    pytest.param(case, capability, id=f"{capability}-{case.name}")
    for case in CASES
    for capability in (["any"] if case.name.startswith("attention") else CAPABILITIES)
]


def by_name(case: OpCase) -> str:
    return case.name


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


every_case = pytest.mark.parametrize("case", CASES, ids=by_name)
every_small_case = pytest.mark.parametrize("case", SMALL, ids=by_name)
every_kernel = pytest.mark.parametrize(("case", "capability"), KERNELS, indirect=["capability"])
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=short)


def leaves(case: OpCase, dtype: torch.dtype, grad: bool = True) -> list[Tensor]:
    return [t.requires_grad_(grad) for t in case.tensors(dtype)]


@every_dtype
@every_kernel
def test_values_and_gradients(case: OpCase, dtype: torch.dtype, capability: str) -> None:
    inputs = leaves(case, dtype)
    out = case.op(*inputs)
    grads = cotangents(out, dtype)
    actual = named(out, torch.autograd.grad(out, inputs, grads))
    assert_matches_reference(case, actual, inputs, grads, dtype)


@every_dtype
@every_kernel
def test_inference(case: OpCase, dtype: torch.dtype, capability: str) -> None:
    inputs = case.tensors(dtype)
    with torch.no_grad():
        out = case.op(*inputs)
    assert not any(t.requires_grad for t in out)
    assert_matches_reference(case, named(out, ()), inputs, cotangents(out, dtype), dtype)


@every_case
def test_reference_backward_is_the_derivative_of_its_forward(case: OpCase) -> None:
    """Autograd derives the reference's forward, operation by operation; the formulas agree."""
    inputs = leaves(case, torch.float64)
    out = case.forward(*inputs)
    grads = cotangents(out, torch.float64)
    derived = torch.autograd.grad(out, inputs, grads)
    _, formulas = case.reference(tuple(t.detach() for t in inputs), grads)
    torch.testing.assert_close(derived, formulas, rtol=1e-10, atol=1e-12)


@every_small_case
def test_gradcheck(case: OpCase) -> None:
    assert torch.autograd.gradcheck(case.op, leaves(case, torch.float64), fast_mode=True)


@every_small_case
def test_gradgradcheck(case: OpCase) -> None:
    # The small-magnitude third derivatives of the numerical side need the wider atol.
    assert torch.autograd.gradgradcheck(
        case.op, leaves(case, torch.float64), fast_mode=True, atol=1e-4
    )


@pytest.mark.parametrize("graph", [False, True])
@every_small_case
def test_batched_gradients(case: OpCase, graph: bool) -> None:
    """`is_grads_batched`, which vectorised jacobians use: every slice as alone, with its graph."""
    inputs, found = leaves(case, torch.float64), []
    for function in (case.op, case.forward):
        out = function(*inputs)

        def derive(grads: list[Tensor], batched: bool, out: tuple = out) -> tuple[Tensor, ...]:
            options = {"is_grads_batched": batched, "create_graph": graph, "retain_graph": True}
            return torch.autograd.grad(out, inputs, grads, **options)

        grads = [torch.stack([g, -2 * g]) for g in cotangents(out, torch.float64)]
        if function is case.op:
            first = derive(grads, batched=True)
        else:
            slices = [derive([g[i] for g in grads], batched=False) for i in range(2)]
            first = [torch.stack(same) for same in zip(*slices, strict=True)]
        penalty = torch.stack([g.square().sum() for g in first]).sum()
        again = torch.autograd.grad(penalty, inputs, materialize_grads=True) if graph else ()
        found.append([*first, *again])
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)


@every_small_case
def test_functionalize(case: OpCase) -> None:
    """Of a call, of a derivative, and inside of one: autograd functions have no rule for it."""
    inputs = case.tensors(torch.float64)
    expected = case.op(*inputs)
    grads, places = cotangents(expected, torch.float64), tuple(range(len(inputs)))

    def loss(*tensors: Tensor) -> Tensor:
        terms = [(t * g).sum() for t, g in zip(case.op(*tensors), grads, strict=True)]
        return torch.stack(terms).sum()

    functionalize, derivative = torch.func.functionalize, torch.func.grad(loss, argnums=places)
    inside = torch.func.grad(functionalize(loss), argnums=places)
    actual = [functionalize(case.op)(*inputs), functionalize(derivative)(*inputs), inside(*inputs)]
    gradients = derivative(*inputs)
    torch.testing.assert_close(actual, [expected, gradients, gradients], rtol=1e-10, atol=1e-12)


# Tracing the second derivative takes seconds for every step, and the sizes are symbols in it.
SHORT = [case for case in SMALL if any(n in case.name for n in ("H1", "B0", "-one-"))]


@pytest.mark.parametrize(
    ("case", "grad"),
    [pytest.param(c, False, id=f"{c.name}-plain") for c in SMALL]
    + [pytest.param(c, True, id=f"{c.name}-grad") for c in SHORT],
)
def test_opcheck(case: OpCase, grad: bool) -> None:
    for op, args in case.raw(tuple(leaves(case, torch.float64, grad))):
        torch.library.opcheck(op, args)


@every_case
def test_non_contiguous_inputs(case: OpCase) -> None:
    """Transposed, expanded and offset inputs, and gradients with stride 0."""

    def strided(t: Tensor) -> Tensor:
        if t.dim() == 3:
            return t.transpose(0, 1).contiguous().transpose(0, 1)
        wide = t.new_full((*t.shape[:-1], 2 * t.size(-1) + 1), torch.nan)
        view = wide[..., 1::2]
        view.copy_(t)
        return view

    plain, odd = leaves(case, torch.float32), [strided(t) for t in case.tensors(torch.float32)]
    odd = [t.requires_grad_() for t in odd]
    out, odd_out = case.op(*plain), case.op(*odd)
    torch.testing.assert_close(odd_out, out)
    gradients = torch.autograd.grad([t.sum() for t in out], plain)
    odd_gradients = torch.autograd.grad([t.sum() for t in odd_out], odd)
    torch.testing.assert_close(odd_gradients, gradients)


@every_case
def test_any_subset_of_gradients(case: OpCase) -> None:
    """Each input alone takes the gradient it takes among all, and no result has to be used."""
    inputs = leaves(case, torch.float32)
    out = case.op(*inputs)
    for used in range(len(out)):
        everything = torch.autograd.grad(
            out[used].sum(), inputs, retain_graph=True, materialize_grads=True
        )
        for i, whole in enumerate(everything):
            alone = leaves(case, torch.float32, grad=False)
            alone[i].requires_grad_()
            (one,) = torch.autograd.grad(
                case.op(*alone)[used].sum(), alone[i], materialize_grads=True
            )
            assert torch.equal(one, whole)


@every_case
def test_same_bits_again(case: OpCase) -> None:
    inputs = leaves(case, torch.float32)
    runs = []
    for _ in range(2):
        out = case.op(*inputs)
        runs.append([*out, *torch.autograd.grad(out, inputs, cotangents(out, torch.float32))])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@every_small_case
def test_autocast(case: OpCase) -> None:
    inputs = leaves(case, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = case.op(*inputs)
        twice = case.op(*leaves(case, torch.float64, grad=False))
    cast, n = case.tensors(torch.bfloat16), case.autocast
    explicit = case.op(*cast[:n], *([] if n is None else case.tensors(torch.float32)[n:]))
    for a, b, c in zip(out, explicit, twice, strict=True):
        assert torch.equal(a, b)
        assert c.dtype == torch.float64
    gradients = torch.autograd.grad([t.float().sum() for t in out], inputs)
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients)


@every_case
def test_uninitialised_memory_is_not_read(case: OpCase) -> None:
    """PyTorch fills every empty tensor with NaN: one that is not written whole shows it."""
    inputs = leaves(case, torch.float32)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        out = case.op(*inputs)
        gradients = torch.autograd.grad(out, inputs, cotangents(out, torch.float32))
    finally:
        torch.use_deterministic_algorithms(False)
    assert not any(t.isnan().any() for t in (*out, *gradients))


@pytest.mark.parametrize("case", [c for c in SMALL if "B0" not in c.name], ids=by_name)
def test_compile(case: OpCase) -> None:
    """One graph, without a break, for the gradient and for several sizes."""
    inputs = leaves(case, torch.float32)
    torch.compiler.reset()
    compiled = torch.compile(case.op, fullgraph=True, dynamic=True, backend="aot_eager")
    results = []
    for run in (case.op, compiled):
        out = run(*inputs)
        results.append([*out, *torch.autograd.grad(out, inputs, cotangents(out, torch.float32))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_nan_is_over_every_budget() -> None:
    """Also where the exact result is zero, so that no error can be a part of it."""
    for exact in (torch.zeros(3).double(), torch.ones(3).double()):
        with pytest.raises(AssertionError, match="relative error nan"):
            assert_within_budget(
                {"o": torch.full((3,), torch.nan)}, {"o": exact}, [], torch.float32
            )


def test_a_fused_op_has_both_directions() -> None:
    for op in ("recurrent", "attention", "additive_attention", "attention_decoder"):
        for device in ("cpu", "cuda"):
            fused = {name: has_native_kernel(name, device) for name in (op, f"{op}_backward")}
            assert len(set(fused.values())) == 1, (device, fused)
