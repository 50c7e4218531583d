"""The attention kernels on the CPU: every feature, run by the interpreter, held to the reference.

Fresh memory holds NaN, and so does everything that a kernel has no business to read.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton", reason="the kernels are Triton's")

from seqkern.kernels.attention_arguments import Arguments, check
from seqkern.kernels.attention_backward import attention_backward
from seqkern.kernels.attention_forward import attention_forward
from seqkern.kernels.attention_live import live_tiles
from seqkern.kernels.attention_table import Config

from seqkern.reference import attention as reference
from seqkern.reference import packed as packing
from seqkern.testing.tolerance import assert_within_budget, neighbours
from tests.offline.interpreter import interpreted, poisoned_memory

fp32, fp16, bf16 = torch.float32, torch.float16, torch.bfloat16
Shape = tuple[int, int, int, int]
BIAS, SINKS = 4, 8
SQUARE = Config(64, 64)
GRADIENTS = "dq", "dk", "dv", "dbias", "dsinks"
ORDER = (
    *("q", "k", "v", "mask", "bias", "q_lens", "k_lens", "alibi_slopes", "sinks", "seed"),
    *("cu_q", "cu_k"),
)


@dataclass(frozen=True)
class Case:
    """Sizes and features of one call; mask and bias are given by their shapes."""

    B: int = 2
    H: int = 4
    Hkv: int = 2
    Tq: int = 97
    Tk: int = 129
    D: int = 40
    Dv: int = 40
    dtype: torch.dtype = fp32
    lens: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    packed: bool = False
    mask: Shape | None = None
    bias: Shape | None = None
    alibi: str = ""
    sinks: bool = False
    causal: str | None = None
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    dropout_p: float = 0.0
    dlse: bool = True
    config: Config = SQUARE

    @property
    def rows(self) -> tuple[int, int]:
        """Of the packed tensors: three more than the sequences have."""
        assert self.lens is not None
        return sum(self.lens[0]) + 3, sum(self.lens[1]) + 3

    def tensors(self) -> dict[str, Any]:
        """The op's tensors by name, with NaN in every place that no query and no key has."""
        heads = {"q": self.H, "k": self.Hkv, "v": self.Hkv, "do": self.H}
        widths = {"q": self.D, "k": self.D, "v": self.Dv, "do": self.Dv}
        made: dict[str, Any] = {}
        for name, h in heads.items():
            side = name in ("k", "v")
            T = (self.Tq, self.Tk)[side]
            shape = (self.rows[side], h) if self.packed else (self.B, h, T)
            made[name] = torch.randn(*shape, widths[name]).to(self.dtype)
            if self.packed:
                made[name][-3:] = torch.nan
            elif self.lens is not None:
                for b, length in enumerate(self.lens[side]):
                    made[name][b, :, length:] = torch.nan
        rows = (self.H, self.rows[0]) if self.packed else (self.B, self.H, self.Tq)
        made["dlse"] = torch.randn(rows) if self.dlse else None
        if self.dlse and self.lens is not None and not self.packed:
            for b, length in enumerate(self.lens[0]):
                made["dlse"][b, :, length:] = torch.nan
        made["mask"] = torch.rand(self.mask) > 0.4 if self.mask else None
        made["bias"] = torch.randn(self.bias).to(self.dtype) if self.bias else None
        made["sinks"] = torch.randn(self.H).to(self.dtype) if self.sinks else None
        slopes = {"h": (self.H,), "bh": (self.B, self.H)}
        made["slopes"] = torch.rand(slopes[self.alibi]) if self.alibi else None
        made["seed"] = torch.tensor([-(2**41) - 12345]) if self.dropout_p else None
        return made

    def arguments(self, t: dict[str, Any]) -> tuple[Any, ...]:
        """The op's arguments in their order."""
        lens: list[Tensor | None] = [None] * 4
        if self.lens is not None:
            ends = [torch.tensor([0, *n]).cumsum(0).int() for n in self.lens]
            lengths = [torch.tensor(n, dtype=torch.int32) for n in self.lens]
            lens = [None, None, *ends] if self.packed else [*lengths, None, None]
        tensors = (t["q"], t["k"], t["v"], t["mask"], t["bias"], *lens[:2], t["slopes"])
        rule = (self.causal, *self.window, self.softcap, self.dropout_p, self.D**-0.5)
        return (*tensors, t["sinks"], t["seed"], *lens[2:], *rule, self.Tq, self.Tk, True)


