"""The kernels of attention over a cache: interpreted for their values, compiled for their cost."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from seqkern.kernels import attention_decode as kernels
from seqkern.kernels import decode_arguments, tile
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from seqkern.ops import decode as ops
from seqkern.ops.choice import Choice
from seqkern.reference import decode as reference
from tests.decode_cases import CASES, NOTHING, Case, check, draw, in_cache, rule
from tests.offline.aot import Budget, gate, report
from tests.offline.driver import pretend_gpu
from tests.offline.interpreter import interpreted, poisoned_memory

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
ROWS = Case("rows", (1, 20), H=10, Hkv=1, Tq=5, D=16, Dv=16)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 keys a tile, so that short sequences have many."""
    small = decode_arguments.Config(16, 16, 4, 2)
    monkeypatch.setattr(kernels, "choose", lambda *_, **__: small)


def run(case: Case, q: Tensor, arguments: dict[str, Any], splits: int) -> tuple[Tensor, Tensor]:
    """What the launchers give for these tensors. Memory that nobody has written holds NaN."""
    lens, table = arguments["k_lens"], arguments.get("block_table")
    caches = arguments["k_cache"], arguments["v_cache"]
    with interpreted(tile, kernels), poisoned_memory():
        if case.new:
            kernels.cache_append(*caches, arguments["k_new"], arguments["v_new"], lens, table)
        return kernels.attention_decode(
            q, *caches, lens + case.new, table, *rule(case, case.D), splits
        )


@pytest.mark.parametrize("case", [*CASES, ROWS], ids=lambda case: case.name)
def test_values(case: Case) -> None:
    """In one part, which writes the result itself."""
    q, k, v = draw(case, torch.bfloat16)
    check(case, run(case, q, in_cache(case, k, v), 1), q, k, v)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("case", [*CASES, ROWS], ids=lambda case: case.name)
def test_values_in_parts(case: Case) -> None:
    q, k, v = draw(case, torch.float32)
    check(case, run(case, q, in_cache(case, k, v), 3), q, k, v)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("splits", range(1, 8))
def test_any_number_of_parts(splits: int) -> None:
    """More parts than tiles too, of which some find no key."""
    case = next(case for case in CASES if case.name == "everything")
    q, k, v = draw(case, FLOATS[splits % 3])
    check(case, run(case, q, in_cache(case, k, v), splits), q, k, v)


@pytest.mark.parametrize("case", NOTHING, ids=lambda case: case.name)
def test_nothing_to_attend_to(case: Case) -> None:
    q, k, v = draw(case, torch.float32)
    for splits in (1, 2):
        o, lse = run(case, q, in_cache(case, k, v), splits)
        assert o.shape == (len(case.lens), case.H, case.Tq, case.Dv)
        assert not o.any()
        assert (lse == -math.inf).all()


