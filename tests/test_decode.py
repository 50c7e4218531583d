"""Attention over a cache: values on the CPU, appending, pages, the ops, and refusals."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch

from seqkern.ops.decode import attention_decode
from seqkern.reference import decode as reference
from tests.decode_cases import (
    CASES,
    NOTHING,
    SINKS,
    Case,
    check,
    draw,
    generate,
    in_cache,
    oracle,
    raw,
    rule,
    step,
)

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
every_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)


def named(name: str) -> Case:
    (case,) = (case for case in CASES if case.name == name)
    return case


# ---- the public function on the CPU -------------------------------------------------------


@every_dtype
@every_case
def test_values(case: Case, dtype: torch.dtype) -> None:
    q, k, v = draw(case, dtype)
    result = attention_decode(q, **in_cache(case, k, v), **case.options, return_lse=True)
    check(case, result, q, k, v)


@pytest.mark.parametrize("case", NOTHING, ids=lambda case: case.name)
def test_nothing_to_attend_to(case: Case) -> None:
    q, k, v = draw(case, torch.float32)
    o, lse = attention_decode(q, **in_cache(case, k, v), return_lse=True)
    assert o.shape == (len(case.lens), case.H, case.Tq, case.Dv)
    assert lse.shape == o.shape[:3]
    assert not o.any()
    assert (lse == -math.inf).all()


@every_case
def test_reference(case: Case) -> None:
    """The definition itself, which other devices than the CPU and CUDA run."""
    q, k, v = draw(case, torch.float32)
    arguments = in_cache(case, k, v)
    lens, table = arguments["k_lens"], arguments.get("block_table")
    caches = arguments["k_cache"], arguments["v_cache"]
    if case.new:
        reference.cache_append(*caches, arguments["k_new"], arguments["v_new"], lens, table)
    result = reference.attention_decode(q, *caches, lens + case.new, table, *rule(case, case.D), 0)
    check(case, result, q, k, v)


@pytest.mark.parametrize("page", [0, 3])
def test_generation_step_by_step(page: int) -> None:
    """A prompt, then tokens one by one, equals causal attention over all of them at once."""
    B, H, Hkv, D, prompt, total = 2, 4, 2, 8, 5, 12
    q, k, v = torch.randn(B, H, total, D), *torch.randn(2, B, Hkv, total, D)
    table = torch.randperm(8).view(B, 4).to(torch.int32) if page else None
    shape = (8, Hkv, page, D) if page else (B, Hkv, total, D)
    k_cache, v_cache = torch.full(shape, math.nan), torch.full(shape, math.nan)
    steps, lens = [], torch.zeros(B, dtype=torch.int64)
    bounds = [0, prompt, *range(prompt + 1, total + 1)]
    for begin, end in pairwise(bounds):
        new = slice(begin, end)
        steps.append(
            attention_decode(
                q[:, :, new],
                k_cache,
                v_cache,
                k_lens=lens,
                k_new=k[:, :, new],
                v_new=v[:, :, new],
                block_table=table,
            )
        )
        lens = lens + (end - begin)
    case = Case("", (total, total), H, Hkv, total, D, D)
    torch.testing.assert_close(torch.cat(steps, 2), oracle(case, q, k, v)[0])
    if table is None:
        assert torch.equal(k_cache, k)
        assert torch.equal(v_cache, v)
    else:
        assert torch.equal(reference.gather_pages(k_cache, table), k)
        assert torch.equal(reference.gather_pages(v_cache, table), v)


@pytest.mark.parametrize("name", ["lens", "alibi", "sinks", "Tq3"])
def test_pages_give_what_one_piece_gives(name: str) -> None:
    case = named(name)
    q, k, v = draw(case, torch.float32)
    whole = attention_decode(q, **in_cache(case, k, v), **case.options)
    for page in (1, 7, 64):
        paged = Case("", case.lens, Tq=case.Tq, page=page)
        o = attention_decode(q, **in_cache(paged, k, v), **case.options)
        torch.testing.assert_close(o, whole)


def test_shared_prefix() -> None:
    """Sequences may share pages; what is appended goes to pages of their own."""
    q, k, v = torch.randn(2, 2, 1, 8), *torch.randn(2, 1, 1, 4, 8)
    new = torch.randn(2, 2, 1, 1, 8)
    pools = torch.zeros(2, 3, 1, 4, 8)
    pools[:, 0] = torch.stack([k, v])[:, 0]
    table = torch.tensor([[0, 1], [0, 2]], dtype=torch.int32)
    lens = torch.tensor([4, 4])
    o = attention_decode(q, *pools, k_lens=lens, k_new=new[0], v_new=new[1], block_table=table)
    whole = (torch.cat([t.expand(2, 1, 4, 8), n], 2) for t, n in ((k, new[0]), (v, new[1])))
    exact = oracle(Case("", (5, 5), 2, 1, 1, 8, 8), q, *whole)[0]
    torch.testing.assert_close(o, exact)


def test_layouts() -> None:
    """Heads beside each other as projections leave them, and heads that are not contiguous."""
    case = Case("", (9, 30), Tq=3, D=16, Dv=16)
    q, k, v = draw(case, torch.float32)
    arguments = in_cache(case, k, v)
    plain = attention_decode(q, **arguments)
    k_cache, v_cache = arguments.pop("k_cache"), arguments.pop("v_cache")
    tokens = k_cache.transpose(1, 2).contiguous().transpose(1, 2)
    spread = v_cache.mT.contiguous().mT
    assert spread.stride(3) != 1
    flipped = q.permute(3, 1, 2, 0).contiguous().permute(3, 1, 2, 0)
    o = attention_decode(flipped, tokens, spread, **arguments)
    torch.testing.assert_close(o, plain)


def test_autocast() -> None:
    """The cache's dtype rules, whatever the queries have."""
    case = Case("", (9, 30), new=1)
    q, k, v = draw(case, torch.bfloat16)
    expected = attention_decode(q, **in_cache(case, k, v))
    arguments = in_cache(case, k, v)
    arguments |= {name: arguments[name].float() for name in ("k_new", "v_new")}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o = attention_decode(q.float(), **arguments)
        q, k, v = (t.float() for t in (q, k, v))
        wide = attention_decode(q, **in_cache(case, k, v), sinks=SINKS)
    assert torch.equal(o, expected)
    assert torch.equal(wide, attention_decode(q, **in_cache(case, k, v), sinks=SINKS))