def computed(attend, derive, t: dict[str, Any], case: Case, **config) -> dict[str, Tensor]:
    """Results and gradients by name, of the kernels or of the reference."""
    args = case.arguments(t)
    o, lse = attend(*args, **config)
    grads = derive(t["do"], t["dlse"], o, lse, *args, True, True, True, **config)
    there = [True, True, True, t["bias"] is not None, t["sinks"] is not None]
    results = {n: g for n, g, is_there in zip(GRADIENTS, grads, there) if is_there}
    return {"o": o, "lse": lse, **results}


def by_kernels(t: dict[str, Any], case: Case, seed: int = 0) -> dict[str, Tensor]:
    with interpreted(seed=seed), poisoned_memory():
        return computed(attention_forward, attention_backward, t, case, config=case.config)


def by_reference(t: dict[str, Any], case: Case) -> dict[str, Tensor]:
    return computed(reference.attention, reference.attention_backward, t, case)


def assert_equals_reference(case: Case, t: dict[str, Any] | None = None) -> None:
    """Results and gradients within the budget that float64 gives."""
    t = t or case.tensors()
    moving = [n for n, x in t.items() if x is not None and x.is_floating_point() and n != "slopes"]
    actual, exact = by_kernels(t, case), by_reference(t | doubled(t), case)
    empty = exact["lse"] == -torch.inf
    assert torch.equal(actual["lse"] == -torch.inf, empty)
    moved = [t | dict(zip(moving, near)) for near in neighbours([t[n] for n in moving])]
    runs = [by_reference(tensors, case) for tensors in moved]
    for results in (actual, exact, *runs):
        results["lse"] = results["lse"].masked_fill(empty, 0)
    for dtype in {result.dtype for result in actual.values()}:

        def of_dtype(results: dict[str, Tensor], dtype=dtype) -> dict[str, Tensor]:
            return {n: results[n] for n, result in actual.items() if result.dtype == dtype}

        assert_within_budget(*map(of_dtype, (actual, exact)), [*map(of_dtype, runs)], dtype)


def doubled(t: dict[str, Any]) -> dict[str, Any]:
    """The floating tensors in float64."""
    floating = {n: x for n, x in t.items() if x is not None and x.is_floating_point()}
    return {n: x.double() for n, x in floating.items()}


# ---- sizes and dtypes ---------------------------------------------------------------------

LENS = (70, 0), (129, 33)
PACKED = (33, 0, 17, 50), (40, 7, 0, 63)
DESCRIBED = Config(64, 64, descriptors=True)


def packed(**features) -> Case:
    return Case(B=4, Tq=50, Tk=63, lens=PACKED, packed=True, **features)


SIZES = [
    Case(Tq=1, Tk=129, D=8, Dv=8),
    Case(Tq=17, Tk=1, D=1, Dv=3),
    Case(Tq=63, Tk=97, D=64, Dv=64, dtype=bf16),
    Case(Tq=97, Tk=63, D=72, Dv=72, dtype=fp16),
    Case(Tq=129, Tk=17, D=96, Dv=40, dtype=bf16, H=2),
    Case(Tq=17, Tk=97, D=128, Dv=128, dtype=fp16, causal="bottom_right"),
    Case(Tq=63, Tk=63, D=160, Dv=64, dtype=bf16, causal="top_left"),
    Case(Tq=33, Tk=65, D=256, Dv=256, H=2, Hkv=1, causal="bottom_right"),
    Case(B=1, Tq=33, Tk=33, D=300, Dv=512, H=1, Hkv=1, dtype=bf16, config=Config(32, 32)),
    Case(B=1, H=6, Hkv=1, Tq=65, Tk=65, config=Config(32, 64), causal="bottom_right"),
    Case(Hkv=4, Tq=129, Tk=129, config=Config(128, 32), causal="bottom_right", dlse=False),
    Case(Tq=129, Tk=97, config=Config(32, 128), causal="top_left"),
    Case(Tq=0, Tk=5),
    Case(Tq=5, Tk=0, sinks=True),
    Case(B=0),
    Case(config=Config(64, 64, split=True), causal="bottom_right", dropout_p=0.2, softcap=3.0),
]