def test_layouts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any strides, and addresses in 64 bits."""
    case = Case("", (9, 30), Tq=3, D=16, Dv=16)
    q, k, v = draw(case, torch.float32)
    arguments = in_cache(case, k, v)
    plain = run(case, q, arguments, 1)
    arguments["k_cache"] = arguments["k_cache"].permute(3, 1, 2, 0).contiguous().permute(3, 1, 2, 0)
    arguments["v_cache"] = arguments["v_cache"].transpose(1, 2).contiguous().transpose(1, 2)
    monkeypatch.setattr(kernels, "needs_int64", lambda *_: True)
    odd = run(case, q.mT.contiguous().mT, arguments, 1)
    assert torch.equal(odd[0], plain[0])
    assert torch.equal(odd[1], plain[1])


@pytest.mark.parametrize("splits", [1, 2])
def test_lengths_and_sinks_of_any_strides(splits: int) -> None:
    """A column of a table gives what a copy of it gives."""
    lens, sinks = torch.tensor([[2, 0], [4, 0]], dtype=torch.int32), torch.randn(4, 2)
    new, q = torch.randn(2, 2, 2, 1, 8), torch.randn(2, 4, 1, 8)
    results = []
    for n, sink in ((lens[:, 0], sinks[:, 0]), (lens[:, 0].clone(), sinks[:, 0].clone())):
        caches = torch.ones(2, 2, 2, 6, 8)
        rule = None, sink, "bottom_right", -1, -1, 0.0, 0.3, splits
        with interpreted(tile, kernels):
            kernels.cache_append(*caches, *new, n, None)
            results.append((caches, *kernels.attention_decode(q, *caches, n, None, *rule)))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_far_addresses_take_64_bits() -> None:
    near, far = (torch.empty(1, 8, n, 128, device="meta") for n in (2**20, 2**24))
    assert not decode_arguments.needs_int64(near, near)
    assert decode_arguments.needs_int64(near, far)


def test_where_values_cannot_be_checked() -> None:
    """As the definition has it: lengths are clamped, entries dropped, and absent pages are NaN."""
    caches = torch.zeros(2, 2, 1, 4, 8)
    pools = torch.zeros(2, 2, 1, 2, 8)
    new, q = torch.randn(2, 2, 1, 2, 8), torch.randn(2, 1, 1, 8)
    table = torch.tensor([[0, 5], [-1, 1]], dtype=torch.int32)
    lens = torch.tensor([3, -1], dtype=torch.int32)
    plain = rule(CASES[0], 8)
    for cache, pages in ((caches, None), (pools, table)):
        expected = cache.clone()
        reference.cache_append(*expected, *new, lens, pages)
        with interpreted(tile, kernels):
            kernels.cache_append(*cache, *new, lens, pages)
        assert torch.equal(cache, expected)
    for cache, pages, lengths in ((caches, None, [9, -9]), (pools, table, [2, 3])):
        lens = torch.tensor(lengths, dtype=torch.int32)
        expected = reference.attention_decode(q, *cache, lens, pages, *plain, 0)
        for splits in (1, 2):
            with interpreted(tile, kernels):
                result = kernels.attention_decode(q, *cache, lens, pages, *plain, splits)
            torch.testing.assert_close(result, expected, equal_nan=True)
    assert expected[0].isnan().any()


@pytest.mark.parametrize("splits", [1, 2])
def test_nan_is_not_lost(splits: int) -> None:
    """A query that is NaN gives NaN, and leaves the others alone."""
    case = Case("", (20, 20), D=16, Dv=16)
    q, k, v = draw(case, torch.float32)
    q[1, 2] = math.nan
    o, lse = run(case, q, in_cache(case, k, v), splits)
    assert o[1, 2].isnan().all()
    assert lse[1, 2].isnan().all()
    assert o[0].isfinite().all()
    assert o[1, [0, 1, 3]].isfinite().all()


# ---- dispatch -----------------------------------------------------------------------------


def test_the_ops_take_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is registered for CUDA, on tensors of the CPU: the results are the kernels'."""
    for op in ("attention_decode", "cache_append"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"seqkern::{op}", "CUDA")
    taken = Choice("triton", "")
    monkeypatch.setattr(ops, "choose", lambda _: taken)
    monkeypatch.setattr(ops, "_choose_by_cache", lambda *_: taken)
    case = next(case for case in CASES if case.name == "Tq3-append")
    q, k, v = draw(case, torch.float32)
    held = in_cache(case, k, v)
    caches, lens, table = (held["k_cache"], held["v_cache"]), held["k_lens"], held["block_table"]
    with interpreted(tile, kernels):
        ops._cuda_append(*caches, held["k_new"], held["v_new"], lens, table)
        result = ops._cuda(q, *caches, lens + case.new, table, *rule(case, case.D), 2)
    check(case, result, q, k, v)


