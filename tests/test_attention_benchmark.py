"""The benchmark of attention as far as it goes without a GPU: it runs and prints, everyone computes
the same problem, and a decoder's caches do not stay in the L2 cache."""

import json
import sys
import warnings
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

# The suites run from a checkout and are not installed. The path does not stay: with it, the folder
# kernels/ would answer whoever looks for another package of that name.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks import attention_cases as cases
from benchmarks import bench_attention as suite
from benchmarks.attention_cases import Case
from tests.benchmark_runs import ROOT, run

sys.path.remove(str(ROOT))


PADDED = Case("padded", 3, 2, 2, 16, 8, dtype="float32")


def test_the_suite_runs_and_prints(tmp_path: Path) -> None:
    # As PyTorch warns of a kernel that refuses a case.
    (tmp_path / "warns.py").write_text(
        "import warnings\n"
        "import torch.nn.functional as F\n"
        "right = F.scaled_dot_product_attention\n"
        "def warn(*args, **options):\n"
        "    warnings.warn('this kernel is not used because', stacklevel=2)\n"
        "    return right(*args, **options)\n"
        "F.scaled_dot_product_attention = warn\n"
    )
    lines = tmp_path / "records.jsonl"
    command = (
        "pytest", "-q", "-p", "no:cacheprovider", "-p", "warns", "benchmarks/bench_attention.py",
        "--budget=0.01", f"--records={lines}",
        "-W", "ignore::pytest_benchmark.logger.PytestBenchmarkWarning",
    )  # fmt: skip
    done = run(*command, path=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    records = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [Case(**record["case"]) for record in records] == cases.cpu_cases()
    assert all(list(r["samples"]) == ["seqkern", "eager", "sdpa"] for r in records)
    done = run(*command, "--within=0", path=tmp_path)
    assert "4 skipped" in done.stdout, done.stdout + done.stderr
    done = run("benchmarks.attention_table", str(lines), path=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("best peer sdpa") == 4
    assert "with the call itself" in done.stdout
    assert "4 cases left out: not begun within 0 s" in done.stdout


def test_a_mask_of_padding_has_no_queries() -> None:
    p = cases.make_problem(PADDED, "cpu")
    assert p.mask is not None
    assert p.mask.shape == (3, 1, 1, 16)
    for name, forward in cases.forwards(p).items():
        entry = suite.Contestant(name, forward, lambda f=forward: {"o": f()})
        peer = suite.Contestant("eager", forward, lambda: {"o": cases.eager(p)})
        assert suite.check(p, {"seqkern": entry, "eager": peer}) <= 1, name


@pytest.mark.parametrize("causal", [False, True])
def test_flex_skips_the_queries_of_padding_too(causal: bool, monkeypatch) -> None:
    from torch.nn.attention import flex_attention

    asked = []
    monkeypatch.setattr(
        flex_attention, "create_block_mask", lambda f, *sizes, device: asked.append(f)
    )
    p = cases.make_problem(Case("padded", 3, 2, 2, 16, 8, causal, dtype="float32"), "cpu")
    cases.flex(p)
    b, i, j = torch.meshgrid(torch.arange(3), torch.arange(16), torch.arange(16), indexing="ij")
    n = torch.tensor(p.case.lengths)[:, None, None]
    expected = (i < n) & (j < n) & ((i >= j) | (not causal))
    assert torch.equal(asked[0](b, 0, i, j), expected)


def test_flex_enters_each_kind_of_case() -> None:
    entered = [c.kind for c in cases.gpu_cases() if cases.FLEX_SIZES[c.kind] == (c.T, c.D)]
    assert set(entered) == {"plain", "padded", "bias", "decode"}
    # Each is compiled for up to half a minute.
    assert len(entered) <= 10


def test_heads_of_128_are_measured_first() -> None:
    of = [c for c in cases.gpu_cases() if c.kind == "plain"]
    assert len(of) == len(set(of)) == 60
    assert {c.D for c in of[:20]} == {128}
    assert [c.T for c in of[:20]] == sorted((c.T for c in of[:20]), reverse=True)


def test_a_flex_that_cannot_be_built_is_a_refusal(monkeypatch) -> None:
    """Its mask is made by its first call, not while the contestants are listed."""

    def broken(p: cases.Problem) -> None:
        raise RuntimeError("no block mask")

    monkeypatch.setattr(cases, "flex", broken)
    monkeypatch.setitem(cases.FLEX_SIZES, "padded", (16, 8))
    p = replace(cases.make_problem(PADDED, "cpu"), q=Mock(is_cuda=True))
    flex = cases.forwards(p)["flex"]
    with pytest.raises(RuntimeError, match="no block mask"):
        flex()


def test_flex_decodes_what_the_lengths_leave(monkeypatch) -> None:
    # Not compiled it computes the whole matrix of scores, and says so.
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    p = cases.make_problem(Case("decode", 2, 4, 2, 128, 32, dtype="float32"), "cpu")
    p.lens = torch.tensor([100, 7], dtype=torch.int32)
    p.mask = (torch.arange(128) < p.lens[:, None])[:, None, None, :]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
        o = cases.flex(p)()
    torch.testing.assert_close(o, cases.exact(p))
    torch.testing.assert_close(o, cases.ours(p))


def test_decoding_goes_round_more_caches_than_the_l2_cache_holds(monkeypatch) -> None:
    case = Case("decode", 2, 4, 2, 64, 8, dtype="float32")
    l2 = case.cache_bytes * 5 // 2
    monkeypatch.setattr(cases, "l2_bytes", lambda: l2)
    p = cases.make_problem(case, "cpu")
    expected, read = cases.exact(p), []

    def forward() -> torch.Tensor:
        read.append((p.k.data_ptr(), p.v.data_ptr()))
        return cases.ours(p)

    run = cases.step(p, forward)
    for _ in range(12):
        torch.testing.assert_close(run(), expected)
    assert len(set(read[:6])) == 6
    assert 6 * case.cache_bytes > 2 * l2
    assert read[6:] == read[:6]


def test_a_kernel_is_chosen_once_for_all_repeats(monkeypatch) -> None:
    chosen, calls = [], []

    @contextmanager
    def choose(backend):
        chosen.append(backend)
        yield

    monkeypatch.setattr(cases, "sdpa_kernel", choose)
    suite.under("sdpa flash", lambda: [calls.append(1) for _ in range(9)])()
    suite.under("seqkern", lambda: calls.append(1))()
    assert chosen == [cases.BACKENDS["sdpa flash"]]
    assert len(calls) == 10
