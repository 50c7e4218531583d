"""Peak memory of one additive attention, in a process of its own.

`python -m benchmarks.additive_memory seqkern|eager CASE_AS_JSON` prints the bytes, as
benchmarks.memory does for the recurrent layers.
"""

import json
import sys
from dataclasses import replace

import torch

import seqkern
from benchmarks import memory
from benchmarks.additive_cases import EAGER, Case, by_product, make_problem, step


def peak(name: str, case: Case) -> int:
    """Bytes that one run adds to this process at its peak."""
    torch.set_num_threads(1)
    function = by_product if name == EAGER else seqkern.additive_attention

    def run_of(case: Case):
        p = make_problem(case, "cpu")
        return step(p, lambda: function(*p.inputs))

    # Libraries and code caches come with the first call, whatever its size.
    run_of(replace(case, B=1, Tq=1, Tk=2))()
    return memory.rise(run_of(case))


if __name__ == "__main__":
    print(peak(sys.argv[1], Case(**json.loads(sys.argv[2]))))
