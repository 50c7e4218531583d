"""Where the time of one cell goes: `python -m benchmarks.profile_recurrent --help`.

Prints the operators by their own CPU time (torch.profiler) and how far the call is from what the
machine allows (limits.py).
"""

import argparse
import math
import time

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import paired
from benchmarks.cells import GATES, Cell
from benchmarks.contestants import make_problem, module_contestant
from benchmarks.limits import CellLimit, best_seconds, cell_limit, measure
from benchmarks.memory import NAMESPACES


def parse_arguments() -> tuple[str, Cell, int]:
    """Implementation, cell, and number of operators to show."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.profile_recurrent", description=__doc__
    )
    parser.add_argument("--implementation", choices=sorted(NAMESPACES), default="seqkern")
    parser.add_argument("--kind", choices=("inference", "training"), default="inference")
    parser.add_argument("--mode", choices=sorted(GATES), default="LSTM")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    for size, default in (("B", 1), ("T", 128), ("H", 256), ("P", 0)):
        parser.add_argument(f"-{size}", type=int, default=default)
    parser.add_argument("--directions", type=int, choices=(1, 2), default=1)
    parser.add_argument("--ragged", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--operators", type=int, default=12, help="how many to show")
    options = vars(parser.parse_args())
    implementation, operators = options.pop("implementation"), options.pop("operators")
    return implementation, Cell(**options), operators


def print_limit(cell: Cell, seconds: float, limit: CellLimit) -> None:
    """The measured time against the limit and its parts, in microseconds."""
    print(f"\n{cell}: {1e6 * seconds:.1f} us a call, {1e6 * seconds / cell.T:.2f} us a step, "
          f"{1e-9 * cell.flops / seconds:.1f} GFLOP/s")  # fmt: skip
    for part in ("read", "product", "pointwise", "outside"):
        print(f"  least {part:9} {1e6 * getattr(limit, part):10.1f} us")
    print(f"  least in all    {1e6 * limit.total:10.1f} us, bound by {limit.bound}; "
          f"reached {limit.total / seconds:.0%}")  # fmt: skip


def main() -> None:
    """Profiles the cell of the command line."""
    implementation, cell, operators = parse_arguments()
    torch.set_num_threads(cell.threads)
    entry = module_contestant(
        implementation, cell, make_problem(cell), NAMESPACES[implementation],
        getattr(torch, cell.dtype),
    )  # fmt: skip
    estimate = paired.seconds_of_one_call(entry.run)
    calls = max(1, min(200, math.ceil(0.5 / estimate)))
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(calls):
            entry.run()
    print(f"{calls} calls of {implementation}")
    print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=operators))
    clock = time.process_time if cell.threads == 1 else time.perf_counter
    print_limit(cell, best_seconds(entry.run, 1.0, clock), cell_limit(cell, measure()))


if __name__ == "__main__":
    main()
