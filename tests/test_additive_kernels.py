"""The additive attention kernels on the CPU: run by the interpreter, held to the reference.

Fresh memory holds NaN, and so does everything that a kernel has no business to read.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton", reason="the kernels are Triton's")

import triton
from seqkern.kernels import additive_attention as kernels
from seqkern.kernels import additive_tile
from seqkern.kernels.additive_arguments import Arguments, check, tokens_of
from seqkern.kernels.additive_rows import attend_rows
from seqkern.kernels.additive_table import Config

from seqkern.ops import _additive_ops as ops
from seqkern.ops.choice import Choice
from seqkern.reference import additive as reference
from seqkern.testing.additive import additive_cases
from seqkern.testing.cases import OpCase
from seqkern.testing.compare import assert_matches_reference, cotangents, named
from seqkern.testing.tolerance import assert_within_budget, neighbours
from tests.offline.interpreter import interpreted, poisoned_memory

fp32, fp16, bf16 = torch.float32, torch.float16, torch.bfloat16
Shape = tuple[int, int, int]
# Reciprocals as they are written, for the interpreter knows no assembler.
LARGE = Config(64, 4, 32, ptx=False)
SMALL = Config(16, 2, 16, ptx=False)
GRADIENTS = "dquery", "dkey", "dvalue", "dv", "dbias"


@dataclass(frozen=True)
class Case:
    """Sizes and features of one call; mask and bias are given by their shapes.

    far: how many times the usual size queries and keys have. large: how many times v has.
    """

    B: int = 2
    Tq: int = 9
    Tk: int = 21
    D: int = 12
    Dv: int = 24
    dtype: torch.dtype = fp32
    lens: tuple[int, ...] | None = None
    mask: Shape | None = None
    bias: Shape | None = None
    bias_dtype: torch.dtype | None = None
    scale: float = 1.0
    weights: bool = False
    dlse: bool = True
    far: float = 1.0
    large: float = 1.0
    splits: int = 1
    config: Config = LARGE

    def tensors(self) -> dict[str, Any]:
        """The op's tensors by name, with NaN in keys and values that no query has."""
        B, Tq, Tk = self.B, self.Tq, self.Tk
        shapes = {"query": (B, Tq, self.D), "key": (B, Tk, self.D), "value": (B, Tk, self.Dv)}
        shapes |= {"v": (self.D,), "do": (B, Tq, self.Dv)}
        made: dict[str, Any] = {n: torch.randn(shape).to(self.dtype) for n, shape in shapes.items()}
        for name in ("query", "key"):
            made[name] *= self.far
        made["v"] *= self.large
        made["dweights"] = torch.randn(B, Tq, Tk).to(self.dtype) if self.weights else None
        made["dlse"] = torch.randn(B, Tq) if self.dlse else None
        made["mask"] = torch.rand(self.mask) > 0.4 if self.mask else None
        made["bias"] = None
        if self.bias:
            made["bias"] = torch.randn(self.bias).to(self.bias_dtype or self.dtype)
        made["k_lens"] = None
        if self.lens is not None:
            made["k_lens"] = torch.tensor(self.lens, dtype=torch.int32)
            for b, length in enumerate(self.lens):
                made["key"][b, max(length, 0) :] = made["value"][b, max(length, 0) :] = torch.nan
                if self.weights:
                    made["dweights"][b, :, max(length, 0) :] = torch.nan
        return made

    def arguments(self, t: dict[str, Any]) -> tuple[Any, ...]:
        """The op's arguments in their order, without need_weights."""
        names = ("query", "key", "value", "v", "mask", "bias", "k_lens")
        return (*(t[name] for name in names), self.scale)


def computed(attend, derive, t: dict[str, Any], case: Case, **options) -> dict[str, Tensor]:
    """Results and gradients by name, of the kernels or of the reference."""
    args = case.arguments(t)
    o, weights, lse = attend(*args, case.weights, **options)
    options.pop("splits", None)
    grads = derive(t["do"], t["dweights"], t["dlse"], o, lse, *args, *[True] * 5, **options)
    results = {"o": o, "lse": lse, **dict(zip(GRADIENTS, grads))}
    if t["bias"] is None:
        assert results.pop("dbias").shape == (0,)
    if case.weights:
        results["weights"] = weights
    else:
        assert weights.shape == (0,)
    return results


