"""The gate before timing: a contestant that computes something else is not timed."""

import torch

from benchmarks.cells import Cell
from benchmarks.contestants import Contestant, Outputs, Problem, module_contestant

# seqkern's error may be this many times the largest of torch's in the same dtype over all results,
# plus one rounding, both relative to the largest element (as in seqkern.testing.tolerance); a peer
# only has to be the same function.
ERROR_FACTOR = 2
PEER_BAND = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2, "float64": 1e-10}


class WrongResult(AssertionError):
    """A contestant's result is outside its error budget."""


def reference_outputs(cell: Cell, problem: Problem) -> Outputs:
    """The cell in float64 by torch.nn, whose float64 path shares no kernel with the others."""
    return module_contestant("float64", cell, problem, torch.nn, torch.float64).outputs()


def largest_error(outputs: Outputs, reference: Outputs) -> dict[str, float]:
    """The largest absolute difference of each output; inf where one is NaN."""
    errors = {}
    for name, expected in reference.items():
        actual = outputs[name].double()
        if actual.shape != expected.shape:
            shapes = f"{tuple(expected.shape)}, got {tuple(actual.shape)}"
            raise WrongResult(f"{name} must have shape {shapes}")
        difference = (actual - expected).abs().max().item()
        errors[name] = difference if difference == difference else float("inf")
    return errors


def check(cell: Cell, problem: Problem, contestants: list[Contestant]) -> float:
    """Raises WrongResult unless every contestant computes the cell.

    Returns seqkern's largest error as a share of its budget. The first contestant is seqkern;
    the yardstick is torch in the cell's dtype, whether or not it is a contestant.
    """
    reference = reference_outputs(cell, problem)
    dtype = getattr(torch, cell.dtype)
    errors_of = {c.name: largest_error(c.outputs(), reference) for c in contestants}
    if "torch" not in errors_of:
        torch_entry = module_contestant("torch", cell, problem, torch.nn, dtype)
        errors_of["torch"] = largest_error(torch_entry.outputs(), reference)
    torch_errors = errors_of["torch"]
    scales = {name: value.abs().max().item() for name, value in reference.items()}
    shares = [torch_errors[name] / scale for name, scale in scales.items() if scale]
    by_torch = max((share for share in shares if share < float("inf")), default=0.0)
    worst = 0.0
    for contestant in contestants:
        for name, error in errors_of[contestant.name].items():
            # A peer that goes step by step adds T terms of a gradient in its dtype.
            band = PEER_BAND[contestant.dtype or cell.dtype] * max(1.0, cell.T / 128) ** 0.5
            budget = band * max(1.0, scales[name])
            if contestant is contestants[0]:
                budget = (ERROR_FACTOR * by_torch + torch.finfo(dtype).eps) * scales[name]
            if not error <= budget:
                raise WrongResult(
                    f"{contestant.name} on {cell}: {name} is {error:.2e} from float64, "
                    f"budget {budget:.2e}"
                )
            # A gradient that is zero by structure (W_hh's at T=1) has no budget and needs none.
            if contestant is contestants[0] and budget > 0:
                worst = max(worst, error / budget)
    return worst
