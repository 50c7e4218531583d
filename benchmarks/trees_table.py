"""The table of a run of bench_trees.py: `python -m benchmarks.trees_table RESULTS.json`.

RESULTS.json is pytest-benchmark's file or, from results/, one with its records alone.
"""

import argparse
import json
from pathlib import Path
from statistics import median

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


def records_of(path: Path) -> list[dict]:
    """The records of a results file of either form."""
    data = json.loads(path.read_text())
    return data["records"] if "records" in data else [b["extra_info"] for b in data["benchmarks"]]


def main() -> None:
    """Prints a line for each kind."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trees_table")
    parser.add_argument("results", type=Path)
    for record in records_of(parser.parse_args().results):
        print(line(record))


if __name__ == "__main__":
    main()
