"""How far a result may be from the exact one, derived from data instead of by hand.

The budget of a kernel is twice the error that the plain PyTorch reference makes in the same
dtype, plus one rounding. Errors are measured against the reference in float64, relative to the
largest element of each tensor. The reference's is the largest over all results of the call and
over a few runs on inputs that differ by their last bit: in a tensor of one element a single run
may round luckily, or cancel where another does not, and says little.

There is no more exact reference for float64 itself: there the error of the float32 reference
is scaled by the ratio of the two roundings.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """The largest error as a part of the largest exact value; 0 where there are no elements."""
    if exact.numel() == 0:
        return 0.0
    error = (actual.double() - exact).abs().max().item()
    scale = exact.abs().max().item()
    return error / scale if scale else error


def neighbours(tensors: Sequence[Tensor], count: int = 4) -> Iterator[tuple[Tensor, ...]]:
    """The tensors themselves, then `count` times each element moved by at most one rounding."""
    yield tuple(tensors)
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        moved = []
        for t in tensors:
            noise = torch.rand(t.shape, generator=generator, dtype=torch.float64) * 2 - 1
            moved.append((t.double() * (1 + torch.finfo(t.dtype).eps * noise)).to(t.dtype))
        yield tuple(moved)


def error_budget(
    exact: Mapping[str, Tensor], same_dtype: Sequence[Mapping[str, Tensor]], dtype: torch.dtype
) -> float:
    """The relative error allowed for the results of one call in `dtype`.

    Args:
        exact: by name, what the reference computes in float64.
        same_dtype: what it computes in `dtype`, for each of `neighbours`; in float32 where
            `dtype` is float64.
        dtype: of the results under test.
    """
    eps, worst = torch.finfo(dtype).eps, 0.0
    for name, result in (item for run in same_dtype for item in run.items()):
        rounding = torch.finfo(result.dtype).eps
        worst = max(worst, relative_error(result, exact[name]) * eps / rounding)
    return 2 * worst + eps


def assert_within_budget(
    actual: Mapping[str, Tensor],
    exact: Mapping[str, Tensor],
    same_dtype: Sequence[Mapping[str, Tensor]],
    dtype: torch.dtype,
) -> None:
    """Check shapes, dtypes and values of all results of one call.

    Args:
        actual: by name, the results under test.
        exact, same_dtype: see `error_budget`.
        dtype: that the results must have.

    Raises:
        AssertionError: a name, a shape or a dtype differs, or an error is over the budget.
    """
    if actual.keys() != exact.keys():
        raise AssertionError(f"expected the results {list(exact)}, got {list(actual)}")
    budget = error_budget(exact, same_dtype, dtype)
    for name, result in actual.items():
        if result.dtype != dtype or result.shape != exact[name].shape:
            raise AssertionError(
                f"{name}: expected {dtype} {tuple(exact[name].shape)}, "
                f"got {result.dtype} {tuple(result.shape)}"
            )
        error = relative_error(result, exact[name])
        # Not `error > budget`: an error that is NaN must fail.
        if not error <= budget:
            raise AssertionError(
                f"{name}: relative error {error:.3g} against the float64 reference is over "
                f"the budget {budget:.3g} of {dtype}"
            )
