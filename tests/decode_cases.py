"""Calls of attention over a cache, and what they must give."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from seqkern.ops.decode import attention_decode
from seqkern.reference import attention as full
from seqkern.testing import assert_within_budget, neighbours

SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])
SINKS = torch.tensor([0.3, -1.0, 2.0, 0.0])


@dataclass(frozen=True)
class Case:
    """Queries over sequences of the lengths `lens`, of which the last `new` keys are appended."""

    name: str
    lens: tuple[int, ...]
    H: int = 4
    Hkv: int = 2
    Tq: int = 1
    D: int = 40
    Dv: int = 40
    new: int = 0
    page: int = 0
    options: dict[str, Any] = field(default_factory=dict)


def options(**kwargs: Any) -> dict[str, Any]:
    return kwargs


CASES = [
    Case("lens", (0, 1, 17, 129)),
    Case("lens-paged", (0, 1, 17, 129), page=16),
    Case("mha-D64", (33, 40), Hkv=4, D=64, Dv=64),
    Case("mqa-D128", (70, 3), Hkv=1, D=128, Dv=128, page=8),
    Case("equal-lens", (21, 21), D=16, Dv=16),
    Case("Dv", (20, 5), D=24, Dv=72, page=5),
    Case("Tq3", (0, 1, 2, 17, 65), Tq=3),
    Case("Tq3-append", (3, 17, 65), Tq=3, new=3, page=4),
    Case("append1", (1, 33, 20), new=1),
    Case("append1-paged", (1, 33, 20), new=1, page=32),
    Case("full", (5, 19), Tq=3, options=options(causal=None)),
    Case("top-left", (0, 2, 19), Tq=3, options=options(causal="top_left")),
    Case("window", (0, 9, 50, 129), options=options(window=(7, None))),
    Case("window-Tq3", (2, 9, 70), Tq=3, page=16, options=options(window=(5, 0))),
    Case("window-right", (2, 9, 70), Tq=3, options=options(causal=None, window=(3, 1))),
    Case("window-top-left", (2, 9, 70), Tq=3, options=options(causal="top_left", window=(0, 4))),
    # A tile that starts within one head and goes on with the next; its first key is a tile's last.
    Case("window-rows", (23,), H=10, Hkv=1, Tq=5, options=options(window=(3, None))),
    Case("alibi", (0, 9, 70), Tq=3, options=options(alibi_slopes=SLOPES)),
    Case(
        "alibi-B",
        (9, 70),
        page=8,
        options=options(alibi_slopes=torch.stack([SLOPES, -SLOPES]), window=(20, None)),
    ),
    Case("softcap", (0, 9, 70), Tq=3, page=16, options=options(softcap=2.0, scale=0.5)),
    Case("sinks", (0, 9, 70), Tq=3, options=options(sinks=SINKS)),
    Case(
        "everything",
        (2, 40, 129),
        Tq=3,
        new=2,
        page=16,
        options=options(
            sinks=SINKS, softcap=3.0, alibi_slopes=SLOPES, window=(37, None), scale=0.25
        ),
    ),
]
NOTHING = [
    Case("B0", ()),
    Case("Tq0", (3, 0), Tq=0),
    Case("no-places", (0, 0)),
    Case("no-pages", (0, 0), page=8),
]


def draw(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, and all keys and values in one piece."""
    generator, places = torch.Generator().manual_seed(1), max(case.lens, default=0)
    sizes = (case.H, case.Tq, case.D), (case.Hkv, places, case.D), (case.Hkv, places, case.Dv)
    q, k, v = (
        torch.randn(len(case.lens), *size, generator=generator, dtype=torch.float64).to(dtype)
        for size in sizes
    )
    return q, k, v


