"""The table of a benchmark run: `python -m benchmarks.report [--markdown] RESULTS.json...`.

Reads pytest-benchmark's JSON files (one a row of the table) or a committed results file, which
holds the same records without pytest-benchmark's own statistics.
"""

import argparse
import json
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import geometric_mean, median

from benchmarks import paired
from benchmarks.cells import PREPACKED, ROWS, Cell, Goal, Row

OURS = "seqkern"
PLAIN = "onnxruntime, packing every call"
Record = dict


@dataclass(frozen=True)
class Line:
    """One line of the table: a case against one peer."""

    case: str
    peer: str
    cells: int
    mean: float
    worst: float
    worst_cell: str
    must: str
    aim: str
    verdict: str
    of_limit: float | None


# A run that was interrupted and gone on with has rows of several commits and days.
BY_ROW = ("commit", "date", "longest", "limits", "load")


def load(paths: list[Path]) -> dict:
    """Merges runs into one: machine, versions, what BY_ROW names by row, and records."""
    merged: dict = {"records": []}
    by_row: dict[str, dict] = {name: {} for name in BY_ROW}
    for path in paths:
        data = json.loads(path.read_text())
        if "records" not in data:
            data = from_pytest_benchmark(data)
        merged["records"] += data.pop("records")
        for name, values in by_row.items():
            values |= data.pop(name)
        merged |= data
    return merged | by_row


def from_pytest_benchmark(data: dict) -> dict:
    """The part of pytest-benchmark's JSON that the table and the results file need."""
    about, commit = data["seqkern"], data["commit_info"]
    records = [benchmark["extra_info"] for benchmark in data["benchmarks"]]
    of_run = {name: about[name] for name in ("longest", "limits", "load")} | {
        "date": data["datetime"][:10],
        "commit": commit.get("id", "unknown") + ("-dirty" if commit.get("dirty") else ""),
    }
    return {
        "grid": about["grid"],
        "machine": about["machine"],
        "versions": about["versions"],
        **{name: {record["row"]: of_run[name] for record in records} for name in BY_ROW},
        "records": records,
    }


def clock_of(cell: Cell) -> str:
    """The samples that count: CPU time of the process on one thread, else the wall clock.

    On one thread the two differ by what other processes take from us; on several, CPU time would
    count the threads' waiting as work.
    """
    return "cpu_us" if cell.threads == 1 else "wall_us"


def cell_ratio(record: Record, peer: str) -> float:
    """How many times faster than the peer; "best" is the fastest peer in this cell.

    A layer that packs its weights in every call is held against torch, which does the same; where
    a prepacked one was timed, it is held against ONNX Runtime, whose session is packed too.
    """
    clock = clock_of(Cell(**record["cell"]))
    times = {name: sample[clock] for name, sample in record["samples"].items()}
    ours = times.pop(OURS)
    packed = times.pop(PREPACKED, ours)
    if peer == PLAIN:
        return paired.ratio(times["onnxruntime"], ours)
    named = times if peer == "best" else {peer: times[peer]}
    return min(
        paired.ratio(other, packed if name == "onnxruntime" else ours)
        for name, other in named.items()
    )


def share_of_limit(record: Record) -> float:
    """The machine's least time over the measured time."""
    clock = clock_of(Cell(**record["cell"]))
    return record["limit_us"] / median(record["samples"][OURS][clock])


def verdict(goal: Goal, mean: float, worst: float) -> str:
    """ "aim", "met" or "NOT MET", by the mean and, where the goal has one, the cell floor."""
    if mean < goal.floor or (goal.cell_floor is not None and worst < goal.cell_floor):
        return "NOT MET"
    return "aim" if mean >= goal.aim else "met"


def row_lines(row: Row, records: list[Record]) -> list[Line]:
    """The lines of one row: one for each goal, one more for a peer that has none."""
    if not records:
        return []
    of_limit = geometric_mean([share_of_limit(record) for record in records])
    goals: list[Goal | str] = [*row.goals]
    named = {goal.peer for goal in row.goals}
    goals += [peer for peer in row.peers if peer not in named]
    if all(PREPACKED in record["samples"] for record in records):
        goals.append(PLAIN)
    lines = []
    for goal in goals:
        peer = goal if isinstance(goal, str) else goal.peer
        ratios = [(cell_ratio(record, peer), Cell(**record["cell"]).sizes) for record in records]
        mean = geometric_mean([ratio for ratio, _ in ratios])
        worst, worst_cell = min(ratios)
        must = aim = met = ""
        if isinstance(goal, Goal):
            must = f"{goal.floor:g}x" + (f", cells {goal.cell_floor:g}x" if goal.cell_floor else "")
            aim, met = f"{goal.aim:g}x", verdict(goal, mean, worst)
        lines.append(
            Line(row.title, peer, len(ratios), mean, worst, worst_cell, must, aim, met, of_limit)
        )
    return lines