def test_choice() -> None:
    def choose(device: str, dtype: torch.dtype, D: int, **changed: Any) -> str:
        arguments = good() | changed
        with FakeTensorMode():
            for name in ("q", "k_cache", "v_cache"):
                shape = (*arguments[name].shape[:3], D)
                arguments[name] = torch.empty(shape, dtype=dtype, device=device)
        return ops.choose(tuple(arguments.values())).kernel

    assert choose("cuda", torch.bfloat16, 512, softcap=2.0) == "triton"
    assert choose("cuda", torch.bfloat16, 513) == "reference"
    assert choose("cuda", torch.float64, 64) == "reference"
    assert choose("meta", torch.float32, 64) == "reference"
    assert choose("cpu", torch.float64, 64) == "torch"
    assert choose("cpu", torch.float32, 64, softcap=2.0) == "reference"
    assert choose("cpu", torch.float32, 64, sinks=torch.zeros(4)) == "reference"


# ---- launch choices -----------------------------------------------------------------------


def test_number_of_parts() -> None:
    """Enough programs to fill the device, no more parts than tiles, one where it is full."""
    choose = decode_arguments.choose_splits
    assert choose(1024, 512, 264) == 1
    assert choose(8, 1, 264) == 1
    assert choose(8, 0, 264) == 1
    assert choose(8, 512, 1) == 1
    assert choose(256, 4096, 264) == 1
    assert 64 <= choose(1, 4096, 264) <= decode_arguments.MAX_SPLITS
    for programs in (8, 33, 100):
        for tiles in (512, 4096):
            splits = choose(programs, tiles, 264)
            waves = -(-programs * splits // 264)
            assert 1 < splits <= tiles
            assert programs * splits / (waves * 264) > 0.7


def test_every_head_has_a_config() -> None:
    for fp32, size in ((True, 4), (False, 2)):
        for D in (16, 32, 64, 128, 256, 512):
            for paged, aligned in ((True, True), (False, True), (True, False), (False, False)):
                config = decode_arguments.choose(
                    D * size, 64, fp32=fp32, paged=paged, aligned=aligned, amd=False
                )
                assert config.block_n * D * size <= 32 << 10
                assert config.block_m in (16, 32)


def test_width_of_rows() -> None:
    """What tells the compiler that rows may be loaded 16 bytes at a time must be true."""
    width = decode_arguments.common_width
    t = torch.empty(2, 2, 6, 40, dtype=torch.bfloat16)
    assert width(t, t) == 8
    assert width(t.float(), t.float()) == 4
    assert width(t, t[..., :39]) == 8
    assert width(t, torch.empty(2, 2, 6, 36, dtype=torch.bfloat16)) == 1
    assert width(t, t.flatten(2)[..., 1:].unflatten(2, (239, 1))) == 1


def call(dtype: torch.dtype, D: int, rows: int, page: int, splits: int, **changed: Any) -> None:
    """Both launchers on tensors whose values nobody can have read."""
    B, Hkv, places = 2, 2, 4096
    shape = (64, Hkv, page, D) if page else (B, Hkv, places, D)
    k_cache, v_cache = torch.empty(2, *shape, dtype=dtype)
    table = torch.empty(B, places // page, dtype=torch.int32) if page else None
    lens = torch.empty(B, dtype=torch.int32)
    new = torch.empty(2, B, Hkv, 1, D, dtype=dtype)
    kernels.cache_append(k_cache, v_cache, *new, lens, table)
    q = torch.empty(B, rows * Hkv, 1, D, dtype=dtype)
    slopes, sinks = changed.get("slopes"), changed.get("sinks")
    rule = slopes, sinks, "bottom_right", changed.get("left", -1), -1, changed.get("softcap", 0.0)
    kernels.attention_decode(q, k_cache, v_cache, lens, table, *rule, D**-0.5, splits)


COMPILED = {
    "D64": (90, torch.bfloat16, 64, 4, 0, 4),
    "D128": (90, torch.bfloat16, 128, 4, 0, 1),
    "D128-paged": (90, torch.bfloat16, 128, 64, 16, 4),
    "D256-paged": (90, torch.float16, 256, 8, 64, 2),
    "fp32": (90, torch.float32, 128, 4, 0, 4),
    "sm80": (80, torch.bfloat16, 128, 64, 16, 4),
    "sm100": (100, torch.bfloat16, 128, 4, 0, 4),
}


@pytest.mark.parametrize("name", COMPILED)
def test_compiled(name: str) -> None:
    """No spills; keys and values are copied to shared memory while others are worked on."""
    arch, *arguments = COMPILED[name]
    features = {}
    if name == "D128-paged":
        features = {"slopes": torch.empty(128), "sinks": torch.empty(128), "left": 99}
        features["softcap"] = 3.0
    with pretend_gpu(arch) as launches:
        call(*arguments, **features)
    splits = arguments[-1]
    names = ["append_kernel", "decode_kernel", "combine_kernel"][: 3 if splits > 1 else 2]
    assert [launch.kernel for launch in launches] == names
    for launch in launches:
        budget = Budget(matrix=0)
        if launch.kernel == "decode_kernel":
            tensor_cores = arguments[0] != torch.float32
            copied = ("LDGSTS", "HMMA") if tensor_cores else ("LDGSTS",)
            budget = replace(budget, required=copied)
        gate(report(launch), budget)
    tiles = -(-arguments[2] // 32)
    assert launches[1].grid == (4 * tiles, splits, 1)


# ---- refusals -----------------------------------------------------------------------------


def good() -> dict[str, Any]:
    caches = torch.zeros(2, 2, 2, 6, 8)
    return {
        "q": torch.zeros(2, 4, 1, 8),
        "k_cache": caches[0],
        "v_cache": caches[1],
        "k_lens": torch.zeros(2, dtype=torch.int32),
        "block_table": None,
        "alibi_slopes": None,
        "sinks": None,
        "causal": None,
        "window_left": -1,
        "window_right": -1,
        "softcap": 0.0,
        "scale": 1.0,
        "splits": 1,
    }


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("q", torch.zeros(2, 3, 1, 8), r"q must be \(2, a multiple of 2, Tq, 8\).*\(2, 3, 1, 8\)"),
        ("q", None, "q must be a Tensor, got NoneType"),
        ("k_cache", torch.zeros(2, 2, 6), "k_cache must be of 4 dimensions"),
        ("k_cache", torch.zeros(2, 2, 6, 513), "k_cache must be of heads of 1 to 512"),
        ("k_cache", torch.zeros(2, 2, 6, 8).double(), r"k_cache must be fp16, .* torch\.float64"),
        ("v_cache", torch.zeros(2, 2, 5, 8), r"v_cache must be of the sizes \(2, 2, 6\)"),
        ("k_lens", torch.zeros(2), r"k_lens must be \(2,\) of torch.int32.*torch.float32"),
        ("k_lens", torch.zeros(3, dtype=torch.int32), r"k_lens must be \(2,\).*\(3,\)"),
        ("block_table", torch.zeros(2, dtype=torch.int32), r"block_table must be \(B, N\)"),
        ("block_table", torch.zeros(2, 1), r"block_table must be .* of torch.int32"),
        ("alibi_slopes", torch.zeros(3), r"alibi_slopes must be \(4,\) or \(2, 4\)"),
        ("sinks", torch.zeros(3), r"sinks must be \(4,\)"),
        ("causal", True, "causal must be None, 'top_left' or 'bottom_right', got True"),
        ("softcap", -1.0, "softcap must be a finite number"),
        ("scale", math.nan, "scale must be finite, got nan"),
        ("splits", 129, "splits must be from 1 to 128, or 0 for a choice, got 129"),
    ],
)
def test_launcher_checks_again(name: str, value: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^attention_decode: {message}"):
        kernels.attention_decode(*(good() | {name: value}).values())


def test_append_launcher_checks_again() -> None:
    caches = torch.zeros(2, 2, 2, 6, 8)
    lens, new = torch.zeros(2, dtype=torch.int32), torch.zeros(2, 2, 1, 8)
    with pytest.raises(ValueError, match=r"^cache_append: v_new must be \(B, Hkv, Tn, D\) = \(2,"):
        kernels.cache_append(*caches, new, new[:1], lens, None)
    with pytest.raises(TypeError, match=r"^cache_append: k_new must be a Tensor, got NoneType"):
        kernels.cache_append(*caches, None, new, lens, None)