def in_cache(case: Case, k: Tensor, v: Tensor) -> dict[str, Any]:
    """The keyword arguments and tensors of a call; NaN wherever no key and no value is."""
    B, held = len(case.lens), [n - case.new for n in case.lens]
    lens = torch.tensor(held, dtype=torch.int32)
    arguments: dict[str, Any] = {"k_lens": lens}
    if case.new:
        index = lens[:, None] + torch.arange(case.new)
        b = torch.arange(B)[:, None]
        arguments["k_new"] = k[b, :, index].transpose(1, 2)
        arguments["v_new"] = v[b, :, index].transpose(1, 2)
    places = k.size(2) + 6 * (k.size(2) > 0)
    if case.page:
        entries = -(-places // case.page)
        pool = B * entries + 2
        table = torch.randperm(pool, generator=torch.Generator().manual_seed(2))
        table = table[: B * entries].view(B, entries).to(torch.int32)
        arguments["block_table"] = table
        shape = pool, case.Hkv, case.page
    else:
        shape = B, case.Hkv, places
    for name, t in (("k_cache", k), ("v_cache", v)):
        cache = t.new_full((*shape, t.size(3)), math.nan)
        for b, n in enumerate(held):
            for place in range(n):
                at = (b, place)
                if case.page:
                    at = (table[b, place // case.page], place % case.page)
                cache[at[0], :, at[1]] = t[b, :, place]
        arguments[name] = cache
    if case.page:
        # Entries beyond a sequence's end name no page, and must not be followed.
        for b, n in enumerate(case.lens):
            table[b, -(-n // case.page) :] = 2**30
    return arguments


def rule(case: Case, D: int) -> tuple[Any, ...]:
    """The case's options as the ops take them: alibi_slopes, sinks, causal, ..., scale."""
    left, right = case.options.get("window") or (None, None)
    return (
        case.options.get("alibi_slopes"),
        case.options.get("sinks"),
        case.options.get("causal", "bottom_right"),
        -1 if left is None else left,
        -1 if right is None else right,
        case.options.get("softcap", 0.0),
        case.options.get("scale", D**-0.5),
    )


def oracle(case: Case, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Each sequence alone, on exactly its keys: neither lengths nor a cache."""
    slopes, sinks, causal, left, right, softcap, scale = rule(case, q.size(3))
    results = []
    for b, n in enumerate(case.lens):
        slope = slopes[b] if slopes is not None and slopes.dim() == 2 else slopes
        one = (t[b : b + 1] for t in (q, k[:, :, :n], v[:, :, :n]))
        numbers = causal, left, right, softcap, 0.0, scale, case.Tq, n, True
        absent = None, None, None
        results.append(full.attention(*one, *absent, None, slope, sinks, *absent, *numbers))
    return torch.cat([o for o, _ in results]), torch.cat([lse for _, lse in results])


def check(case: Case, actual: tuple[Tensor, Tensor], q: Tensor, k: Tensor, v: Tensor) -> None:
    """o and lse against the oracle, within the error budget of q's dtype."""
    o, lse = actual
    dtype = q.dtype
    # float64 has no more exact oracle: see seqkern.testing.tolerance.
    other = torch.float32 if dtype == torch.float64 else dtype
    exact = oracle(case, q.double(), k.double(), v.double())
    runs = [oracle(case, *ts) for ts in neighbours([t.to(other) for t in (q, k, v)])]
    assert torch.equal(lse == -math.inf, exact[1] == -math.inf)
    assert_within_budget({"o": o}, {"o": exact[0]}, [{"o": r[0]} for r in runs], dtype)
    finite = [t.masked_fill(exact[1] == -math.inf, 0) for t in (lse, exact[1])]
    lses = [{"lse": r[1].masked_fill(exact[1] == -math.inf, 0)} for r in runs]
    kind = torch.promote_types(dtype, torch.float32)
    assert_within_budget({"lse": finite[0]}, {"lse": finite[1]}, lses, kind)


def raw(case: Case) -> list[tuple[Any, tuple[Any, ...]]]:
    """The ops that a call runs, in float32, with arguments for opcheck."""
    ops, calls = torch.ops.seqkern, []
    q, k, v = draw(case, torch.float32)
    arguments = in_cache(case, k, v)
    caches, lens = (arguments["k_cache"], arguments["v_cache"]), arguments["k_lens"]
    table = arguments.get("block_table")
    if case.new:
        new = arguments["k_new"], arguments["v_new"]
        # opcheck compares the caches it changed, which NaN would make unequal.
        filled = map(Tensor.nan_to_num, (*caches, *new))
        calls.append((ops.cache_append.default, (*filled, lens, table)))
        ops.cache_append(*caches, *new, lens, table)
    args = q, *caches, lens + case.new, table, *rule(case, case.D), 0
    return [*calls, (ops.attention_decode.default, args)]


def step(q, k_cache, v_cache, k_lens, k_new, v_new, block_table) -> tuple[Tensor, ...]:
    """One of a generation, with something to compute on either side of it."""
    tensors = {"k_lens": k_lens, "k_new": k_new, "v_new": v_new, "block_table": block_table}
    o, lse = attention_decode(q, k_cache, v_cache, **tensors, window=(6, 0), return_lse=True)
    return o + 1, lse, k_lens + k_new.size(2)


def generate(run: Callable[..., tuple[Tensor, ...]], page: int, device: str) -> list[Tensor]:
    """What three runs of `step` give, then the caches and the lengths."""
    generator = torch.Generator().manual_seed(3)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    caches = torch.zeros((2, 6, 2, 4, 8) if page else (2, 2, 2, 12, 8), device=device)
    table = torch.arange(6, dtype=torch.int32, device=device).view(2, 3) if page else None
    lens, outputs = torch.tensor([0, 2], dtype=torch.int32, device=device), []
    for Tn in (3, 2, 2):
        q, (k, v) = drawn(2, 4, Tn, 8), drawn(2, 2, 2, Tn, 8)
        *out, lens = run(q, *caches, lens, k, v, table)
        outputs += out
    return [*outputs, caches, lens]
