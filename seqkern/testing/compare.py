"""Compares what an op computed with its reference in float64."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from seqkern.testing.cases import OpCase, Tensors
from seqkern.testing.tolerance import assert_within_budget, neighbours


def cotangents(results: Sequence[Tensor], dtype: torch.dtype) -> Tensors:
    """Gradients of the results, the same numbers for every dtype up to rounding."""
    generator = torch.Generator().manual_seed(1)
    draws = [torch.rand(t.shape, generator=generator, dtype=torch.float64) - 0.5 for t in results]
    return tuple(g.to(t.device, dtype) for g, t in zip(draws, results, strict=True))


def named(results: Sequence[Tensor], gradients: Sequence[Tensor]) -> dict[str, Tensor]:
    """Results and gradients by the names under which they are compared."""
    names = {f"result {i}": t for i, t in enumerate(results)}
    return names | {f"gradient {i}": t for i, t in enumerate(gradients)}


def assert_matches_reference(
    case: OpCase,
    actual: Mapping[str, Tensor],
    inputs: Sequence[Tensor],
    grads: Sequence[Tensor],
    dtype: torch.dtype,
    count: int = 4,
) -> None:
    """Check results and gradients, or results alone, within the budget of their dtype.

    Args:
        case: the op.
        actual: by the names of `named`, on any device.
        inputs, grads: what went in, and the gradients of the results.
        dtype: of all of them.
        count: of the runs besides the first from which the reference's own error is taken.

    Raises:
        AssertionError: an error is over the budget, see `assert_within_budget`.
    """
    inputs, n = [t.detach().cpu() for t in inputs], len(inputs)
    tensors = *inputs, *(g.cpu() for g in grads)

    def reference_in(dtype: torch.dtype, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        tensors = tuple(t.to(dtype) for t in tensors)
        results = named(*case.reference(tensors[:n], tensors[n:]))
        return {name: results[name] for name in actual}

    # float64 has no more exact reference: see seqkern.testing.tolerance.
    other = torch.float32 if dtype == torch.float64 else dtype
    moved = neighbours([t.to(other) for t in tensors], count)
    runs = [reference_in(other, run) for run in moved]
    exact = reference_in(torch.float64, tensors)
    assert_within_budget({name: t.cpu() for name, t in actual.items()}, exact, runs, dtype)
