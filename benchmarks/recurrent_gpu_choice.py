"""Writes the table of the recurrent layers for which cuDNN was faster than seqkern's kernels:
`python -m benchmarks.recurrent_gpu_choice [--out FILE] [RECORDS...]`.

RECORDS are files that `--records` of bench_recurrent_gpu.py wrote, by default those committed as
benchmarks/results/recurrent-gpu-*.jsonl; FILE is by default the table that the ops read. Of a cell
that is in several files of one card, the last counts. A cell speaks for single layers alone: what
cuDNN gains by running stacked layers at the same time, a layer of seqkern's would not get.
"""

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import NamedTuple

from benchmarks import paired
from benchmarks.recurrent_gpu_cases import OURS, OURS_TF32, TF32, TORCH, GpuCell
from benchmarks.recurrent_gpu_table import load
from benchmarks.report import Record
from seqkern.ops._recurrent_cudnn import Row

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results"
TABLE = ROOT / "seqkern/ops/recurrent_cudnn.json"

# Through a layer of seqkern's, cuDNN also copies the weights into its layout and, for a backward,
# the reserve space. By their bytes that is a few percent of 128 steps, the fewest of the grid,
# which no GPU has confirmed; a tenth covers it and what medians differ by from run to run.
MARGIN = 1.1

# What a row is of: card, mode, dtype, directions, ragged, training, H.
Key = tuple[str, str, str, int, bool, bool, int]


def ratio(ours: list[float], cudnn: list[float]) -> float:
    """How many times as fast cuDNN was: the lesser of the ratio of the medians and the median of
    the ratios of each round, whose samples were taken one after another."""
    rounds = median(a / b for a, b in zip(ours, cudnn, strict=True))
    return min(paired.ratio(ours, cudnn), rounds)


def last_records(paths: list[Path]) -> list[tuple[Record, str]]:
    """The record that counts of each timed cell on each card, and its file."""
    found: dict[tuple[str, str, GpuCell], tuple[Record, str]] = {}
    for path in paths:
        for record in load([path]):
            if "samples" in record:
                key = record["device"], record["row"], GpuCell(**record["cell"])
                found[key] = record, path.name
    return list(found.values())


def compared(record: Record) -> Iterator[tuple[Key, float]]:
    """The layers that a record speaks for, and cuDNN's ratio. On a CPU, torch.nn is not cuDNN."""
    cell, samples = GpuCell(**record["cell"]), record["samples"]
    if record["device"] == "cpu" or cell.layers > 1:
        return
    for ours, cudnn, dtype in ((OURS, TORCH, cell.dtype), (OURS_TF32, TF32, "tf32")):
        if ours in samples and cudnn in samples:
            training = cell.kind == "training"
            key = record["device"], cell.mode, dtype, cell.directions, cell.ragged, training, cell.H
            yield key, ratio(samples[ours]["wall_us"], samples[cudnn]["wall_us"])


class Measured(NamedTuple):
    """A cell of a layer: its batch and steps, cuDNN's ratio, and the file that says so."""

    B: int
    T: int
    ratio: float
    file: str


def shortest(cells: list[Measured]) -> int | None:
    """The number of steps from which on cuDNN was faster in every cell; None where in none."""
    found = None
    for T in sorted({cell.T for cell in cells}, reverse=True):
        if min(cell.ratio for cell in cells if cell.T == T) < MARGIN:
            break
        found = T
    return found


def rows_of(key: Key, cells: list[Measured]) -> Iterator[Row]:
    """The rows of a layer. What lies between two batches was not measured: it is in a row where
    both are faster from the same T on and are alike modulo 8, by which cuDNN chooses kernels."""
    batches = sorted({cell.B for cell in cells})
    since = {B: shortest([cell for cell in cells if cell.B == B]) for B in batches}
    for (T, _), neighbours in groupby(batches, lambda B: (since[B], B % 8)):
        if T is not None:
            run = list(neighbours)
            taken = [cell for cell in cells if cell.B in run and cell.T >= T]
            least = math.floor(100 * min(cell.ratio for cell in taken)) / 100
            files = ", ".join(sorted({cell.file for cell in taken}))
            yield Row(*key, (run[0], run[-1]), T, least, files)


def rows(paths: list[Path]) -> list[Row]:
    """The table of the records in these files."""
    layers: dict[Key, list[Measured]] = defaultdict(list)
    for record, file in last_records(paths):
        for key, times in compared(record):
            layers[key].append(Measured(record["cell"]["B"], record["cell"]["T"], times, file))
    return [row for key in sorted(layers) for row in rows_of(key, layers[key])]


def as_json(table: list[Row]) -> str:
    """A line for each row."""
    lines = ",\n".join(json.dumps(row._asdict()) for row in table)
    return f"[\n{lines}\n]\n" if table else "[]\n"


def main() -> None:
    """Writes the table, and says how many rows it has."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recurrent_gpu_choice")
    parser.add_argument("records", type=Path, nargs="*", help="files that --records wrote")
    parser.add_argument("--out", type=Path, default=TABLE, help="the table")
    arguments = parser.parse_args()
    records = arguments.records or sorted(RESULTS.glob("recurrent-gpu-*.jsonl"))
    table = rows(records)
    arguments.out.write_text(as_json(table))
    print(f"{len(table)} rows for cuDNN from {len(records)} files of records: {arguments.out}")


if __name__ == "__main__":
    main()
