"""The table of a run of bench_trees.py: `python -m benchmarks.trees_table RESULTS.json`."""

from statistics import median

from benchmarks.attention_table import print_table
from benchmarks.bench_trees import BY_NODE, TOGETHER
from benchmarks.paired import ratio


def line(record: dict) -> str:
    """One kind of tree: time of a step, and how many times as fast it is as node by node."""
    # One thread counts CPU time, which leaves out what other processes take.
    together, by_node = (record["samples"][name]["cpu_us"] for name in (TOGETHER, BY_NODE))
    return (
        f"{record['kind']:8} {record['trees']} trees, {record['nodes']} nodes, "
        f"{record['heights']} heights: {median(together) / 1e3:.1f} ms a step, "
        f"{ratio(by_node, together):.1f}x node by node's {median(by_node) / 1e3:.1f} ms"
    )


def main() -> None:
    """Prints a line for each kind."""
    print_table("python -m benchmarks.trees_table", line)


if __name__ == "__main__":
    main()
