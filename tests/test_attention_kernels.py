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

from seqkern.kernels import attention_arguments
from seqkern.kernels.attention_arguments import Arguments, check
from seqkern.kernels.attention_backward import attention_backward
from seqkern.kernels.attention_forward import attention_forward
from seqkern.kernels.attention_live import live_tiles
from seqkern.kernels.attention_table import Config, choose

from seqkern.reference import attention as reference
from seqkern.reference import packed as packing
from seqkern.testing.tolerance import assert_within_budget, neighbours
from tests.offline.interpreter import interpreted, poisoned_memory

fp32, fp16, bf16 = torch.float32, torch.float16, torch.bfloat16
Shape = tuple[int, int, int, int]
BIAS, SINKS = 4, 8
SQUARE = Config(64, 64)
GRADIENTS = "dq", "dk", "dv", "dbias", "dsinks"


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
    monkeypatch.setattr(Arguments, "needs_int64", lambda *_: True)
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


def test_64_bits_are_used_where_32_would_not_do() -> None:
    def call(q: Tensor, **named: Tensor) -> Arguments:
        given: list[Any] = [q, q, q, *[None] * 9, None, -1, -1, 0.0, 0.0, 1.0, *[q.size(2)] * 2]
        given[3] = named.get("mask")
        return check("attention", *given)

    long = torch.empty(1, 1, 2**16, 8, device="meta")
    assert not call(long).needs_int64()
    assert call(long.as_strided(long.shape, (1, 1, 2**15, 1))).needs_int64()
    mask = torch.empty(1, 1, 2**16, 2**16, dtype=torch.bool, device="meta")
    assert call(long, mask=mask).needs_int64()
    assert not call(long, mask=mask[:, :, :1]).needs_int64()
    # Offsets of batches and heads always have 64 bits.
    assert not call(torch.empty(2**10, 2**10, 2**10, 64, device="meta")).needs_int64()


def test_fp32_products_have_the_precision_that_torch_is_set_to() -> None:
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert attention_arguments.precision(fp32) == "tf32"
        assert attention_arguments.precision(bf16) == "ieee"
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        assert attention_arguments.precision(fp32) == "ieee"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


# ---- refusals -----------------------------------------------------------------------------

q4, k4 = torch.zeros(2, 4, 8, 16), torch.zeros(2, 2, 9, 16)
SEED, CU = torch.zeros(1, dtype=torch.int64), torch.zeros(3, dtype=torch.int32)
ORDER = (
    *("q", "k", "v", "mask", "bias", "q_lens", "k_lens", "alibi_slopes", "sinks", "seed"),
    *("cu_q", "cu_k", "causal", "window_left", "window_right", "softcap", "dropout_p", "scale"),
    *("max_q", "max_k"),
)
GOOD = dict.fromkeys(ORDER) | {
    **{"q": q4, "k": k4, "v": k4, "window_left": -1, "window_right": -1},
    **{"softcap": 0.0, "dropout_p": 0.0, "scale": 1.0, "max_q": 8, "max_k": 9},
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": q4.double()}, r"q must be fp16, bf16 or fp32 .*float64"),
        ({"q": q4[0]}, r"q must be \(B, H, T, D\), got \(4, 8, 16\)"),
        ({"k": k4.half()}, "k must be torch.float32 on cpu like q, got torch.float16"),
        ({"k": k4[..., :8]}, r"k must be \(B, Hkv, Tk, D\) = \(2, 2, 9, 16\)"),
        ({"v": k4[:, :1]}, r"v must be \(B, Hkv, Tk, Dv\) = \(2, 2, 9, 16\)"),
        ({"q": torch.zeros(2, 3, 8, 16)}, "divides the 3 of q, got 2"),
        ({"q": torch.zeros(2, 4, 8, 513)}, r"head dimension in \[1, 512\]"),
        ({"max_q": 7}, r"max_q, max_k must be \(8, 9\)"),
        ({"mask": torch.zeros(2, 1, 8, 9)}, "mask must be torch.bool"),
        ({"mask": torch.zeros(2, 8, 9, dtype=torch.bool)}, "mask must be .* each 1 or full"),
        ({"bias": torch.zeros(1, 2, 8, 9)}, r"bias must be \(B, H, Tq, Tk\) = \(2, 4, 8, 9\)"),
        ({"q_lens": torch.zeros(2)}, r"q_lens must be \(2,\) of torch.int32"),
        ({"alibi_slopes": torch.zeros(2)}, r"alibi_slopes must be \(4,\) or \(2, 4\)"),
        ({"sinks": torch.zeros(1)}, r"sinks must be \(4,\)"),
        ({"seed": SEED}, "seed must be None for dropout_p=0"),
        ({"dropout_p": 0.5}, "seed must be a tensor for dropout_p=0.5, got None"),
        ({"dropout_p": 1.0, "seed": SEED}, r"dropout_p must be in \[0, 1\), got 1.0"),
        ({"causal": "left"}, "causal must be .*, got 'left'"),
        ({"softcap": -1.0}, "softcap must be"),
        ({"scale": float("nan")}, "scale must be finite"),
        ({"q": q4[0], "k": k4[0], "v": k4[0], "cu_q": CU}, "cu_q and cu_k must be given together"),
        ({"cu_q": CU, "cu_k": CU}, r"q must be \(N, H, D\) with cu_q"),
    ],
)
def test_bad_arguments_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^attention: .*{message}"):
        attention_forward(*(GOOD | changes).values(), True, config=Config(16, 16))


def test_bad_gradients_are_refused_by_name() -> None:
    o, lse = torch.zeros(2, 4, 8, 16), torch.zeros(2, 4, 8)
    rest = *GOOD.values(), True, True, True, True
    wrong = {"do": (o[..., 1:], None, o, lse), "dlse": (o, lse[0], o, lse)}
    for name, first in wrong.items():
        with pytest.raises(ValueError, match=f"^attention_backward: {name} must be"):
            attention_backward(*first, *rest, config=Config(16, 16))
    with pytest.raises(TypeError, match="q must be a Tensor, got NoneType"):
        attention_forward(*(GOOD | {"q": None}).values(), True, config=Config(16, 16))


# ---- the table ----------------------------------------------------------------------------

TARGETS: list[tuple[str, int | str]] = [
    *(("cuda", arch) for arch in (80, 86, 89, 90, 100, 120)),
    ("hip", "gfx942"),
]


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_the_table_has_a_row_for_every_call(target: tuple[str, int | str]) -> None:
    for kernel in ("forward", "dkdv", "dq", "dbias"):
        for width in (1, 16, 33, 64, 65, 128, 160, 256, 257, 512):
            for dtype in (fp16, bf16, fp32):
                if dtype == fp32 and width > 256:
                    continue
                plain, costly = (
                    choose(kernel, width, dtype, costly=costly, target=target)
                    for costly in (False, True)
                )
                assert costly.block_m * costly.block_n <= plain.block_m * plain.block_n
                assert min(costly.block_m, costly.block_n) >= 16
                assert not plain.descriptors or target[1] in (90, 100)


def test_devices_that_triton_does_not_serve_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"compute capability 8.0 or later, got 7.5"):
        choose("forward", 64, fp16, target=("cuda", 75))
    for target in TARGETS:
        with pytest.raises(ValueError, match=r"dq kernel takes head dimensions up to 256 in .*32"):
            choose("dq", 300, fp32, target=target)