FEATURES = [
    Case(causal="bottom_right", lens=LENS),
    Case(causal="top_left", lens=LENS, window=(9, -1)),
    Case(Tq=129, Tk=97, causal="bottom_right", sinks=True),
    Case(window=(20, 5)),
    Case(lens=((97, 60), (100, 33))),
    Case(window=(-1, 3), lens=((97, 50), (60, 129)), dtype=bf16),
    Case(window=(0, 0), Tq=97, Tk=97),
    Case(window=(70, 1000), causal="bottom_right"),
    Case(lens=LENS, sinks=True, alibi="bh"),
    packed(D=64, Dv=72),
    packed(causal="bottom_right", Hkv=1, sinks=True, dropout_p=0.4, dtype=bf16),
    packed(causal="top_left", window=(5, 0), alibi="h", softcap=2.0),
    packed(bias=(4, 1, 50, 1), mask=(1, 4, 50, 63)),
    Case(softcap=0.7, causal="bottom_right"),
    Case(softcap=50.0, dtype=fp16, alibi="h"),
    Case(bias=(2, 4, 97, 129)),
    Case(bias=(1, 4, 97, 129), dtype=bf16, causal="bottom_right", lens=LENS),
    Case(bias=(2, 1, 1, 129), softcap=2.0),
    Case(bias=(1, 4, 97, 1), window=(30, 30)),
    Case(bias=(1, 1, 1, 1), dropout_p=0.5),
    Case(mask=(2, 4, 97, 129)),
    Case(mask=(1, 1, 97, 129), causal="top_left", lens=LENS, dtype=bf16),
    Case(mask=(2, 1, 1, 129), bias=(1, 1, 97, 129)),
    Case(mask=(1, 4, 97, 1), Hkv=1),
    Case(mask=(2, 4, 1, 1), sinks=True),
    Case(dropout_p=0.1, dtype=fp16),
    Case(dropout_p=0.9, bias=(1, 4, 1, 129)),
]

DESCRIPTORS = [
    Case(config=DESCRIBED, D=64, Dv=128, lens=LENS, causal="bottom_right", dtype=bf16),
    Case(config=DESCRIBED, D=72, Dv=40, dtype=fp16, window=(40, 40)),
    Case(config=DESCRIBED, D=8, Dv=4, Tk=65),
    dataclasses.replace(packed(D=32, Dv=64, dtype=bf16, mask=(4, 1, 50, 63)), config=DESCRIBED),
]


def name_of(case: Case) -> str:
    values = vars(case).items()
    told = [f"{n}={v}" for n, v in values if v != getattr(Case, n, None) and n != "config"]
    return ",".join(told).replace("torch.", "").replace(" ", "")


@pytest.mark.parametrize("case", [*SIZES, *FEATURES, *DESCRIPTORS], ids=name_of)
def test_equals_the_reference(case: Case) -> None:
    assert_equals_reference(case)


