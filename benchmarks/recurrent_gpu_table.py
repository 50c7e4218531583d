"""The table of runs of bench_recurrent_gpu.py:
`python -m benchmarks.recurrent_gpu_table [--exchange FILE] [--markdown] RECORDS...`.

RECORDS are files that `--records` wrote; of a cell that is in several, the last counts.
"""

import argparse
import json
from collections import Counter
from pathlib import Path
from statistics import geometric_mean, median

from benchmarks import paired
from benchmarks.cells import Row
from benchmarks.recurrent_gpu_cases import OURS, ROWS, GpuCell
from benchmarks.recurrent_gpu_limits import Exchange, Rates, limit_seconds, load_exchanges
from benchmarks.report import Line, Record, format_table, verdict


def load(paths: list[Path]) -> list[Record]:
    """The records of several runs, one for each row and cell; the last, but for one that was left
    out where an earlier one was timed."""
    found: dict[str, Record] = {}
    for path in paths:
        for text in path.read_text().splitlines():
            record = json.loads(text)
            key = json.dumps([record["row"], record["cell"]])
            if "left_out" not in record or key not in found:
                found[key] = record
    return list(found.values())


def share_of_limit(record: Record, exchanges: list[Exchange]) -> float | None:
    """The least time over the measured time; None where the exchanges or the rates are unknown."""
    if not exchanges or not record["rates"]:
        return None
    seconds = limit_seconds(GpuCell(**record["cell"]), Rates(**record["rates"]), exchanges)
    return 1e6 * seconds / median(record["samples"][OURS]["wall_us"])


def label(cell: GpuCell) -> str:
    """What tells a cell from the others of its row."""
    return str(cell).removeprefix(f"{cell.mode}-{cell.kind}-")


def row_lines(row: Row, records: list[Record], exchanges: list[Exchange]) -> list[Line]:
    """A line for each goal of a row, and one for each other peer that was timed."""
    records = [r for r in records if r["row"] == row.key and "samples" in r]
    shares = [share for r in records if (share := share_of_limit(r, exchanges)) is not None]
    of_limit = geometric_mean(shares) if shares else None
    goals = {goal.peer: goal for goal in row.goals}
    lines = []
    for peer in sorted(row.peers, key=lambda peer: peer not in goals):
        ratios = [
            (paired.ratio(r["samples"][peer]["wall_us"], r["samples"][OURS]["wall_us"]),
             label(GpuCell(**r["cell"])))
            for r in records if peer in r["samples"]
        ]  # fmt: skip
        if not ratios:
            continue
        mean, (worst, cell) = geometric_mean([ratio for ratio, _ in ratios]), min(ratios)
        columns = ("", "", "")
        if goal := goals.get(peer):
            columns = (f"{goal.floor:g}x", f"{goal.aim:g}x", verdict(goal, mean, worst))
        lines.append(Line(row.title, peer, len(ratios), mean, worst, cell, *columns, of_limit))
    return lines


def notes(records: list[Record], exchanges: list[Exchange]) -> list[str]:
    """What the table does not say: the device, who ran the cells, what was left out and why."""
    timed = [r for r in records if "samples" in r]
    devices = ", ".join(sorted({r["device"] for r in records}))
    counted = Counter(kernel for r in timed for kernel in set(r["kernels"]))
    kernels = ", ".join(f"{kernel} in {n}" for kernel, n in counted.most_common())
    lines = [f"On {devices}: {len(timed)} cells timed; seqkern's kernels: {kernels}."]
    if devices == "cpu":
        lines.append("A dry run, whose figures say nothing about the kernels.")
    left = Counter(r["left_out"] for r in records if "left_out" in r)
    lines += [f"{n} cells left out: {reason}" for reason, n in left.most_common()]
    refused = Counter((peer, why) for r in timed for peer, why in r["refused"].items())
    lines += [f"{peer} refused {n} cells: {why}" for (peer, why), n in refused.most_common()]
    if not exchanges:
        lines.append("No share of the limit, since the exchanges were not measured.")
    return lines


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recurrent_gpu_table")
    parser.add_argument("records", type=Path, nargs="+", help="files that --records wrote")
    parser.add_argument("--exchange", type=Path, help="what exchange.cu printed")
    parser.add_argument("--markdown", action="store_true", help="as a Markdown table")
    return parser.parse_args()


def main() -> None:
    """Prints the table of the given files."""
    arguments = parse_arguments()
    records = load(arguments.records)
    exchanges = load_exchanges(arguments.exchange) if arguments.exchange else []
    lines = [line for row in ROWS for line in row_lines(row, records, exchanges)]
    print(format_table(lines, arguments.markdown) + "\n")
    print("\n".join(notes(records, exchanges)))


if __name__ == "__main__":
    main()
