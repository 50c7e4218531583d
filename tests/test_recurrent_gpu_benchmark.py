"""The benchmark of the recurrent layers on a GPU, as far as it goes without one: its cells are
those of the table, it runs on the CPU, a wrong kernel fails, and its limits and means are right."""

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

# The suites run from a checkout and are not installed. The path does not stay: with it, the folder
# kernels/ would answer whoever looks for another package of that name.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks import bench_recurrent_gpu as suite
from benchmarks import contestants, device, recurrent_gpu_choice, recurrent_gpu_table
from benchmarks import recurrent_gpu_cases as cases
from benchmarks import recurrent_gpu_limits as limits
from benchmarks.check import WrongResult, check
from benchmarks.recurrent_gpu_cases import (
    CELLS,
    HALF,
    OURS,
    OURS_TF32,
    TF32,
    TORCH,
    GpuCell,
)
from tests.benchmark_runs import ROOT, run

sys.path.remove(str(ROOT))

CELL = GpuCell("training", "LSTM", "float32", B=3, T=5, H=16)


def suite_run(*options: str, path: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return run(
        "pytest", "-q", "-p", "no:cacheprovider", "benchmarks/bench_recurrent_gpu.py",
        "--grid=tiny", "--budget=0.01", *options,
        "-W", "ignore::pytest_benchmark.logger.PytestBenchmarkWarning", path=path,
    )  # fmt: skip


# ---- the cells


def test_rows_cover_the_grid_once():
    assert len({row.key for row in cases.ROWS}) == len(cases.ROWS)
    for kind in cases.KINDS:
        cells = [
            cell
            for row in cases.ROWS
            for cell in row.cells
            if cell.kind == kind and cases.is_plain(cell) and "gpu-cells-" not in row.key
        ]
        assert len(cells) == len(set(cells)) == 7 * 2 * 9 * 3
    persistent = next(row for row in cases.ROWS if row.key == "gpu-f16-inference")
    assert {(c.dtype, c.B % 8, c.H % 128) for c in persistent.cells} == {("float16", 0, 0)}
    assert {c.H for c in persistent.cells} == {256, 512, 768, 1024}
    assert {c.B for c in persistent.cells} == {8, 16, 32, 64, 128}


def test_the_quick_grid_stands_for_every_goal():
    quick = cases.cases("quick", None, (1, 1))
    everything = cases.cases("full", None, (1, 1))
    assert {row.key for row, _ in quick if row.goals} == {r.key for r in cases.ROWS if r.goals}
    assert set(quick) < set(everything)
    assert len(quick) <= 200


def test_slices_are_parts_of_the_whole():
    everything = cases.cases("full", None, (1, 1))
    parts = [cases.cases("full", None, cases.parse_slice(f"{i}/7")) for i in range(1, 8)]
    assert sorted(map(str, everything)) == sorted(str(case) for part in parts for case in part)
    for wrong in ("0/3", "4/3", "3", "a/b", "1/0"):
        with pytest.raises(ValueError, match="--slice must be I/N"):
            cases.parse_slice(wrong)


def test_a_cell_names_peers_that_differ():
    row = cases.ROWS[0]
    peers = {d: cases.peers_of(row, replace(CELL, dtype=d)) for d in cases.DTYPES}
    assert TF32 in peers["float32"]
    assert TF32 not in peers["bfloat16"]
    assert HALF in peers["bfloat16"]
    assert HALF not in peers["float16"]


def test_what_is_left_out_has_a_reason():
    assert suite.reason_to_leave_out(CELL, ["reference"]) is None
    long = replace(CELL, T=1024)
    assert suite.reason_to_leave_out(long, ["native"]) is None
    assert "reference" in (suite.reason_to_leave_out(long, ["native", "reference"]) or "")


# ---- the contestants


@pytest.mark.parametrize(
    "cell",
    [CELL, replace(CELL, kind="inference"), replace(CELL, stacked=2, directions=2)],
    ids=str,
)
def test_the_gate_passes_everyone_and_stops_a_wrong_kernel(cell: GpuCell):
    row = replace(cases.ROWS[0], peers=(TORCH, TF32, HALF, cases.LOOP))
    if cell.layers == 1:
        row = replace(row, peers=(*row.peers, CELLS))
    problem = contestants.make_problem(cell)
    entries, calls, refused = suite.entrants(row, cell, problem)
    assert [e.name for e in entries] == [OURS, *row.peers]
    assert set(calls) == {e.name for e in entries}
    assert not refused
    assert check(cell, problem, entries) <= 1
    assert set(entries[0].outputs()) == set(entries[-1].outputs())
    wrong = {name: value + 1e-3 for name, value in entries[0].outputs().items()}
    broken = [replace(entries[0], outputs=lambda: wrong), *entries[1:]]
    with pytest.raises(WrongResult, match="seqkern on LSTM"):
        check(cell, problem, broken)


def test_layers_are_stacked():
    problem = contestants.make_problem(replace(CELL, stacked=3))
    assert problem.module.num_layers == 3
    assert suite.explained(replace(CELL, stacked=3), problem)[0] == ["native"] * 3


def test_the_switches_of_a_contestant_end_with_its_call():
    before = torch.backends.cudnn.enabled
    assert suite.under(cases.LOOP, lambda: torch.backends.cudnn.enabled)() is False
    assert suite.under(TORCH, lambda: torch.backends.cudnn.enabled)() is True
    assert suite.under(TORCH, lambda: torch.backends.cudnn.allow_tf32)() is False
    assert suite.under(TF32, lambda: torch.backends.cudnn.allow_tf32)() is True
    # Ours without cuDNN, to which the table would hand layers of a card that has been measured.
    assert suite.under(OURS, lambda: torch.backends.cudnn.enabled)() is False
    assert suite.under(OURS_TF32, lambda: torch.backends.cudnn.allow_tf32)() is True
    assert torch.backends.cudnn.enabled == before


# ---- the limits

GEMM = {"float32": 1e13, "bfloat16": 1e14, "float16": 1e14}
RATES = limits.Rates(GEMM, copy=1e12, l2=4e12, launch=5e-6, multiprocessors=100, clock=1e9,
                     shared=227 << 10, l2_bytes=50 << 20)  # fmt: skip
BLOCK = limits.Exchange("block", 1, 0, 1e-7)
GRID = [limits.Exchange("grid", 100, n, 1e-6 + 1e-12 * n) for n in (10000, 30000)]


def test_exchanges_are_read_and_interpolated(tmp_path: Path):
    lines = [
        {"exchange": "cluster", "members": 16, "bytes": 4096, "refused": "no clusters"},
        {"exchange": "grid", "members": 100, "bytes": 10000, "ns_per_step": 1010.0},
        {"exchange": "grid", "members": 100, "bytes": 30000, "ns_per_step": 1030.0},
    ]
    (tmp_path / "exchange.json").write_text("\n".join(map(json.dumps, lines)) + "\n")
    measured = limits.load_exchanges(tmp_path / "exchange.json")
    assert [(x.kind, x.members) for x in measured] == [("grid", 100)] * 2
    for size, expected in ((1, 1.01), (10000, 1.01), (20000, 1.02), (30000, 1.03), (50000, 1.05)):
        assert 1e6 * limits.exchange_seconds(measured, size) == pytest.approx(expected)
    slower_first = [replace(GRID[0], seconds=2e-6), GRID[1]]
    assert limits.exchange_seconds(slower_first, 20000) == 2e-6
    assert limits.exchange_seconds([BLOCK, replace(BLOCK, bytes=9, seconds=2e-7)], 9) == 1e-7


def test_limit_of_one_block_by_hand():
    cell = GpuCell("inference", "LSTM", "bfloat16", B=800, T=10, H=128)
    # 100 slices of 8 rows, each on one block: 2 * 4 * 128^2 * 8 flops at a hundredth of the rate.
    step = 2 * 4 * 128**2 * 8 / 1e12 + 1e-7 + limits.POINTWISE_SECONDS
    inputs = 2 * 8000 * 4 * 128**2 / 1e14
    expected = 10 * step + inputs + 5e-6
    # The weights are 128 KiB, which the registers hold; what a step reads and writes takes less.
    assert 800 * 5 * 128 * 2 / 1e12 < 2 * 4 * 128**2 * 8 / 1e12
    assert limits.limit_seconds(cell, RATES, [BLOCK, *GRID]) == pytest.approx(expected)
    # Both directions share the machine, so that each slice has twice the rows.
    both = limits.limit_seconds(replace(cell, directions=2), RATES, [BLOCK])
    twice = 10 * (step + 2 * 4 * 128**2 * 8 / 1e12) + 2 * inputs + 5e-6
    assert both == pytest.approx(twice)


def test_limit_of_a_grid_and_of_weights_that_do_not_fit():
    cell = GpuCell("inference", "LSTM", "bfloat16", B=8, T=10, H=1024)
    # 8 MiB over 100 blocks stay in registers; the product is shorter than what goes through memory.
    product, traffic = 2 * 4 * 1024**2 * 8 / 1e14, 8 * 5 * 1024 * 2 / 1e12
    step = max(product, traffic) + 1e-6 + 1e-12 * 8 * 1024 * 2 + limits.POINTWISE_SECONDS
    expected = 10 * step + 2 * 80 * 4 * 1024**2 / 1e14 + 5e-6
    assert limits.limit_seconds(cell, RATES, [BLOCK, *GRID]) == pytest.approx(expected)
    large = replace(cell, H=4096, T=1)
    # 128 MiB: beyond all blocks and beyond the L2 cache.
    step = 4 * 4096**2 * 2 / 1e12 + 1e-6 + 1e-12 * 8 * 4096 * 2 + limits.POINTWISE_SECONDS
    expected = step + 2 * 8 * 4 * 4096**2 / 1e14 + 5e-6
    assert limits.limit_seconds(large, RATES, [BLOCK, *GRID]) == pytest.approx(expected)
    with pytest.raises(ValueError, match="exchanges must hold"):
        limits.limit_seconds(cell, RATES, [])


def test_limit_of_training_and_of_layers():
    cell = GpuCell("training", "LSTM", "bfloat16", B=8, T=10, H=1024)
    forward = limits.pass_seconds(cell, RATES, GRID, False, 1)
    backward = limits.pass_seconds(cell, RATES, GRID, True, 1)
    assert limits.limit_seconds(cell, RATES, GRID) == pytest.approx(forward + backward)
    # Four times the bytes in the exchange, three products outside of the steps instead of one.
    assert backward - forward == pytest.approx(
        10 * 1e-12 * 3 * 8 * 1024 * 2 + 2 * 2 * 80 * 4 * 1024**2 / 1e14, rel=1e-6
    )
    # A grid has room for one layer at a time; blocks have it for both, a step apart.
    small = GpuCell("inference", "LSTM", "bfloat16", B=8, T=10, H=64)
    one, two = (limits.pass_seconds(small, RATES, [BLOCK], False, n) for n in (1, 2))
    fixed = 2 * 80 * 4 * 64**2 / 1e14 + 5e-6
    assert two - 2 * fixed == pytest.approx((one - fixed) * 11 / 10)
    grid = [limits.pass_seconds(cell, RATES, GRID, False, n) for n in (1, 2)]
    assert grid[1] == pytest.approx(2 * grid[0])


def test_rates_are_measured():
    assert 0 < limits.gemm_rate("float32", size=64) < 1e15


def test_the_clock_is_asked_of_the_driver_where_torch_is_silent(monkeypatch: pytest.MonkeyPatch):
    asked = SimpleNamespace(clock_rate=1_500_000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: asked)
    assert device.clock() == 1.5e9
    del asked.clock_rate
    utils = SimpleNamespace(get_device_properties=lambda device: {"sm_clock_rate": 1_980_000})
    active = SimpleNamespace(active=SimpleNamespace(utils=utils))
    monkeypatch.setattr("triton.runtime.driver", active)
    assert device.clock() == 1.98e9


# ---- the table


def record(cell: GpuCell, row: str, **wall_us: list[float]) -> dict:
    """As the suite writes one; the peers' names are given with underscores."""
    samples = {name.replace("_", " "): {"wall_us": times} for name, times in wall_us.items()}
    return {
        "row": row, "cell": asdict(cell), "device": "H200", "kernels": ["native"], "reasons": [""],
        "error_over_budget": 0.5, "rates": asdict(RATES), "refused": {}, "samples": samples,
    }  # fmt: skip


def test_lines_of_a_row():
    row = next(row for row in cases.ROWS if row.key == "gpu-bf16-inference")
    cells = [GpuCell("inference", "LSTM", "bfloat16", b, 128, 256) for b in (8, 16)]
    records = [
        record(cells[0], row.key, seqkern=[90.0, 100.0, 500.0], torch=[800.0] * 3),
        record(cells[1], row.key, seqkern=[100.0], torch=[200.0], torch_float16=[100.0]),
    ]
    ours, half = recurrent_gpu_table.row_lines(row, records, GRID)
    assert (ours.peer, ours.cells, ours.must, ours.aim) == ("torch", 2, "2x", "5x")
    assert ours.mean == pytest.approx(4)
    assert (ours.worst, ours.worst_cell) == (2, "bfloat16-B16-T128-H256")
    assert ours.verdict == "met"
    assert (half.peer, half.cells, half.mean, half.verdict) == (HALF, 1, 1, "")
    shares = [1e4 * limits.limit_seconds(cell, RATES, GRID) for cell in cells]
    assert ours.of_limit == pytest.approx((shares[0] * shares[1]) ** 0.5)
    assert recurrent_gpu_table.row_lines(row, records, [])[0].of_limit is None


def test_later_records_count_and_what_is_missing_is_said(tmp_path: Path):
    row = "gpu-bf16-inference"
    first = record(CELL, row, seqkern=[2.0], torch=[2.0])
    second = first | {"samples": {"seqkern": {"wall_us": [1.0]}, "torch": {"wall_us": [2.0]}}}
    out = {"row": row, "cell": asdict(CELL), "device": "H200", "left_out": "no time"}
    other = out | {"cell": asdict(replace(CELL, H=8))}
    paths = []
    for i, content in enumerate(([first, other], [second, out])):
        paths.append(tmp_path / f"{i}.jsonl")
        paths[-1].write_text("".join(json.dumps(r) + "\n" for r in content))
    records = recurrent_gpu_table.load(paths)
    assert records == [second, other]
    notes = "\n".join(recurrent_gpu_table.notes(records, []))
    assert "On H200: 1 cells timed; seqkern's kernels: native in 1." in notes
    assert "1 cells left out: no time" in notes
    assert "No share of the limit" in notes


# ---- the choice


def choice(tmp_path: Path, *files: list[dict]) -> list[dict]:
    """The table that the command writes of these records."""
    paths = [tmp_path / f"recurrent-gpu-{i}.jsonl" for i in range(len(files))]
    for path, content in zip(paths, files, strict=True):
        path.write_text("".join(json.dumps(r) + "\n" for r in content))
    done = run(
        "benchmarks.recurrent_gpu_choice", "--out", str(tmp_path / "table.json"), *map(str, paths)
    )
    assert done.returncode == 0, done.stderr
    return json.loads((tmp_path / "table.json").read_text())


def timed(B: int, T: int, torch: list[float], row="gpu-f16-training", **changes) -> dict:
    """A record in which ours takes 100 us in every round."""
    cell = GpuCell("training", "LSTM", "float16", B, T, 512)
    cell = replace(cell, **changes)
    return record(cell, row, seqkern=[100.0] * len(torch), torch=torch)


FAST, SLOW = [50.0, 51.0, 52.0], [99.0, 100.0, 101.0]


def test_a_row_is_where_cudnn_was_faster(tmp_path: Path):
    first = [
        timed(1, 128, FAST),  # not in a run with multiples of 8
        timed(8, 128, FAST), timed(8, 1024, FAST),
        timed(16, 128, [60.0, 61.0, 62.0]), timed(16, 1024, FAST),
        timed(32, 128, SLOW), timed(32, 1024, FAST),  # from 1024 on
        timed(64, 128, FAST), timed(64, 1024, SLOW),  # never for long sequences
        timed(128, 128, SLOW),  # the next file has it anew
    ]  # fmt: skip
    rows = choice(tmp_path, first, [timed(128, 128, FAST)])
    one = {"device": "H200", "mode": "LSTM", "dtype": "float16", "directions": 1, "ragged": False}
    one |= {"training": True, "H": 512}
    name = "recurrent-gpu-0.jsonl"
    assert rows == [
        one | {"B": [1, 1], "T": 128, "ratio": 1.96, "result": name},
        one | {"B": [8, 16], "T": 128, "ratio": 1.63, "result": name},
        one | {"B": [32, 32], "T": 1024, "ratio": 1.96, "result": name},
        one | {"B": [128, 128], "T": 128, "ratio": 1.96, "result": "recurrent-gpu-1.jsonl"},
    ]
    for row in rows:  # as the ops read it
        assert recurrent_gpu_choice.Row(**row).reason.startswith(
            f"measured {row['ratio']}x as fast"
        )


def test_both_medians_are_over_the_margin():
    ratio = recurrent_gpu_choice.ratio
    assert ratio([50.0, 60.0, 70.0], [40.0, 50.0, 60.0]) == pytest.approx(1.2)
    # By the medians 1.25, but not in most rounds; and the other way round.
    uneven = [40.0, 180.0, 100.0, 90.0, 200.0], [50.0, 170.0, 80.0, 10.0, 190.0]
    assert ratio(*uneven) == pytest.approx(18 / 17)
    assert ratio([10.0, 100.0, 30.0], [5.0, 50.0, 29.0]) == pytest.approx(30 / 29)


def test_what_does_not_count(tmp_path: Path):
    a_tenth_less = timed(8, 128, [91.0, 92.0, 93.0])
    stacked, dry = timed(8, 128, FAST, stacked=2), timed(8, 128, FAST) | {"device": "cpu"}
    left_out = {"row": "a", "cell": asdict(CELL), "device": "H200", "left_out": "no time"}
    alone = record(replace(CELL, dtype="float16"), "b", seqkern=[100.0], torch_float16=[10.0])
    assert choice(tmp_path, [a_tenth_less, stacked, dry, left_out, alone]) == []


def test_float32_is_two_kinds_of_product(tmp_path: Path):
    times = {"seqkern": [100.0], "torch": [99.0], "seqkern_tf32": [50.0], "torch_tf32": [25.0]}
    (row,) = choice(tmp_path, [record(CELL, "gpu-layers-training", **times)])
    assert (row["dtype"], row["ratio"], row["B"]) == ("tf32", 2.0, [3, 3])


def test_the_committed_table_is_that_of_the_committed_results(tmp_path: Path):
    done = run("benchmarks.recurrent_gpu_choice", "--out", str(tmp_path / "table.json"))
    assert done.returncode == 0, done.stderr
    committed = recurrent_gpu_choice.TABLE.read_text()
    assert (tmp_path / "table.json").read_text() == committed
    assert bool(json.loads(committed)) == (not done.stdout.startswith("0 rows"))


# ---- end to end


def test_the_suite_runs_dry_and_prints(tmp_path: Path):
    records = tmp_path / "records.jsonl"
    rows = ["gpu-layers-training", "gpu-ragged-training"]
    done = suite_run(f"--records={records}", *(f"--row={row}" for row in rows))
    assert done.returncode == 0, done.stdout + done.stderr
    measured = [json.loads(line) for line in records.read_text().splitlines()]
    assert [r["row"] for r in measured] == sorted(rows)
    for r in measured:
        assert r["error_over_budget"] <= 1
        assert list(r["samples"]) == [OURS, TORCH, HALF, cases.LOOP]
        assert all(len(s["wall_us"]) >= 3 for s in r["samples"].values())
    done = run("benchmarks.recurrent_gpu_table", str(records))
    assert done.returncode == 0, done.stderr
    assert "2 and 4 layers, fwd+bwd" in done.stdout
    assert "A dry run" in done.stdout

    done = suite_run(f"--records={records}", f"--row={rows[0]}", "--within=0")
    assert "1 skipped" in done.stdout, done.stdout + done.stderr
    assert json.loads(records.read_text().splitlines()[-1])["left_out"] == "not begun within 0 s"


def test_a_wrong_kernel_fails_the_cell(tmp_path: Path):
    (tmp_path / "wrong_gpu_kernel.py").write_text(
        "import seqkern.nn\n"
        "right = seqkern.nn.LSTM.forward\n"
        "def forward(self, *args):\n"
        "    y, state = right(self, *args)\n"
        "    return y + 1, state\n"
        "seqkern.nn.LSTM.forward = forward\n"
    )
    records = tmp_path / "records.jsonl"
    options = ("-p", "wrong_gpu_kernel", f"--records={records}", "--row=gpu-bf16-inference")
    done = suite_run(*options, path=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "WrongResult: seqkern on LSTM-inference-bfloat16" in done.stdout, done.stdout
    assert not records.exists()
