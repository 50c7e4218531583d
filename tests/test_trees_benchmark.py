"""The Tree-LSTM's benchmark runs, compares equal results, and its table has its figures."""

import json
from pathlib import Path

from tests.benchmark_runs import ROOT, run


def test_suite_runs_and_prints(tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    done = run(
        "pytest", "-q", "-p", "no:cacheprovider", "benchmarks/bench_trees.py", "--grid=tiny",
        "--budget=0.02", f"--benchmark-json={results}",
        "-W", "ignore::pytest_benchmark.logger.PytestBenchmarkWarning",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    records = [b["extra_info"] for b in json.loads(results.read_text())["benchmarks"]]
    assert [record["kind"] for record in records] == ["nary", "childsum"]
    for record in records:
        assert {len(s["cpu_us"]) >= 3 for s in record["samples"].values()} == {True}
    done = run("benchmarks.trees_table", str(results))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("node by node's") == 2


def test_the_committed_result_is_ten_times_as_fast() -> None:
    """The table of the newest committed result, whose lines end in `10.2x node by node's 1 ms`."""
    newest = sorted((ROOT / "benchmarks/results").glob("trees-*.json"))[-1]
    lines = run("benchmarks.trees_table", str(newest)).stdout.splitlines()
    assert len(lines) == 2
    for line in lines:
        times = float(line.split(" ms a step, ")[1].split("x ")[0])
        assert times >= 10, line