def test_lens_of_either_width_stay_unchanged() -> None:
    case = Case("", (9, 30), new=1)
    q, k, v = draw(case, torch.float32)
    results = []
    for dtype in (torch.int32, torch.int64):
        arguments = in_cache(case, k, v)
        arguments["k_lens"] = arguments["k_lens"].to(dtype)
        results.append(attention_decode(q, **arguments))
        assert arguments["k_lens"].tolist() == [8, 29]
    assert torch.equal(*results)


# ---- the ops ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lens", "Tq3-append", "everything", "Dv", "full"])
def test_opcheck(name: str) -> None:
    for op, args in raw(named(name)):
        torch.library.opcheck(op, args)


@pytest.mark.parametrize("page", [0, 4])
def test_compile(page: int) -> None:
    """One graph for all steps of a generation, the writes into the cache included."""
    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    results = [generate(run, page, "cpu") for run in (step, compiled)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert results[0][-1].tolist() == [7, 9]


def test_meta_and_fake_tensors_have_the_shapes() -> None:
    case = Case("", (9, 30), Tq=3, Dv=24)
    q, k, v = (t.to("meta") for t in draw(case, torch.bfloat16))
    lens = torch.zeros(2, dtype=torch.int32, device="meta")
    o, lse = attention_decode(q, k, v, k_lens=lens, return_lse=True)
    assert (o.shape, o.dtype) == ((2, 4, 3, 24), torch.bfloat16)
    assert (lse.shape, lse.dtype) == ((2, 4, 3), torch.float32)


# ---- refusals -----------------------------------------------------------------------------


def call(**changed: Any) -> dict[str, Any]:
    """Arguments that are right, but for the changed ones."""
    good = {
        "q": torch.zeros(2, 4, 1, 8),
        "k_cache": torch.zeros(2, 2, 6, 8),
        "v_cache": torch.zeros(2, 2, 6, 8),
        "k_lens": torch.tensor([3, 5]),
    }
    return good | changed


def paged(table: list[list[int]], **changed: Any) -> dict[str, Any]:
    pool = torch.zeros(3, 2, 4, 8)
    return call(
        k_cache=pool,
        v_cache=pool.clone(),
        block_table=torch.tensor(table, dtype=torch.int32),
        **changed,
    )


def appending(n: int = 1, **changed: Any) -> dict[str, Any]:
    return {"k_new": torch.ones(2, 2, n, 8), "v_new": torch.ones(2, 2, n, 8)} | changed


REFUSED = {
    "q rank": (call(q=torch.zeros(4, 1, 8)), r"q must be \(B, H, Tq, D\), got \(4, 1, 8\)"),
    "q size": (
        call(q=torch.zeros(2, 3, 1, 8)),
        r"q must be .* a multiple of 2.*got \(2, 3, 1, 8\)",
    ),
    "q type": (call(q=[1.0]), "q must be a Tensor, got list"),
    "dtype": (call(q=torch.zeros(2, 4, 1, 8).half()), "k_cache must have the dtype of q"),
    "integers": (
        call(k_cache=torch.zeros(2, 2, 6, 8, dtype=torch.int8)),
        "k_cache must be of a floating-point dtype .*, got torch.int8",
    ),
    "k_cache": (call(k_cache=torch.zeros(2, 2, 8)), r"k_cache must be \(B, Hkv, T, D\), got"),
    "v_cache": (call(v_cache=torch.zeros(2, 2, 5, 8)), r"v_cache must be .*\(2, 2, 6, 8\), got"),
    "no lens": (call(k_lens=None), "k_lens must be a Tensor, got NoneType"),
    "lens dtype": (call(k_lens=torch.ones(2)), "k_lens must be of torch.int32 or torch.int64"),
    "lens size": (call(k_lens=torch.ones(3).long()), r"k_lens must be \(B\) = \(2,\), got \(3,\)"),
    "long": (call(k_lens=torch.tensor([3, 7])), r"k_lens\[1\] must be within the 6 places.*got 7"),
    "negative": (call(k_lens=torch.tensor([-1, 7])), r"k_lens\[0\] must be within .*got -1"),
    "wrapping": (call(k_lens=torch.tensor([2**32, 1])), r"k_lens\[0\] must be within"),
    "no room": (
        call(**appending(2)),
        r"k_lens\[1\] \+ 2 new must be within the 6 places of the cache, got 5 \+ 2",
    ),
    "one new": (call(**appending(v_new=None)), "k_new and v_new must be given together, got no v"),
    "new size": (
        call(**appending(k_new=torch.ones(2, 4, 1, 8))),
        r"k_new must be .*\(2, 2, 1, 8\)",
    ),
    "new dtype": (call(**appending(k_new=torch.ones(2, 2, 1, 8).half())), "k_new must have the dt"),
    "expanded": (
        call(v_cache=torch.zeros(1, 2, 6, 8).expand(2, 2, 6, 8), **appending()),
        "v_cache must not be expanded",
    ),
    "causal": (call(causal=True), "causal must be None, .*got True"),
    "window": (call(window=3), r"window must be None or \(left, right\), got 3"),
    "window type": (call(window=(2.0, None)), "window must hold whole numbers or None"),
    "window sign": (call(window=(-1, None)), r"window must hold no negative number, got \(-1"),
    "softcap": (call(softcap=0.0), "softcap must be positive or None, got 0.0"),
    "softcap inf": (call(softcap=math.inf), "softcap must be positive and finite, got inf"),
    "softcap type": (call(softcap="1"), "softcap must be a number, got str"),
    "scale": (call(scale=math.nan), "scale must be finite, got nan"),
    "slopes type": (call(alibi_slopes=[1.0] * 4), "alibi_slopes must be a Tensor, got list"),
    "slopes dtype": (
        call(alibi_slopes=torch.ones(4, dtype=torch.complex64)),
        "alibi_slopes must be floating, got torch.complex64",
    ),
    "sinks type": (call(sinks=[1.0] * 4), "sinks must be a Tensor, got list"),
    "slopes": (call(alibi_slopes=torch.ones(3)), r"alibi_slopes must be \(H,\) = \(4,\) or .*\(3,"),
    "sinks": (call(sinks=torch.ones(3)), r"sinks must be \(4,\), got \(3,\)"),
    "sinks dtype": (call(sinks=torch.ones(4).half()), "sinks must be torch.float32.*float16"),
    "splits": (call(splits=0), "splits must be from 1 to 128, got 0"),
    "splits many": (call(splits=129), "splits must be from 1 to 128, got 129"),
    "splits type": (call(splits=2.0), "splits must be a whole number or None, got 2.0"),
    "table dtype": (
        call(block_table=torch.zeros(2, 1, dtype=torch.int64)),
        r"block_table must be \(B, N\) of torch.int32, got \(2, 1\) of torch.int64",
    ),
    "no such page": (
        paged([[0, 9], [1, 3]]),
        r"block_table\[1, 1\] must be one of the 3 pages of the pool, got 3",
    ),
    "no pool": (
        call(
            k_cache=torch.zeros(0, 2, 4, 8),
            v_cache=torch.zeros(0, 2, 4, 8),
            block_table=torch.zeros(2, 1, dtype=torch.int32),
        ),
        "k_cache must hold pages for block_table to name, got none",
    ),
    "page below": (paged([[-1, 0], [1, 2]]), r"block_table\[0, 0\] .* got -1"),
    "shared": (
        paged([[0, 1], [1, 0]], **appending()),
        r"block_table must not give one page to two .* got page 0 at \[0, 0\] and \[1, 1\]",
    ),
    "gradient": (
        call(q=torch.zeros(2, 4, 1, 8, requires_grad=True)),
        "q must not require a gradient",
    ),
    "gradient of new": (
        call(**appending(k_new=torch.ones(2, 2, 1, 8, requires_grad=True))),
        "k_new must not require a gradient",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str) -> None:
    """Each names the argument, and leaves the cache as it was."""
    arguments, message = REFUSED[name]
    with pytest.raises(
        (TypeError, ValueError), match=f"^(attention_decode|cache_append): {message}"
    ):
        attention_decode(**arguments)
    assert not any(arguments[cache].any() for cache in ("k_cache", "v_cache"))


def test_no_grad_is_enough() -> None:
    """A layer's parameters require gradients; inference does not ask for them."""
    with torch.no_grad():
        o = attention_decode(**call(q=torch.zeros(2, 4, 1, 8, requires_grad=True)))
    assert not o.requires_grad


def test_ops_refuse_too() -> None:
    """The ops themselves reach no memory that they do not own, whoever calls them."""
    good = call()
    lens = good.pop("k_lens").int()
    for bad in (lens + 2, lens - 4):
        with pytest.raises(ValueError, match=r"attention_decode: k_lens\[.\] must be within"):
            torch.ops.seqkern.attention_decode(*good.values(), bad, None, *rule(CASES[0], 8), 0)
    caches = good["k_cache"], good["v_cache"]
    new = appending(2).values()
    with pytest.raises(ValueError, match=r"cache_append: k_lens\[1\] \+ 2 new must be within"):
        torch.ops.seqkern.cache_append(*caches, *new, lens, None)
    with pytest.raises(ValueError, match="attention_decode: q must not require a gradient"):
        torch.ops.seqkern.attention_decode(
            good["q"].requires_grad_(), *caches, lens, None, *rule(CASES[0], 8), 0
        )


def test_where_values_cannot_be_checked() -> None:
    """What the definition says, and kernels do: clamp lengths, drop entries, and show NaN."""
    caches = torch.zeros(2, 2, 1, 4, 8)
    new, lens = torch.ones(2, 2, 1, 2, 8), torch.tensor([3, -1], dtype=torch.int32)
    reference.cache_append(*caches, *new, lens, None)
    assert caches[0].sum((1, 3)).tolist() == [[0, 0, 0, 8], [8, 0, 0, 0]]
    pools = torch.zeros(2, 2, 1, 2, 8)
    table = torch.tensor([[0, 5], [-1, 1]], dtype=torch.int32)
    reference.cache_append(*pools, *new, torch.tensor([1, 1], dtype=torch.int32), table)
    assert pools[1].sum((1, 3)).tolist() == [[0, 8], [8, 0]]
    q = torch.ones(2, 1, 1, 8)
    plain = rule(CASES[0], 8)
    clamped = torch.tensor([9, -9], dtype=torch.int32)
    o, lse = reference.attention_decode(q, *caches, clamped, None, *plain, 0)
    assert o[0].isfinite().all()
    assert lse[1].item() == -math.inf
    lens = torch.tensor([2, 3], dtype=torch.int32)
    o, _ = reference.attention_decode(q, *pools, lens, table, *plain, 0)
    assert o[0].isfinite().all()
    assert o[1].isnan().all()