def by_kernels(t: dict[str, Any], case: Case, seed: int = 0) -> dict[str, Tensor]:
    functions = kernels.additive_attention, kernels.additive_attention_backward
    with interpreted(seed=seed), poisoned_memory():
        return computed(*functions, t, case, config=case.config, splits=case.splits)


def by_reference(t: dict[str, Any], case: Case) -> dict[str, Tensor]:
    t = dict(t)
    if case.lens is not None and case.weights:
        t["dweights"] = t["dweights"].nan_to_num()
    functions = reference.additive_attention, reference.additive_attention_backward
    return computed(*functions, t, case)


def assert_equals_reference(case: Case, t: dict[str, Any] | None = None) -> None:
    """Results and gradients within the budget that float64 gives."""
    t = t or case.tensors()
    moving = [n for n, x in t.items() if x is not None and x.is_floating_point()]
    doubled = {n: t[n].double() for n in moving}
    actual, exact = by_kernels(t, case), by_reference(t | doubled, case)
    empty = exact["lse"] == -torch.inf
    assert torch.equal(actual["lse"] == -torch.inf, empty)
    runs = [
        by_reference(t | dict(zip(moving, n)), case)
        for n in neighbours([t[n] for n in moving], count=12)
    ]
    for results in (actual, exact, *runs):
        results["lse"] = results["lse"].masked_fill(empty, 0)
        assert all(result.is_contiguous() for result in results.values())
    for dtype in {result.dtype for result in actual.values()}:

        def of_dtype(results: dict[str, Tensor], dtype=dtype) -> dict[str, Tensor]:
            return {n: results[n] for n, result in actual.items() if result.dtype == dtype}

        assert_within_budget(*map(of_dtype, (actual, exact)), [*map(of_dtype, runs)], dtype)


# ---- sizes and dtypes ---------------------------------------------------------------------

LENS = 21, 12
SIZES = [
    Case(B=1, Tq=97, Tk=63, D=40, Dv=24, lens=(60,)),
    Case(B=1, Tq=63, Tk=17, D=72, Dv=100, dtype=bf16),
    Case(B=1, Tq=17, Tk=97, D=129, Dv=24, dtype=fp16),
    Case(B=1, Tq=17, Tk=17, D=256, Dv=100),
    Case(B=1, Tq=97, Tk=63, D=8, Dv=1, dtype=bf16),
    # In fp32 the gradient of the only score of a row is all rounding: do.value - do.o.
    Case(Tq=63, Tk=1, D=8, dtype=bf16),
    Case(Tq=33, Tk=70, D=8, Dv=40, config=SMALL, lens=(70, 1)),
    Case(Tq=5, Tk=66, D=1, Dv=3, config=SMALL, dtype=fp16),
    Case(B=1, Tq=17, Tk=65, D=17, Dv=17, config=dataclasses.replace(SMALL, tanh="single")),
    Case(Tq=0),
    Case(Tk=0, weights=True),
    Case(B=0),
]
# Up to four queries have a kernel of their own for the forward.
FEW = [
    Case(Tq=1, Tk=97, D=40, Dv=24, weights=True),
    Case(Tq=1, Tk=63, D=72, Dv=100, dtype=bf16, lens=LENS, splits=3),
    Case(B=1, Tq=4, Tk=97, D=129, Dv=1, dtype=fp16, splits=2, mask=(1, 4, 97)),
    Case(B=3, Tq=2, Tk=17, D=8, Dv=300, splits=5, lens=(17, 0, 3), weights=True),
    Case(Tq=1, Tk=1, D=1, Dv=1),
    Case(Tq=1, Tk=70, bias=(1, 1, 70), dtype=bf16),
    Case(B=1, Tq=3, Tk=17, D=256, Dv=24, bias=(1, 3, 17), scale=0.3),
    Case(B=1, Tq=1, Tk=20, D=16, Dv=1030, lens=(13,)),
]
FEATURES = [
    Case(lens=LENS),
    Case(lens=(0, 30)),
    Case(lens=(-3, 17), weights=True, dtype=bf16),
    Case(weights=True, dlse=False, scale=0.25),
    Case(weights=True, mask=(2, 9, 21), lens=LENS, dtype=fp16),
    Case(mask=(1, 9, 21), dlse=False),
    Case(mask=(2, 1, 21)),
    Case(mask=(2, 9, 1)),
    Case(bias=(2, 9, 21)),
    Case(bias=(2, 9, 21), weights=True, lens=LENS, mask=(1, 1, 21)),
    Case(bias=(1, 9, 21), dtype=bf16),
    Case(bias=(1, 1, 21), dtype=fp16, bias_dtype=fp32, lens=LENS),
    Case(B=3, bias=(1, 9, 1), lens=(9, 21, 0)),
    Case(bias=(1, 1, 1), Tq=17, Tk=66, D=2, config=SMALL),
    Case(scale=-2.0),
]
FAR = [
    # Beyond what exponentials may be multiplied for, and beyond what they can hold.
    Case(far=9.0, lens=LENS),
    Case(far=60.0, dtype=bf16),
    Case(Tq=2, far=60.0),
    # So near to 0 that tanh as a difference from 1 has cancelled.
    Case(far=1e-3, lens=LENS),
    Case(far=1e-30, config=dataclasses.replace(LARGE, tanh="single")),
    Case(Tq=1, far=1e-3, D=40),
    # Which no exponential may be multiplied by.
    Case(far=3.0, large=1e30, scale=1e-30),
    Case(Tq=1, D=40, far=4.0, large=1e30, scale=1e-30),
]


