"""Arguments of any layout, and wrong ones, into the raw attention ops: what they accept has the
values of the reference, and what they refuse they name, whatever comes (`make asan`)."""

import random
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from seqkern.ops import _attention_ops as ops
from seqkern.ops import decode
from seqkern.reference import attention as reference
from seqkern.reference import decode as cache_reference
from seqkern.testing import assert_within_budget, neighbours
from tests.fuzzing import relaid_tensor, single_tensor, spoilt_tensor

EXAMPLES = 80
WIDE = torch.float32, torch.float64
DTYPES = *WIDE, *WIDE, torch.bfloat16, torch.float16
fuzzed = settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
seeds = given(seed=st.integers(0, 2**32 - 1))


def size(r: random.Random, *sizes: int) -> int:
    """One of them, or seldom nothing at all."""
    return r.choice(sizes) if r.random() < 0.9 else 0


def rule_of(r: random.Random, plain: bool) -> list[Any]:
    """causal, window_left, window_right and softcap."""
    causal = r.choice([None, "top_left", "bottom_right"])
    softcap = 0.0 if plain else r.choice([0.0, 2.0])
    return [causal, r.choice([-1, -1, 0, 2]), r.choice([-1, -1, 1]), softcap]


def forward_call(r: random.Random) -> list[Any]:
    """What seqkern::attention takes; more than half is plain, for PyTorch's kernel."""
    dtype, packed, plain = r.choice(DTYPES), r.random() < 0.2, r.random() < 0.6
    B, Hkv, D = size(r, 1, 2, 3), r.choice([1, 2]), r.choice([1, 3, 4, 4])
    H, Dv = Hkv * r.choice([1, 2]), D if plain else r.choice([D, 2])
    Tq, Tk = size(r, 1, 4, 5), size(r, 1, 4, 6)
    lens = [torch.randint(T + 1, (B,), dtype=torch.int32) for T in (Tq, Tk)]
    q_lens, k_lens = (n if r.random() < 0.3 and not packed else None for n in lens)
    bounds: list[Tensor | None] = [None, None]
    shapes: list[tuple[int, ...]] = [(B, H, Tq, D), (B, Hkv, Tk, D), (B, Hkv, Tk, Dv)]
    if packed:
        bounds = [torch.cat([n.new_zeros(1), n.cumsum(0).int()]) for n in lens]
        Nq, Nk = (int(n.sum()) for n in lens)
        shapes = [(Nq, H, D), (Nk, Hkv, D), (Nk, Hkv, Dv)]
    part = [[r.choice([1, n]) for n in (B, H, Tq, Tk)] for _ in range(2)]
    mask = torch.rand(part[0]) > 0.3 if r.random() < 0.4 else None
    bias = torch.randn(part[1]).to(dtype) if r.random() < 0.4 else None
    slopes = torch.rand(r.choice([(H,), (B, H)])) if r.random() < 0.3 else None
    sinks = torch.randn(H).to(dtype) if r.random() < 0.3 and not plain else None
    dropout_p = 0.0 if plain else r.choice([0.0, 0.0, 0.4])
    seed = torch.randint(2**62, (1,)) if dropout_p else None
    q, k, v = (torch.randn(shape).to(dtype) for shape in shapes)
    extras = mask, bias, q_lens, k_lens, slopes, sinks, seed, *bounds
    return [q, k, v, *extras, *rule_of(r, plain), dropout_p, 0.7, Tq, Tk, True]


def backward_call(r: random.Random) -> list[Any]:
    """What seqkern::attention_backward takes."""
    args = forward_call(r)
    o, lse = reference.attention(*args)
    dlse = torch.randn_like(lse) if r.random() < 0.1 else None
    needs = r.random() < 0.7, True, r.random() < 0.7
    return [torch.randn_like(o), dlse, o, lse, *args, *needs]