@pytest.mark.parametrize("config", [Config(32, 64), DESCRIBED], ids=["pointers", "descriptors"])
def test_offsets_of_64_bits(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers when every offset is computed in 64 bits."""
    monkeypatch.setattr(Arguments, "needs_int64", lambda *_, **__: True)
    features = {"bias": (1, 4, 97, 129), "mask": (2, 1, 97, 129), "lens": LENS}
    assert_equals_reference(Case(D=64, Dv=64, config=config, **features))


@settings(max_examples=12, deadline=None)
@given(
    data=st.data(),
    sizes=st.tuples(st.integers(1, 3), st.sampled_from([(4, 2), (3, 1), (2, 2)])),
    lengths=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    widths=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    causal=st.sampled_from([None, "top_left", "bottom_right"]),
    window=st.tuples(*[st.sampled_from([-1, 0, 3, 17])] * 2),
    chosen=st.sets(st.sampled_from(["lens", "mask", "bias", "alibi", "sinks", "softcap", "drop"])),
    dtype=st.sampled_from([fp32, bf16, fp16]),
)
def test_any_company_of_features(
    data, sizes, lengths, widths, causal, window, chosen, dtype
) -> None:
    B, (H, Hkv) = sizes
    Tq, Tk = lengths
    full = B, H, Tq, Tk

    def shape() -> Shape:
        keep = data.draw(st.tuples(*[st.booleans()] * 4))
        b, h, i, j = (n if kept else 1 for n, kept in zip(full, keep))
        return b, h, i, j

    def drawn(most: int) -> tuple[int, ...]:
        return tuple(data.draw(st.lists(st.integers(0, most), min_size=B, max_size=B)))

    case = Case(
        *(B, H, Hkv, Tq, Tk, *widths, dtype),
        lens=(drawn(Tq), drawn(Tk)) if "lens" in chosen else None,
        mask=shape() if "mask" in chosen else None,
        bias=shape() if "bias" in chosen else None,
        alibi="h" if "alibi" in chosen else "",
        sinks="sinks" in chosen,
        causal=causal,
        window=window,
        softcap=4.0 if "softcap" in chosen else 0.0,
        dropout_p=0.3 if "drop" in chosen else 0.0,
        config=Config(16, 32),
    )
    torch.manual_seed(0)
    assert_equals_reference(case)


# ---- memory -------------------------------------------------------------------------------


def test_any_strides() -> None:
    """Heads behind lengths, columns that are not neighbours, gradients that are expanded."""
    case = Case(Tq=33, Tk=65, bias=(1, 4, 33, 65), mask=(2, 1, 33, 65))
    t = case.tensors()
    t["q"] = t["q"].transpose(1, 2).contiguous().transpose(1, 2)
    t["k"] = t["k"].mT.contiguous().mT
    t["v"] = torch.stack([t["v"], t["v"] * torch.nan], -1)[..., 0]
    t["bias"] = t["bias"].mT.contiguous().mT
    t["mask"] = t["mask"][:, :, :1].expand(2, 4, 33, 65)
    t["do"] = t["do"][:, :, :1].expand(2, 4, 33, 40)
    t["dlse"] = t["dlse"][:, :1].expand(2, 4, 33)
    assert_equals_reference(case, t)


@pytest.mark.parametrize("is_packed", [False, True])
def test_lengths_bounds_and_sinks_of_any_strides(is_packed: bool) -> None:
    """A column of a table gives the bits that a copy of it gives."""
    lens = (20, 7), (5, 24)
    small = {"Tq": 20, "Tk": 24, "D": 8, "Dv": 8, "sinks": True, "config": Config(16, 16)}
    case = Case(lens=lens, packed=is_packed, **small)
    t = case.tensors()
    args = list(case.arguments(t))
    results = []
    for _ in range(2):
        with interpreted(), poisoned_memory():
            o, lse = attention_forward(*args, config=case.config)
            rest = o, lse, *args, True, True, False
            grads = attention_backward(t["do"], None, *rest, config=case.config)
        results.append((o, lse, *grads))
        for i, name in enumerate(ORDER):
            if name in ("q_lens", "k_lens", "sinks", "cu_q", "cu_k") and args[i] is not None:
                args[i] = torch.stack([args[i], args[i] + 3], -1)[..., 0]
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


def test_results_have_the_order_of_the_inputs_in_memory() -> None:
    """So that heads which were split off a projection are joined again without a copy."""
    case = Case(Tq=33, Tk=65)
    args = case.arguments(case.tensors())
    q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in args[:3])
    with interpreted():
        o, lse = attention_forward(q, k, v, *args[3:], config=SQUARE)
        grads = attention_backward(
            o, None, o, lse, q, k, v, *args[3:], True, True, False, config=SQUARE
        )
    for t in (o, *grads[:3]):
        assert t.transpose(1, 2).is_contiguous()
        assert not t.is_contiguous()


def test_nan_stays_in_its_own_row_and_is_seen() -> None:
    case = Case(Tq=33, Tk=65)
    args = case.arguments(case.tensors())
    args[0][0, 1, 3] = torch.nan
    with interpreted():
        o, lse = attention_forward(*args, config=SQUARE)
    assert o[0, 1, 3].isnan().all()
    assert lse[0, 1, 3].isnan()
    assert o.isnan().sum() == case.Dv
    assert lse.isnan().sum() == 1


def test_nan_of_a_key_is_seen_in_all_gradients_of_its_head() -> None:
    """Every query has a weight for it, so that all weights of the queries are NaN."""
    case = Case(Tq=17, Tk=20, config=Config(32, 32))
    t = case.tensors()
    t["k"][0, 1, 3, 5] = torch.nan
    got = by_kernels(t, case)
    for name, heads in {"dq": slice(2, 4), "dk": slice(1, 2), "dv": slice(1, 2)}.items():
        seen = got[name].isnan()
        assert seen[0, heads].all()
        assert seen.sum() == seen[0, heads].numel()


def test_every_order_of_programs_gives_the_same_bits() -> None:
    case = Case(causal="bottom_right", bias=(1, 1, 40, 70), Tq=40, Tk=70, config=Config(32, 32))
    t = case.tensors()
    first, second = (by_kernels(t, case, seed) for seed in (1, 2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_sequences_packed_or_padded_give_the_same_numbers() -> None:
    """Dropout too: it counts positions within a sequence."""
    one = packed(D=32, Dv=32, causal="bottom_right", dropout_p=0.3)
    t = one.tensors()
    two = dataclasses.replace(one, packed=False)
    ends = [torch.tensor([0, *n]).cumsum(0) for n in PACKED]
    padded = t | {n: packing.pad(t[n], ends[n in "kv"], T) for n, T in zip("qkv", (50, 63, 63))}
    padded["do"] = packing.pad(t["do"], ends[0], 50)
    padded["dlse"] = packing.pad(t["dlse"].T[..., None], ends[0], 50)[..., 0]
    ours, theirs = by_kernels(t, one), by_kernels(padded, two)
    for name, end in {"o": 0, "dq": 0, "dk": 1, "dv": 1}.items():
        unpadded = packing.unpad(theirs[name], ends[end], one.rows[end])
        torch.testing.assert_close(ours[name], unpadded)


def test_gradients_of_an_empty_rows_lse_are_not_read() -> None:
    case = Case(mask=(2, 1, 97, 129), lens=((97, 60), (0, 100)), sinks=True)
    t = case.tensors()
    t["sinks"][1:] = -torch.inf
    t["mask"][:, :, 5] = False
    t["dlse"][0, 1:] = t["dlse"][1, 1:, 5] = torch.nan
    assert_equals_reference(case, t)


def test_tiles_that_the_mask_leaves_out_are_not_read() -> None:
    case = Case(H=2, Tq=64, Tk=128, mask=(2, 2, 64, 128), config=Config(32, 32), dlse=False)
    t = case.tensors()
    t["mask"][..., 32:64] = False
    t["mask"][1, 1, :32] = False
    clean = by_kernels(t, case)
    for name in ("k", "v"):
        t[name][:, :, 32:64] = torch.nan
    got = by_kernels(t, case)
    assert all(torch.equal(got[name], clean[name]) for name in ("o", "lse", "dq"))
    with interpreted(), poisoned_memory():
        call = check("attention", *case.arguments(t)[:-1])
        lists = live_tiles(call, 32, 32, transposed=False)
    assert lists is not None
    assert lists.ptr[0, 0].tolist()[0][:4] == [3, 0, 2, 3]
    assert lists.ptr[1, 1, :, 0].tolist() == [0, 3]