def name_of(case: Case) -> str:
    values = vars(case).items()
    told = [f"{n}={v}" for n, v in values if v != getattr(Case, n, None) and n != "config"]
    return ",".join(told).replace("torch.", "").replace(" ", "")


@pytest.mark.parametrize("case", [*SIZES, *FEW, *FEATURES, *FAR], ids=name_of)
def test_equals_the_reference(case: Case) -> None:
    assert_equals_reference(case)


# The interpreter would take ten seconds for the largest one.
QUICK = [case for case in additive_cases() if "large" not in case.name]


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, (fp32, bf16)[i % 2]) for i, case in enumerate(QUICK)],
    ids=lambda x: str(getattr(x, "name", x)),
)
def test_every_case_of_the_op(case: OpCase, dtype: torch.dtype) -> None:
    """What the tests on a GPU run, with the gradients of all results."""
    inputs = case.tensors(dtype)
    (_, args), (_, derivative) = case.raw(inputs)
    weighted = args[-1]
    with interpreted(), poisoned_memory():
        o, w, lse = kernels.additive_attention(*args, config=LARGE)
        finite = lse.masked_fill(lse == -torch.inf, 0).to(dtype)
        results = (o, w, finite) if weighted else (o, finite)
        do, *dw, dlse = grads = cotangents(results, dtype)
        given = do, dw[0] if weighted else None, dlse.float(), o, lse
        derived = kernels.additive_attention_backward(*given, *derivative[5:], config=LARGE)
    derived = [d for d, t in zip(derived, (*args[:4], args[5])) if t is not None]
    # With five keys, 4 runs of the reference find but half of the error that 8 or more find.
    assert_matches_reference(case, named(results, derived), inputs, grads, dtype, count=12)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    data=st.data(),
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 20), st.integers(1, 40)),
    widths=st.tuples(st.integers(1, 20), st.integers(1, 40)),
    chosen=st.sets(st.sampled_from(["lens", "mask", "bias", "weights", "far"])),
    scale=st.sampled_from([1.0, -0.3]),
    splits=st.integers(1, 3),
    tanh=st.sampled_from(["shared", "single"]),
    dtype=st.sampled_from([fp32, bf16, fp16]),
)
def test_any_company_of_features(
    data, sizes, widths, chosen, scale, splits, tanh, dtype
) -> None:  # fmt: skip
    def shape() -> Shape:
        keep = data.draw(st.tuples(*[st.booleans()] * 3))
        b, i, j = (n if kept else 1 for n, kept in zip(sizes, keep))
        return b, i, j

    lens = st.lists(st.integers(0, sizes[2]), min_size=sizes[0], max_size=sizes[0])
    case = Case(
        *(*sizes, *widths, dtype),
        lens=tuple(data.draw(lens)) if "lens" in chosen else None,
        mask=shape() if "mask" in chosen else None,
        bias=shape() if "bias" in chosen else None,
        scale=scale,
        weights="weights" in chosen,
        # Without it a bias that all keys share, and whatever a single key is asked for, have a
        # gradient of 0, of which rounding is all that can be compared.
        dlse=True,
        far=6.0 if "far" in chosen else 1.0,
        splits=splits,
        config=dataclasses.replace(LARGE, tanh=tanh),
    )
    torch.manual_seed(0)
    assert_equals_reference(case)


