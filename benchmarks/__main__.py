"""Runs the suites and prints the table: `python -m benchmarks [--grid quick|full] [--save]`.

Every row of the table runs in a process of its own, so a fault costs one row, and `--resume`
goes on with the rows that an interrupted run has not finished.
"""

import argparse
import math
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import report
from benchmarks.cells import GRIDS, ROWS

FOLDER = Path(__file__).resolve().parent
ROW_KEYS = [row.key for row in ROWS]


def run_suite(name: str, options: list[str], target: Path) -> bool:
    """Runs one suite into a JSON file; False when a cell failed, a wrong result among others."""
    unfinished = target.with_suffix(".partial")
    command = [
        sys.executable, "-m", "pytest", str(FOLDER / f"bench_{name}.py"), *options,
        f"--benchmark-json={unfinished}", "--benchmark-disable-gc", "--benchmark-quiet",
        "-q", "--tb=short", "-p", "no:cacheprovider",
        # A row without a single measured cell has failed already; the warning adds nothing.
        "-W", "ignore::pytest_benchmark.logger.PytestBenchmarkWarning",
    ]  # fmt: skip
    failed = subprocess.run(command, cwd=FOLDER.parent, check=False).returncode != 0
    # pytest-benchmark leaves an empty file when no cell of the row could be measured.
    if unfinished.exists() and unfinished.stat().st_size:
        unfinished.replace(target)
    return not failed


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--grid", choices=sorted(GRIDS), default="quick")
    parser.add_argument(
        "--row", choices=[*ROW_KEYS, "memory"], action="append", help="only these rows"
    )
    parser.add_argument("--budget", type=float, default=1.5, help="seconds of timing a cell")
    parser.add_argument(
        "--longest",
        type=float,
        default=math.inf,
        help="leave out cells that take more seconds a call at 100 GFLOP/s",
    )
    parser.add_argument("--out", type=Path, help="folder of the JSON files (build/bench-GRID)")
    parser.add_argument("--resume", action="store_true", help="keep rows that are there already")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/")
    return parser.parse_args()


def main() -> int:
    """Runs the rows, prints the table; 1 if a cell failed."""
    arguments = parse_arguments()
    out = arguments.out or FOLDER.parent / "build" / f"bench-{arguments.grid}"
    out.mkdir(parents=True, exist_ok=True)
    keys = arguments.row or [*ROW_KEYS, "memory"]
    targets = {key: (out / f"{key}.json").resolve() for key in keys}
    failed = []
    start = time.monotonic()
    for number, (key, target) in enumerate(targets.items(), 1):
        if arguments.resume and target.exists():
            continue
        target.unlink(missing_ok=True)
        print(f"[{number}/{len(targets)}] {key}, {time.monotonic() - start:.0f} s", flush=True)
        options = [f"--grid={arguments.grid}", f"--budget={arguments.budget}"]
        options.append(f"--longest={arguments.longest}")
        suite = "memory" if key == "memory" else "recurrent"
        options += [] if key == "memory" else [f"--row={key}"]
        if not run_suite(suite, options, target):
            failed.append(key)
    measured = [target for target in targets.values() if target.exists()]
    if measured:
        run = report.load(measured)
        print("\n" + report.format_table(report.table(run["records"]), markdown=False))
        print("\n" + report.about(run))
        if arguments.save:
            print(f"\nwritten: {report.save(run, FOLDER / 'results')}")
    if failed:
        print(f"\nrows with failed cells: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
