"""The benchmark suites: peers compute the same, a wrong kernel is not timed, sums are right."""

import json
import math
import sys
import time
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import numpy as np
import pytest
import torch

import seqkern.nn
from tests.benchmark_runs import ROOT, run

# The suites run from a checkout and are not installed. The path does not stay: with it, the folder
# kernels/ would answer whoever looks for another package of that name.
sys.path.append(str(ROOT))

from benchmarks import (
    additive_cases,
    additive_table,
    bench_additive,
    cells,
    contestants,
    limits,
    memory,
    onnx_graph,
    paired,
    report,
)
from benchmarks.cells import ROWS, Cell, Goal, Row
from benchmarks.check import WrongResult, check

sys.path.remove(str(ROOT))

SMALL = Cell("inference", "LSTM", "float32", B=3, T=5, H=7)


# ---- the grid


def test_rows_of_the_table_cover_the_grid() -> None:
    assert len({row.key for row in ROWS}) == len(ROWS)
    for row in ROWS:
        assert row.cells
        assert cells.cells_of(row, "full") == list(row.cells)
        for grid in cells.GRIDS:
            assert set(cells.cells_of(row, grid)) <= set(row.cells)
            assert cells.cells_of(row, grid)
            assert cells.cells_of(row, grid, longest=0) == [min(row.cells, key=lambda c: c.flops)]


def test_ragged_lengths_fall_from_T_to_a_quarter() -> None:
    ragged = Cell("training", "LSTM", "float32", B=4, T=10, H=8, ragged=True)
    assert ragged.lengths == [10, 8, 6, 3]
    assert replace(ragged, ragged=False).lengths == [10] * 4
    assert replace(ragged, B=1).lengths == [10]
    problem = contestants.make_problem(ragged)
    assert problem.x.shape == (27, 8)
    assert problem.batch_sizes is not None
    assert problem.batch_sizes.tolist() == [4, 4, 4, 3, 3, 3, 2, 2, 1, 1]


# ---- the peers


@pytest.mark.parametrize("mode", ["LSTM", "GRU"])
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("with_state", [False, True])
def test_onnx_graph_equals_torch(mode: str, directions: int, with_state: bool) -> None:
    T, B, I, H = 6, 3, 5, 7
    torch.manual_seed(0)
    module = getattr(torch.nn, mode)(I, H, bidirectional=directions == 2)
    x = torch.randn(T, B, I)
    states = [torch.randn(directions, B, H) for _ in range(2 if mode == "LSTM" else 1)]
    feeds = {"X": x.numpy()}
    if with_state:
        feeds |= {f"initial_{n}": s.numpy() for n, s in zip(("h", "c"), states)}
    else:
        states = [torch.zeros_like(s) for s in states]
    with torch.no_grad():
        y, final = module(x, tuple(states) if mode == "LSTM" else states[0])
    session = onnx_graph.session(onnx_graph.recurrent_model(module, with_state), threads=1)
    Y, *Y_states = (torch.from_numpy(a) for a in session.run(None, feeds))
    torch.testing.assert_close(Y.transpose(1, 2).reshape(T, B, -1), y)
    for actual, expected in zip(Y_states, final if mode == "LSTM" else (final,), strict=True):
        torch.testing.assert_close(actual, expected)


def test_onnx_graph_refuses_what_it_does_not_build() -> None:
    with pytest.raises(ValueError, match="one layer"):
        onnx_graph.recurrent_model(torch.nn.LSTM(4, 4, num_layers=2), with_state=False)
    with pytest.raises(ValueError, match="RNN_TANH"):
        onnx_graph.recurrent_model(torch.nn.RNN(4, 4), with_state=False)


@pytest.mark.parametrize("mode", ["LSTM", "GRU"])
def test_onnx_steps_equal_one_sequence(mode: str) -> None:
    cell = Cell("step", mode, "float32", B=1, T=1, H=8)
    problem = contestants.make_problem(cell)
    module = contestants.torch_module(cell)
    module.load_state_dict(problem.module.state_dict())
    with torch.no_grad():
        y, _ = module(problem.x.float().expand(5, 1, 8))
    step = contestants.onnx_contestant(cell, problem).run
    steps = [np.array(step()).reshape(-1) for _ in range(5)]
    torch.testing.assert_close(torch.from_numpy(np.stack(steps)), y[:, 0])


def test_contestants_name_an_unknown_peer() -> None:
    with pytest.raises(ValueError, match="'cudnn'"):
        contestants.contestants(SMALL, contestants.make_problem(SMALL), ("cudnn",))