# ---- memory -------------------------------------------------------------------------------


def test_any_strides_and_offsets_of_64_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns that are not neighbours, gradients and masks that are expanded."""
    case = Case(Tq=18, mask=(2, 1, 21), bias=(1, 18, 21), weights=True, lens=LENS)
    t = case.tensors()
    t["query"] = t["query"].mT.contiguous().mT
    t["key"] = t["key"].transpose(0, 1).contiguous().transpose(0, 1)
    t["value"] = torch.stack([t["value"], t["value"] * torch.nan], -1)[..., 0]
    t["v"] = torch.stack([t["v"], t["v"] * torch.nan], -1)[:, 0]
    t["bias"] = t["bias"].mT.contiguous().mT
    t["mask"] = t["mask"][:, :1].expand(2, 18, 21)
    t["do"] = t["do"][:, :1].expand(2, 18, 24)
    t["dlse"] = t["dlse"][:1].expand(2, 18)
    t["dweights"] = t["dweights"].mT.contiguous().mT
    t["k_lens"] = torch.stack([t["k_lens"], t["k_lens"] - 7], -1)[:, 0]
    assert_equals_reference(case, t)
    monkeypatch.setattr(Arguments, "needs_int64", lambda *_, **__: True)
    assert_equals_reference(case, t)
    few = dataclasses.replace(case, Tq=2, mask=None, bias=None)
    t |= {name: t[name][:, :2] for name in ("query", "do", "dlse", "dweights")}
    assert_equals_reference(few, t | {"mask": None, "bias": None})


def test_64_bits_are_used_where_32_would_not_do() -> None:
    def wide(x: Tensor, **named: Tensor) -> bool:
        given = dict.fromkeys(("mask", "bias", "k_lens")) | named
        return check("op", x, x, x, x[0, 0], *given.values(), 1.0).needs_int64()

    long = torch.empty(1, 2**16, 8, device="meta")
    assert not wide(long)
    assert wide(long.as_strided(long.shape, (1, 2**15, 1)))
    mask = torch.empty(1, 2**16, 2**16, dtype=torch.bool, device="meta")
    assert wide(long, mask=mask)
    assert not wide(long, mask=mask[:, :1])
    # Offsets of the batch always have 64 bits.
    assert not wide(torch.empty(2**14, 2**10, 256, device="meta"))


@pytest.mark.parametrize("Tq", [2, 9])
def test_nan_stays_in_its_own_row_and_is_seen(Tq: int) -> None:
    case = Case(Tq=Tq, D=8, dlse=False)
    t = case.tensors()
    t["query"][0, 1, 3] = torch.nan
    got = by_kernels(t, case)
    for name, width in {"o": case.Dv, "lse": 1, "dquery": 8}.items():
        assert got[name][0, 1].isnan().all()
        assert got[name].isnan().sum() == width, name
    assert got["dkey"][0].isnan().all()
    assert not got["dkey"][1].isnan().any()


@pytest.mark.parametrize("Tq", [1, 9])
def test_what_is_excluded_gives_nothing_even_where_it_is_nan(Tq: int) -> None:
    case = Case(Tq=Tq, mask=(2, Tq, 21), dlse=True, weights=True)
    t, i = case.tensors(), Tq // 3
    t["mask"][..., 5] = t["mask"][0, i] = False
    t["key"][:, 5, 2] = t["query"][0, i, 1] = torch.nan
    t["do"][0, i] = t["dlse"][0, i] = t["dweights"][0, i] = t["dweights"][..., 5] = torch.nan
    clean = {
        n: x.nan_to_num(0.25) if x.is_floating_point() else x for n, x in t.items() if x is not None
    }
    got, expected = by_kernels(t, case), by_kernels(t | clean, case)
    for name, result in got.items():
        torch.testing.assert_close(result, expected[name], msg=lambda m, name=name: f"{name}: {m}")


def test_every_order_of_programs_gives_the_same_bits() -> None:
    case = Case(D=8, bias=(1, 1, 21), weights=True, config=SMALL)
    t = case.tensors()
    first, second = (by_kernels(t, case, seed) for seed in (1, 2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("Tq", [1, 9])
def test_only_the_gradients_that_are_needed(Tq: int) -> None:
    case = Case(Tq=Tq, D=8, bias=(1, 1, 21))
    t = case.tensors()
    everything = by_kernels(t, case)
    args = case.arguments(t)
    for only in range(5):
        needs = [i == only for i in range(5)]
        with interpreted(), poisoned_memory():
            o, _, lse = kernels.additive_attention(*args, False, config=LARGE)
            grads = kernels.additive_attention_backward(
                t["do"], None, t["dlse"], o, lse, *args, *needs, config=LARGE
            )
        for name, grad, needed in zip(GRADIENTS, grads, needs):
            assert torch.equal(grad, everything[name]) if needed else grad.shape == (0,)


# ---- tanh ---------------------------------------------------------------------------------


def test_exponentials_of_tokens() -> None:
    """Within 1.1 * 2^-23, as far as the kernels take them."""
    x = torch.linspace(-43, 43, 4001).view(1, -1, 1)
    with interpreted():
        tokens = tokens_of(x, None, 16, True, "shared")
    exact = (2 * x.double()).exp()
    error = (tokens.plain[:, :4001, :1] / exact - 1).abs().max()
    assert error < 1.1 * torch.finfo(fp32).eps
    assert torch.equal(tokens.turned.mT, tokens.plain)
    assert torch.equal(tokens.reach[0, :4001], x[0, :, 0].abs())
    assert (tokens.plain[..., 1:] == 1).all()


def test_tokens_beyond_the_length_are_not_read() -> None:
    """What is there instead is harmless: the exponential of 0."""
    x = torch.randn(2, 20, 3)
    x[0, 13:] = x[1] = torch.nan
    with interpreted(), poisoned_memory():
        tokens = tokens_of(x, torch.tensor([13, -1], dtype=torch.int32), 16, True, "shared")
    assert (tokens.plain[0, 13:] == 1).all()
    assert (tokens.plain[1] == 1).all()
    assert not tokens.reach[0, 13:].any()
    assert tokens.reach.isfinite().all()


@triton.jit
def _hardware(x):
    """What tests put in the place of the instruction tanh.approx."""
    return additive_tile.tanh(x, True)


@triton.jit
def _rcp(x):
    """What tests put in the place of the instruction rcp.approx."""
    return 1.0 / x


@pytest.fixture
def instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python in the place of assembler, which the interpreter does not know."""
    monkeypatch.setattr(additive_tile, "tanh_ptx", _hardware)
    monkeypatch.setattr(additive_tile, "rcp_ptx", _rcp)


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("tanh", ["shared", "single", "hardware", "plain"])
def test_error_of_one_tanh(tanh: str) -> None:
    """A score of one element is tanh itself: within 4 roundings of 1, wherever it goes."""
    query = torch.linspace(-10, 10, 128).view(1, -1, 1) * (3 if tanh == "plain" else 1)
    config = dataclasses.replace(LARGE, ptx=True, tanh="shared" if tanh == "plain" else tanh)
    for k in (-9.9, -0.1, 0.0, 3.0):
        key, one = torch.full((1, 1, 1), k), torch.ones(1, 1, 1)
        args = query, key, one, one[0, 0], None, None, None, 1.0, False
        with interpreted():
            _, _, lse = kernels.additive_attention(*args, config=config)
        exact = (query.double() + key).tanh()[..., 0]
        assert (lse - exact).abs().max() < 4 * torch.finfo(fp32).eps


