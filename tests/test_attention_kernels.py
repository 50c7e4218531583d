"""The attention kernels on the CPU: every feature, run by the interpreter, held to the reference.

Fresh memory holds NaN, and so does everything that a kernel has no business to read.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton", reason="the kernels are Triton's")

from seqkern.kernels.attention_arguments import Arguments, check
from seqkern.kernels.attention_backward import attention_backward
from seqkern.kernels.attention_forward import attention_forward
from seqkern.kernels.attention_live import live_tiles
from seqkern.kernels.attention_table import Config

from seqkern.reference import packed as packing
from seqkern.reference.attention import live_elements
from tests.attention_cases import (
    DESCRIBED,
    DESCRIPTORS,
    FEATURES,
    LENS,
    PACKED,
    SIZES,
    SQUARE,
    Case,
    Shape,
    assert_right,
    bf16,
    computed,
    fp16,
    fp32,
    name_of,
    packed,
)
from tests.offline import builder
from tests.offline.interpreter import interpreted, poisoned_memory

ORDER = (
    *("q", "k", "v", "mask", "bias", "q_lens", "k_lens", "alibi_slopes", "sinks", "seed"),
    *("cu_q", "cu_k"),
)


def by_kernels(t: dict[str, Any], case: Case, seed: int = 0) -> dict[str, Tensor]:
    with interpreted(seed=seed), poisoned_memory():
        return computed(attention_forward, attention_backward, t, case, config=case.config)


def assert_equals_reference(case: Case, t: dict[str, Any] | None = None) -> None:
    t = t or case.tensors()
    assert_right(case, t, by_kernels(t, case))


# ---- sizes and dtypes ---------------------------------------------------------------------


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
    two = replace(one, packed=False)
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


SKIPPING = [
    Case(causal="top_left"),
    Case(causal="bottom_right"),
    Case(window=(20, 5)),
    Case(window=(0, -1), lens=LENS),
    Case(lens=LENS),
    packed(causal="bottom_right", window=(9, -1)),
]


@pytest.mark.parametrize("case", SKIPPING, ids=name_of)
def test_tiles_without_anything_alive_are_not_computed(case: Case, monkeypatch) -> None:
    """By the number of products: two a tile in the forward, three in dQ, four in dK and dV."""
    case = replace(case, H=2, Hkv=1, D=8, Dv=8, config=Config(32, 32))
    right, products = builder.Builder.create_dot, []

    def counted(*args: Any) -> Any:
        products.append(args)
        return right(*args)

    monkeypatch.setattr(builder.Builder, "create_dot", counted)
    by_kernels(case.tensors(), case)
    q, k = (torch.empty(case.B, case.H, T, 0) for T in (case.Tq, case.Tk))
    q_lens, k_lens = (None, None) if case.lens is None else map(torch.tensor, case.lens)
    live = live_elements(q, k, None, q_lens, k_lens, case.causal, *case.window)
    assert live is not None
    live = live.expand(case.B, case.H, case.Tq, case.Tk)
    live = F.pad(live, (0, -case.Tk % 32, 0, -case.Tq % 32))
    tiles = live.unflatten(3, (-1, 32)).unflatten(2, (-1, 32)).any(5).any(3)
    assert len(products) == 9 * tiles.sum().item()
    assert not tiles.all()
