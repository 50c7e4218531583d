"""How far a result may be from the exact one, derived from data instead of by hand.

The budget of a kernel is twice the error that the plain PyTorch reference makes in the same
dtype, plus one rounding of the largest value. Errors are measured against the reference in
float64, in the largest element of a tensor.

There is no more exact reference for float64 itself: there the error of the float32 reference
is scaled by the ratio of the two roundings.
"""

import torch
from torch import Tensor


def error_budget(exact: Tensor, same_dtype: Tensor, dtype: torch.dtype) -> float:
    """The largest error allowed for a result in `dtype`.

    Args:
        exact: the result of the reference in float64.
        same_dtype: that of the reference in `dtype`; in float32 where `dtype` is float64.
        dtype: of the result under test.
    """
    if exact.numel() == 0:
        return 0.0
    eps = torch.finfo(dtype).eps
    error = (same_dtype.double() - exact).abs().max().item()
    error *= eps / torch.finfo(same_dtype.dtype).eps
    return 2 * error + eps * exact.abs().max().item()


def assert_within_budget(
    name: str, actual: Tensor, exact: Tensor, same_dtype: Tensor, dtype: torch.dtype | None = None
) -> None:
    """Check shape, dtype and values of one result.

    Args:
        name: of the result, for the message.
        actual: the result under test.
        exact, same_dtype: see `error_budget`.
        dtype: that `actual` must have, and that gives the budget; by default its own.

    Raises:
        AssertionError: the shape or dtype differs, or the error is over the budget.
    """
    dtype = dtype or actual.dtype
    if actual.dtype != dtype or actual.shape != exact.shape:
        raise AssertionError(
            f"{name}: expected {dtype} {tuple(exact.shape)}, "
            f"got {actual.dtype} {tuple(actual.shape)}"
        )
    if exact.numel() == 0:
        return
    error = (actual.double() - exact).abs().max().item()
    budget = error_budget(exact, same_dtype, dtype)
    # Not `error > budget`: an error that is NaN must fail.
    if not error <= budget:
        raise AssertionError(
            f"{name}: error {error:.3g} against the float64 reference is over the budget "
            f"{budget:.3g} in {dtype}"
        )
