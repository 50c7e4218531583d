"""The table of a run of bench_attention.py: `python -m benchmarks.attention_table RECORDS`."""

import argparse
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import median

from benchmarks import records
from benchmarks.attention_cases import EAGER, OURS, Case
from benchmarks.paired import ratio


def line(record: dict) -> str:
    """One case: our time and rate, and how many times as fast as each peer we are."""
    case = Case(**record["case"])
    samples = {name: s["wall_us"] for name, s in record["samples"].items()}
    seconds = median(samples[OURS]) * 1e-6
    if case.kind == "decode":
        bandwidth = record["cache_bytes"] / seconds
        share = bandwidth / record["copy_bandwidth"]
        rate = f"{bandwidth / 1e9:7.0f} GB/s, {share:.0%} of a copy's, with the call itself"
    else:
        rate = f"{record['flop'] / seconds / 1e12:7.1f} TFLOP/s"
    peers = {name: ratio(s, samples[OURS]) for name, s in samples.items() if name != OURS}
    fused = {name: r for name, r in peers.items() if name != EAGER}
    best = min(fused, key=lambda name: fused[name], default=EAGER)
    others = ", ".join(f"{name} {r:.2f}x" for name, r in peers.items())
    return f"{case!s:45} {seconds * 1e6:10.0f} us {rate}  best peer {best}; {others}"


def print_table(prog: str, line: Callable[[dict], str]) -> None:
    """Prints a line for each record of a file named on the command line, and what was left out."""
    parser = argparse.ArgumentParser(prog=prog)
    parser.add_argument("records", type=Path, help="what --records or pytest-benchmark wrote")
    found = records.load(parser.parse_args().records)
    for record in found:
        if "samples" in record:
            print(line(record))
    left = Counter(record["left_out"] for record in found if "left_out" in record)
    for reason, n in left.most_common():
        print(f"{n} cases left out: {reason}")


def main() -> None:
    """Prints a line for each case."""
    print_table("python -m benchmarks.attention_table", line)


if __name__ == "__main__":
    main()