def cache_call(r: random.Random) -> tuple[list[Any], list[Any]]:
    """What seqkern::attention_decode takes, and seqkern::cache_append."""
    dtype, page = r.choice(DTYPES), r.choice([0, 0, 1, 3])
    plain = r.random() < 0.5
    B, Hkv, D, Tn = size(r, 1, 3), r.choice([1, 2]), r.choice([1, 4]), size(r, 1, 2)
    H, Dv = Hkv * r.choice([1, 2]), D if plain else r.choice([D, 2])
    places = 6 if page else r.choice([2, 6])
    table = None
    if page:
        pages = B * (places // page)
        table = torch.randperm(pages + 2)[:pages].view(B, places // page).int()
    shape = (B * places // page + 2, Hkv, page) if page else (B, Hkv, places)
    lens = torch.randint(places - Tn + 1, (B,), dtype=torch.int32)
    slopes = torch.rand(r.choice([(H,), (B, H)])) if r.random() < 0.3 else None
    sinks = torch.randn(H).to(dtype) if r.random() < 0.3 and not plain else None
    k_cache, v_cache = (torch.randn(*shape, n).to(dtype) for n in (D, Dv))
    k_new, v_new = (torch.randn(B, Hkv, Tn, n).to(dtype) for n in (D, Dv))
    q = torch.randn(B, H, size(r, 1, 3), D).to(dtype)
    args = [q, k_cache, v_cache, lens, table, slopes, sinks, *rule_of(r, plain), 0.7, 0]
    return args, [k_cache, v_cache, k_new, v_new, lens, table]


def spoil(r: random.Random, call: list[Any], tensors: int) -> int:
    """Lays some of the tensors out anew, and spoils up to two of them; returns how many."""
    for i, t in enumerate(call[:tensors]):
        if isinstance(t, Tensor) and r.random() < 0.7:
            call[i] = relaid_tensor(r, t)
    spoilt = r.choice([0, 0, 0, 1, 2])
    for _ in range(spoilt):
        i, t = r.choice(list(enumerate(call[:tensors])))
        given = [t for t in call[:tensors] if t is not None]
        change = single_tensor if r.random() < 0.3 else lambda t: spoilt_tensor(r, t)
        call[i] = r.choice(given) if t is None else change(t)
    return spoilt


def outcome(op: Callable[..., Any], args: Sequence[Any]) -> Any:
    """The results, or the refusal, for which no other errors will do."""
    try:
        return op(*args)
    except (TypeError, ValueError) as error:
        return error


def on_meta(args: Sequence[Any]) -> bool:
    return any(isinstance(t, Tensor) and t.device.type == "meta" for t in args)


def check_values(actual: Sequence[Tensor], function: Callable[..., Any], args: list[Any]) -> None:
    """Against the reference in float64, all results together: one alone may be mere rounding, as dq
    is where there is a single key."""
    floating = [i for i, t in enumerate(args) if isinstance(t, Tensor) and t.is_floating_point()]

    def together(results: Sequence[Tensor]) -> dict[str, Tensor]:
        flat = torch.cat([t.flatten() for t in results])
        return {"all": flat.masked_fill(flat == -torch.inf, 0)}

    def computed(tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        new = list(args)
        for i, t in zip(floating, tensors, strict=True):
            new[i] = t
        return together(function(*new))

    given = neighbours([args[i].float() for i in floating], 2)
    exact = computed([args[i].double() for i in floating])
    assert_within_budget(together(actual), exact, list(map(computed, given)), actual[0].dtype)


# Of each op: its arguments, how many of the first are tensors, the reference with the op's checks
# and without.
OPS: dict[str, tuple[Callable[..., list[Any]], int, Callable[..., Any], Callable[..., Any]]] = {
    "attention": (forward_call, 12, ops._reference, reference.attention),
    "attention_backward": (
        backward_call,
        16,
        ops._reference_backward,
        reference.attention_backward,
    ),
    "attention_decode": (
        lambda r: cache_call(r)[0],
        7,
        decode._attention_decode,
        cache_reference.attention_decode,
    ),
}


@pytest.mark.parametrize("op", OPS)
@fuzzed
@seeds
def test_kernel_and_reference_agree(op: str, seed: int) -> None:
    r = random.Random(seed)
    torch.manual_seed(seed)
    draw, tensors, behind, function = OPS[op]
    call = draw(r)
    spoilt = spoil(r, call, tensors)
    found = outcome(getattr(torch.ops.seqkern, op).default, call)
    assert spoilt or not isinstance(found, Exception)
    if on_meta(call):
        return
    other = outcome(behind, call)
    if isinstance(found, Exception):
        # The reference clamps lengths, for on some devices it costs too much to look at them.
        assert isinstance(other, Exception) or re.search("_lens|cu_|max_|block_table", str(found))
        return
    assert not isinstance(other, Exception)
    # A backward whose lse comes from other arguments has no meaning.
    if found[0].dtype in WIDE and not (spoilt and op == "attention_backward"):
        check_values(found, function, call)


@fuzzed
@seeds
def test_cache_append_writes_all_or_nothing(seed: int) -> None:
    r = random.Random(seed)
    torch.manual_seed(seed)
    call = cache_call(r)[1]
    spoilt = spoil(r, call, len(call))
    expected = [t.clone() for t in call[:2]]
    found = outcome(torch.ops.seqkern.cache_append.default, call)
    assert spoilt or found is None
    if on_meta(call):
        return
    if found is None:
        cache_reference.cache_append(*expected, *call[2:])
    assert all(torch.equal(a, b) for a, b in zip(call, expected, strict=False))