# ---- the gate

CHECKED = [
    SMALL,
    replace(SMALL, dtype="bfloat16"),
    replace(SMALL, mode="GRU", kind="training", directions=2),
    replace(SMALL, mode="RNN_RELU", kind="training"),
    replace(SMALL, kind="training", P=3),
    replace(SMALL, kind="training", T=1),
    replace(SMALL, kind="training", ragged=True),
]


def test_gate_passes_the_stream() -> None:
    # Apart from the others: a stepper has a state, so its outputs can be asked for once.
    cell = Cell("step", "LSTM", "float32", 1, 1, 8)
    problem = contestants.make_problem(cell)
    entries = contestants.contestants(cell, problem, ("torch", "onnxruntime"))
    assert check(cell, problem, entries) <= 1


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported")
@pytest.mark.parametrize("cell", CHECKED, ids=str)
def test_gate_passes_a_right_kernel_and_stops_a_wrong_one(cell: Cell) -> None:
    problem = contestants.make_problem(cell)
    entries = contestants.contestants(cell, problem, ("torch",))
    assert check(cell, problem, entries) <= 1

    ours = entries[0]
    for name, value in ours.outputs().items():
        # An error of a few roundings of the dtype, in one element of one output.
        wrong = value.detach().clone()
        scale = wrong.abs().max().item() or 1.0
        wrong.view(-1)[-1] += 30 * torch.finfo(wrong.dtype).eps * scale
        broken = replace(ours, outputs=lambda n=name, w=wrong: ours.outputs() | {n: w})
        with pytest.raises(WrongResult, match=f"seqkern.*{name} is"):
            check(cell, problem, [broken, *entries[1:]])
    broken = replace(ours, outputs=lambda: {k: v * torch.nan for k, v in ours.outputs().items()})
    with pytest.raises(WrongResult, match="inf from float64"):
        check(cell, problem, [broken])


def test_gate_stops_a_peer_that_computes_something_else() -> None:
    problem = contestants.make_problem(SMALL)
    ours, peer = contestants.contestants(SMALL, problem, ("torch",))
    broken = replace(peer, outputs=lambda: {k: v + 1e-3 for k, v in peer.outputs().items()})
    with pytest.raises(WrongResult, match="torch on LSTM"):
        check(SMALL, problem, [ours, broken])


@pytest.mark.parametrize("T", [128, 1024])
def test_gate_allows_a_peer_the_rounding_of_a_long_sequence(T: int) -> None:
    cell = Cell("inference", "LSTM", "float32", B=1, T=T, H=3)
    problem = contestants.make_problem(cell)
    ours, peer = contestants.contestants(cell, problem, ("torch",))
    off = replace(peer, outputs=lambda: {k: v + 2e-4 for k, v in peer.outputs().items()})
    if T == 1024:
        assert check(cell, problem, [ours, replace(off, name="other")]) <= 1
        off = replace(peer, outputs=lambda: {k: v + 4e-4 for k, v in peer.outputs().items()})
    with pytest.raises(WrongResult, match="torch on LSTM"):
        check(cell, problem, [ours, off])


