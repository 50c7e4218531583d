"""Calls of the attention ops, with every feature, and what they must give."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from seqkern.kernels.attention_table import Config
from torch import Tensor

from seqkern.reference import attention as reference
from seqkern.testing.tolerance import assert_within_budget, neighbours

fp32, fp16, bf16 = torch.float32, torch.float16, torch.bfloat16
Shape = tuple[int, int, int, int]
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
            ends, lengths = ([n.to(t["q"].device) for n in those] for those in (ends, lengths))
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


def by_reference(t: dict[str, Any], case: Case) -> dict[str, Tensor]:
    return computed(reference.attention, reference.attention_backward, t, case)


def assert_right(case: Case, t: dict[str, Any], actual: dict[str, Tensor]) -> None:
    """What was computed from tensors of the CPU, within the budget that float64 gives."""
    moving = [n for n, x in t.items() if x is not None and x.is_floating_point() and n != "slopes"]
    exact = by_reference(t | doubled(t), case)
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
    replace(packed(D=32, Dv=64, dtype=bf16, mask=(4, 1, 50, 63)), config=DESCRIBED),
]


def name_of(case: Case) -> str:
    values = vars(case).items()
    told = [f"{n}={v}" for n, v in values if v != getattr(Case, n, None) and n != "config"]
    return ",".join(told).replace("torch.", "").replace(" ", "")