def test_error_of_one_tanh_of_few_queries() -> None:
    """The same of the kernel for up to four of them; near 0 within 4 roundings of tanh itself."""
    query, one = torch.tensor([-9.9, -0.1, 0.0, 3.0]).view(1, -1, 1), torch.ones(1, 1, 1)
    key = torch.cat([torch.linspace(-30, 30, 100), torch.logspace(-30, 0, 30)]).view(1, -1, 1)
    call = check("op", query, key, key, one[0, 0], None, None, None, 1.0)
    scores = torch.empty(4, 130)
    with interpreted():
        attend_rows(call, torch.empty(1, 4, 1), torch.empty(1, 4), scores, LARGE, 1)
    exact = (query.double() + key.mT.double()).tanh()[0]
    # The kernel's scores are in base 2.
    error = (scores * math.log(2) - exact).abs()
    assert error.max() < 4 * torch.finfo(fp32).eps
    near = (query + key.mT)[0].abs() < 0.25
    assert (error <= 4 * torch.finfo(fp32).eps * exact.abs())[near & (query[0] == 0)].all()


@pytest.mark.parametrize("tanh", ["shared", "single", "few"])
def test_error_bounds_of_the_instructions(tanh: str) -> None:
    """In numpy, of reciprocals a unit off, and exponentials 1.1 * 2^-23, with few queries 2^-22."""
    generator = np.random.default_rng(0)
    x, y = generator.uniform(-10, 10, (2, 10**6)).astype(np.float32)
    wrong = 1 + generator.choice([-1, 1], (2, 10**6)) * 1.1 * 2.0**-23
    exps = (np.exp(2 * np.stack([x, y]).astype(np.float64)) * wrong).astype(np.float32)
    one = np.float32(1)
    a = exps[0] * exps[1] + one

    def reciprocal(t: np.ndarray) -> np.ndarray:
        exact = (1 / t.astype(np.float64)).astype(np.float32)
        return np.nextafter(exact, np.float32(generator.choice([0, np.inf])))

    exact = np.tanh(x.astype(np.float64) + y)
    if tanh == "few":
        power = np.abs(x + y) * np.float32(-2 / math.log(2))
        wrong = 1 + generator.choice([-1, 1], 10**6) * 2.0**-22
        e = (np.exp2(power.astype(np.float64)) * wrong).astype(np.float32)
        b = one + np.roll(e, 1)
        error = (one - e) * (b * reciprocal((one + e) * b)) - np.abs(exact)
    else:
        b = np.roll(a, 1)
        r = reciprocal(a) if tanh == "single" else reciprocal(a * b) * b
        error = -2 * (r - np.float32(0.5)) - exact
    assert np.abs(error).max() < {"shared": 6e-7, "single": 4e-7, "few": 4e-7}[tanh]


# ---- dispatch -----------------------------------------------------------------------------


def test_the_ops_take_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is registered for CUDA, on tensors of the CPU: the results are the kernels'."""
    for op in ("additive_attention", "additive_attention_backward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"seqkern::{op}", "CUDA")
    monkeypatch.setattr(ops, "choose", lambda _: Choice("triton", ""))
    monkeypatch.setattr("seqkern.kernels.additive_arguments.choose", lambda *_: SMALL)
    case = Case(Tq=5, D=8, weights=True, lens=LENS)
    t = case.tensors()
    expected = by_kernels(t, dataclasses.replace(case, config=SMALL))
    with interpreted(), poisoned_memory():
        results = computed(ops._cuda, lambda *a: ops._cuda_backward(*a), t, case)
    assert all(torch.equal(results[name], expected[name]) for name in expected)