def test_a_wrong_kernel_fails_the_benchmark(tmp_path: Path) -> None:
    (tmp_path / "wrong_kernel.py").write_text(
        "import seqkern.nn\n"
        "right = seqkern.nn.LSTM.forward\n"
        "def forward(self, *args):\n"
        "    y, state = right(self, *args)\n"
        "    return y + 1e-3, state\n"
        "seqkern.nn.LSTM.forward = forward\n"
    )
    results = tmp_path / "results.json"
    done = run(
        "pytest", "-q", "-p", "wrong_kernel", "-p", "no:cacheprovider",
        "-W", "ignore::pytest_benchmark.logger.PytestBenchmarkWarning",
        "benchmarks/bench_recurrent.py", "--grid=tiny", "--row=lstm-f32-inference-step",
        f"--benchmark-json={results}",
        path=tmp_path,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    assert "WrongResult: seqkern on LSTM-inference-float32" in done.stdout, done.stdout
    assert "2 failed" in done.stdout


# ---- the arithmetic


def record(row: str, cell: Cell, limit_us: float = 1.0, **wall_us: list[float]) -> dict:
    """A record as the suite writes it; CPU time is set to half the wall clock's."""
    samples = {
        name: {"calls": 1, "wall_us": wall, "cpu_us": [t / 2 for t in wall]}
        for name, wall in wall_us.items()
    }
    return {"row": row, "cell": asdict(cell), "limit_us": limit_us, "samples": samples}


def test_ratio_is_of_medians() -> None:
    assert paired.ratio([8, 6, 100], [1, 2, 50]) == 4


def test_geometric_mean_worst_cell_and_best_peer() -> None:
    goals = (Goal("torch", 3, 6), Goal("best", 1.5, 9, cell_floor=0.9))
    row = Row("key", "title", ("torch", "onnxruntime"), goals, ())
    other = replace(SMALL, H=9)
    records = [
        record("key", SMALL, 1.0, seqkern=[4, 4, 9], torch=[8, 8, 8], onnxruntime=[12, 12, 12]),
        record("key", other, 1.0, seqkern=[2, 1, 1], torch=[8, 8, 8], onnxruntime=[1, 1, 1]),
    ]
    to_torch, to_best, to_ort = report.row_lines(row, records)
    assert to_torch.mean == pytest.approx(geometric_mean([2, 8])) == pytest.approx(4)
    assert (to_torch.worst, to_torch.worst_cell) == (2, "B3 T5 H7")
    assert (to_torch.must, to_torch.aim, to_torch.verdict) == ("3x", "6x", "met")
    assert to_best.mean == pytest.approx(geometric_mean([2, 1]))
    assert (to_best.worst, to_best.worst_cell) == (1, "B3 T5 H9")
    assert to_best.verdict == "NOT MET"
    assert (to_ort.peer, to_ort.verdict) == ("onnxruntime", "")
    # One thread counts CPU time, which the records put at half the wall clock: 2 us and 0.5 us.
    assert to_torch.of_limit == pytest.approx(geometric_mean([1 / 2, 1 / 0.5]))


def test_clock_is_cpu_time_on_one_thread_and_wall_on_two() -> None:
    two = replace(SMALL, threads=2)
    one = record("key", SMALL, seqkern=[2], torch=[6])
    one["samples"]["torch"]["cpu_us"] = [5]
    assert report.cell_ratio(one, "torch") == 5
    assert report.cell_ratio(one | {"cell": asdict(two)}, "torch") == 3


@pytest.mark.parametrize(
    ("mean", "worst", "expected"),
    [(1.4, 0.9, "aim"), (1.1, 0.9, "met"), (0.99, 0.95, "NOT MET"), (2.0, 0.89, "NOT MET")],
)
def test_verdict(mean: float, worst: float, expected: str) -> None:
    assert report.verdict(Goal("best", 1.0, 1.3, cell_floor=0.9), mean, worst) == expected


def test_memory_is_torch_over_ours() -> None:
    peaks = [{"seqkern": 50, "torch": 100}, {"seqkern": 100, "torch": 50}]
    records = [{"row": "memory", "cell": asdict(SMALL), "peak_bytes": peak} for peak in peaks]
    (line,) = report.table(records)
    assert line.mean == pytest.approx(1)
    assert (line.worst, line.verdict) == (0.5, "NOT MET")


def test_rounds_and_calls_fit_the_budget() -> None:
    assert paired.calls_per_sample(1.0) == 1
    assert paired.calls_per_sample(1e-5) == 30
    assert paired.rounds_within(1.0, [0.05, 0.05]) == 10
    assert paired.rounds_within(1.0, [2.0, 3.0]) == 9
    assert paired.rounds_within(1.0, [20.0, 3.0]) == 3
    orders = paired.shuffled_orders(3)
    assert all(sorted(next(orders)) == [0, 1, 2] for _ in range(10))


def test_limits_on_a_clock_in_steps_of_ten_milliseconds() -> None:
    def steps() -> float:
        return time.process_time() // 0.01 * 0.01

    data = torch.ones(1 << 12)
    seconds = limits.best_seconds(lambda: torch.dot(data, data), 0.05, steps, calls=100)
    assert 0 < seconds < 0.01


def test_limits_hold_when_the_machine_is_disturbed(monkeypatch: pytest.MonkeyPatch) -> None:
    # Both sizes take equally long, as when another program held the core for one of them.
    monkeypatch.setattr(limits, "read_seconds", lambda size, seconds: 1e-3)
    measured = limits.measure(0.001)
    assert measured.l2 == pytest.approx(512 * 1024 / (1e-3 / 3) * 1e-9)
    assert 0 < measured.l3 < math.inf


def test_limit_of_a_cell_by_hand() -> None:
    machine = limits.Limits({"float32": 100.0, "bfloat16": 800.0}, l2=100.0, l3=20.0,
                            l2_bytes=1 << 20)  # fmt: skip
    one = limits.cell_limit(Cell("inference", "LSTM", "float32", B=1, T=10, H=512), machine)
    # 4 MiB of weights a step: 1 MiB from L2, 3 MiB from L3.
    assert one.read == pytest.approx(10 * 2**20 * (1 / 100e9 + 3 / 20e9))
    assert one.outside == one.product == pytest.approx(10 * 2 * 4 * 512 * 512 / 100e9)
    assert one.bound == "weight reads"
    assert one.total == one.read + one.pointwise + one.outside
    many = limits.cell_limit(Cell("training", "GRU", "bfloat16", B=64, T=10, H=256), machine)
    product = 10 * 64 * 2 * 3 * 256 * 256 / 800e9
    assert many.bound == "products"
    assert (many.product, many.outside) == (pytest.approx(2 * product), pytest.approx(4 * product))


# ---- end to end


def test_peak_memory_sees_what_a_step_must_hold() -> None:
    cell = Cell("training", "LSTM", "float32", B=32, T=32, H=128)
    gates = 4 * 4 * 32 * 32 * 128
    peak = memory.measure_step_peak("torch", cell)
    assert gates < peak < 40 * gates


def test_suite_runs_and_its_results_survive_saving(tmp_path: Path) -> None:
    rows = ["lstm-f32-inference-step", "lstm-f32-training-ragged"]
    options = [f"--row={row}" for row in rows]
    done = run("benchmarks", "--grid=tiny", "--budget=0.02", f"--out={tmp_path}", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "LSTM fp32 ragged training" in done.stdout
    assert "torch.mm" in done.stdout

    files = [tmp_path / f"{row}.json" for row in rows]
    measured = report.load(files)
    assert [r["row"] for r in measured["records"]] == [rows[0]] * 2 + [rows[1]] * 4
    for entry in measured["records"]:
        assert entry["error_over_budget"] <= 1
        times = entry["samples"]["seqkern"]["cpu_us"]
        assert len(times) >= 3
        assert min(times) > 0
    # pytest-benchmark timed the same calls.
    raw = json.loads(files[0].read_text())["benchmarks"][0]
    assert raw["stats"]["rounds"] == len(raw["extra_info"]["samples"]["seqkern"]["wall_us"])

    saved = report.save(measured, tmp_path / "results")
    assert report.table(report.load([saved])["records"]) == report.table(measured["records"])
    markdown = report.format_table(report.table(measured["records"]), markdown=True)
    assert markdown.splitlines()[1].startswith("| ---")

    # A row that was measured later, at another commit and in another grid, is told apart.
    later = json.loads(files[1].read_text())
    later["commit_info"] = {"id": "1" * 40, "dirty": False}
    later["datetime"] = "2999-01-02T03:04:05"
    later["seqkern"]["longest"] = 0.5
    files[1].write_text(json.dumps(later))
    merged = report.load([report.save(report.load(files), tmp_path / "later")])
    assert merged["commit"] == {rows[0]: measured["commit"][rows[0]], rows[1]: "1" * 40}
    about = report.about(merged)
    assert measured["commit"][rows[0]][:12] in about
    assert f", {'1' * 12};" in about or f"commit {'1' * 12}, " in about
    assert "2999-01-02; grid tiny, without calls over 0.5 s in lstm-f32-training-ragged." in about


def test_additive_suite_runs_and_prints(tmp_path: Path) -> None:
    # As the compiler of PyTorch warns on a GPU, where it makes an error of its own of an exception.
    (tmp_path / "warns.py").write_text(
        "import warnings\n"
        "import torch\n"
        "right = torch.compile\n"
        "def warn(*args, **options):\n"
        "    warnings.warn('TF32 is available but not enabled', stacklevel=2)\n"
        "    return right(*args, **options)\n"
        "torch.compile = warn\n"
    )
    results, lines = tmp_path / "results.json", tmp_path / "records.jsonl"
    command = (
        "pytest", "-q", "-p", "no:cacheprovider", "-p", "warns", "benchmarks/bench_additive.py",
        "--grid=tiny", "--budget=0.02", f"--records={lines}",
        "-W", "ignore::pytest_benchmark.logger.PytestBenchmarkWarning",
    )  # fmt: skip
    done = run(*command, f"--benchmark-json={results}", path=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    records = [json.loads(line) for line in lines.read_text().splitlines()]
    assert records == [b["extra_info"] for b in json.loads(results.read_text())["benchmarks"]]
    assert [additive_cases.Case(**r["case"]) for r in records] == additive_cases.tiny_cases()
    for record in records:
        assert 0 < record["error_over_budget"] <= 1
        assert len(record["samples"]["seqkern"]["wall_us"]) >= 3
    for path in (results, lines):
        done = run("benchmarks.additive_table", str(path))
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("of the tanh rate") == len(records)


def test_additive_formulas_agree() -> None:
    p = additive_cases.make_problem(additive_cases.Case(2, 5, 7, 20, True), "cpu")
    expected = additive_cases.exact(p)
    for function in (seqkern.additive_attention, additive_cases.by_sum, additive_cases.by_product):
        actual = additive_cases.outputs(p, lambda f=function: f(*p.inputs))
        assert actual.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(actual[name].double(), value, rtol=1e-4, atol=1e-5)


def test_additive_results_are_compared_by_their_largest_element() -> None:
    eager = {"dv": torch.tensor([100.0, 0.001])}
    near = {"dv": torch.tensor([100.0, 3.0])}
    bench_additive.assert_one_formula({"eager": eager, "compiled": near})
    for wrong in (106.0, math.nan):
        far = {"dv": torch.tensor([wrong, 0.001])}
        with pytest.raises(AssertionError, match="compiled: dv is"):
            bench_additive.assert_one_formula({"eager": eager, "compiled": far})


def test_additive_memory_sees_the_tensor_that_ours_never_makes() -> None:
    case = additive_cases.Case(8, 64, 64, 256)
    eager, ours = (additive_cases.peak_on_cpu(name, case) for name in ("eager", "seqkern"))
    assert eager >= 4 * case.tanhs
    assert ours < 0.05 * eager


def test_additive_cases_of_a_gpu_are_of_every_kind() -> None:
    kinds = {(case.Tq == 1, case.backward, case.dtype) for case in additive_cases.gpu_cases()}
    assert kinds == set(product((False, True), (False, True), ("float32", "bfloat16")))
    compiled = [
        (case.Tq == 1, case.backward, case.dtype, case.D)
        for case in additive_cases.gpu_cases()
        if (case.B, case.Tq) in additive_cases.COMPILED_SIZES
    ]
    assert set(compiled) == {(*kind, D) for kind in kinds for D in (256, 512)}
    assert len(compiled) == len(set(compiled))


def test_additive_ways_to_take_tanh(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU each is timed, by a launcher that is told which; here the op stands for it."""
    pytest.importorskip("triton", reason="the launcher is Triton's")
    from seqkern.kernels import additive_table as launches

    taken: list[str] = []

    def launcher(*args: Any, config: Any) -> Any:
        taken.append(config.tanh)
        return torch.ops.seqkern.additive_attention(*args)

    monkeypatch.setattr("seqkern.kernels.additive_attention.additive_attention", launcher)
    monkeypatch.setattr(launches, "choose", partial(launches.choose, target=("cuda", 90)))
    p = additive_cases.make_problem(additive_cases.Case(2, 5, 7, 20), "cpu")
    expected = additive_cases.by_product(*p.inputs)
    for forward in additive_cases.by_tanh(p).values():
        torch.testing.assert_close(forward(), expected)
    assert taken == ["shared", "single", "hardware"]
    for other in (additive_cases.Case(2, 5, 7, 20, True), additive_cases.Case(2, 1, 7, 20)):
        assert not additive_cases.by_tanh(additive_cases.make_problem(other, "cpu"))


def test_additive_line() -> None:
    record = {
        "case": asdict(additive_cases.Case(64, 1, 32, 256)),
        "device": "cpu",
        "tanhs": 524288,
        "tanh_rate": 1e9,
        "peak_bytes": {"seqkern": 1, "eager": 100},
        "samples": {
            "seqkern": {"cpu_us": [500.0], "wall_us": [9.0]},
            "eager": {"cpu_us": [2000.0], "wall_us": [9.0]},
        },
    }
    line = additive_table.line(record)
    assert "eager 4.00x" in line
    assert "memory 1.0% of eager's" in line
    assert "1.05 of the tanh rate" in line


def test_layer_under_test_is_seqkern() -> None:
    entry = contestants.contestants(SMALL, contestants.make_problem(SMALL), ())[0]
    assert entry.name == "seqkern"
    assert isinstance(contestants.torch_module(SMALL, seqkern.nn), seqkern.nn.LSTM)