def memory_lines(records: list[Record]) -> list[Line]:
    """Peak memory of a training step: torch's over ours, so that more is better here too."""
    if not records:
        return []
    ratios = [
        (r["peak_bytes"]["torch"] / r["peak_bytes"][OURS], str(Cell(**r["cell"]))) for r in records
    ]
    goal = Goal("torch", 1.0, 1.0, cell_floor=1.0)
    mean = geometric_mean([ratio for ratio, _ in ratios])
    worst, cell = min(ratios)
    met = verdict(goal, mean, worst)
    title = "Peak memory of a training step"
    return [Line(title, "torch", len(ratios), mean, worst, cell, "cells 1x", "", met, None)]


def table(records: list[Record]) -> list[Line]:
    """Every line of the table, in the order of ROWS."""
    lines: list[Line] = []
    for row in ROWS:
        lines += row_lines(row, [record for record in records if record["row"] == row.key])
    return lines + memory_lines([record for record in records if record["row"] == "memory"])


def without_repeats(lines: list[Line]) -> list[Line]:
    """Names a case and its share of the limit once, on its first line."""
    return [
        replace(line, case="", of_limit=None) if previous and line.case == previous.case else line
        for previous, line in zip([None, *lines], lines)
    ]


HEADER = ("case", "vs", "cells", "mean", "worst", "worst cell", "must", "aim", "", "of limit")


def as_text(line: Line) -> list[str]:
    """The columns of a line, formatted."""
    limit = "" if line.of_limit is None else f"{line.of_limit:.0%}"
    columns = asdict(line) | {
        "mean": f"{line.mean:.2f}x",
        "worst": f"{line.worst:.2f}x",
        "of_limit": limit,
    }
    return [str(value) for value in columns.values()]


def format_table(lines: list[Line], markdown: bool) -> str:
    """Aligned columns for the terminal, or a Markdown table."""
    rows = [list(HEADER), *(as_text(line) for line in without_repeats(lines))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    padded = [[text.ljust(width) for text, width in zip(row, widths)] for row in rows]
    if not markdown:
        return "\n".join("  ".join(row).rstrip() for row in padded)
    padded.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(row) + " |" for row in padded)


def about(run: dict) -> str:
    """One paragraph: machine, versions, limits."""
    machine, versions = run["machine"], ", ".join(f"{k} {v}" for k, v in run["versions"].items())
    text = f"{machine['cpu']} ({machine['model']}), {machine['cores']} cores; {versions}; "
    commits = ", ".join(sorted({commit[:12] for commit in run["commit"].values()}))
    text += f"commit {commits}; {', '.join(sorted(set(run['date'].values())))}; grid {run['grid']}"
    cut = {row: seconds for row, seconds in run["longest"].items() if seconds}
    for seconds in sorted(set(cut.values())):
        rows = [row for row in cut if cut[row] == seconds]
        text += f", without calls over {seconds:g} s"
        text += f" in {', '.join(rows)}" if len(rows) < len(run["longest"]) else ""
    text += "."
    rates = [limits for limits in run["limits"].values() if limits]
    if rates:
        gemm = {k: median(r["gemm"][k] for r in rates) for k in ("float32", "bfloat16")}
        l2, l3 = (median(r[k] for r in rates) for k in ("l2", "l3"))
        text += (
            f"\nLimits, one core, median of the runs: torch.mm {gemm['float32']:.0f} GFLOP/s fp32, "
            f"{gemm['bfloat16']:.0f} bf16; reads {l2:.0f} GB/s from L2, {l3:.0f} from L3."
        )
    text += f" Load average at the end of a row: at most {max(run['load'].values()):.1f}."
    return text + (
        "\nAgainst ONNX Runtime, whose session holds packed weights, seqkern's layer is prepacked; "
        "the line\n'packing every call' is without. mean: geometric mean over the cells of peer "
        "time / seqkern time,\neach from the medians of interleaved samples (process CPU time on "
        "one thread, wall clock on two).\nof limit: least time by benchmarks/limits.py / measured "
        "time."
    )


def save(run: dict, folder: Path) -> Path:
    """Writes the results file <cpu>-<date>.json, one record a line, and returns its path."""
    cpu = re.sub(r"\W+", "-", re.sub(r"\((R|TM)\)", "", run["machine"]["cpu"])).strip("-").lower()
    path = folder / f"{cpu}-{max(run['date'].values())}.json"
    head = {key: value for key, value in run.items() if key != "records"}
    records = ",\n".join(json.dumps(record, separators=(",", ":")) for record in run["records"])
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(head, indent=1)[:-2] + f',\n "records": [\n{records}\n]}}\n')
    return path


def main() -> None:
    """Prints the table of the given files."""
    parser = argparse.ArgumentParser(description="Print the table of a benchmark run.")
    parser.add_argument("--markdown", action="store_true", help="as a Markdown table")
    parser.add_argument("results", type=Path, nargs="+", help="JSON files of one run")
    arguments = parser.parse_args()
    run = load(arguments.results)
    print(format_table(table(run["records"]), arguments.markdown))
    print("\n" + about(run))


if __name__ == "__main__":
    main()
