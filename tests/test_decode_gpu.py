"""Attention over a cache on a GPU: values, pages and parts, graphs, compilation."""

from typing import Any

import pytest
import torch
from torch import Tensor

from seqkern.ops.decode import attention_decode
from seqkern.reference import decode as reference
from tests.cuda_graph import capture
from tests.decode_cases import (
    CASES,
    NOTHING,
    SINKS,
    Case,
    check,
    draw,
    generate,
    in_cache,
    options,
    raw,
    step,
)
from tests.offline.memory import poisoned_memory

pytestmark = pytest.mark.gpu
DEVICE = "cuda"

# Many tiles of keys and of rows, at the head sizes of the table, and rows that are not aligned.
LONG = [
    Case("long-D64", (4000, 0, 77, 1025), H=8, D=64, Dv=64),
    Case("long-D128-paged", (4000, 0, 77, 1025), H=8, D=128, Dv=128, page=64),
    Case("long-rows", (1500, 300), H=16, Hkv=1, Tq=5, options=options(window=(700, None))),
    Case("long-D256", (1000, 40), Tq=3, D=256, Dv=256, new=3, page=16),
    Case("long-D512", (600, 33), D=512, Dv=512, options=options(sinks=SINKS, softcap=5.0)),
    Case("long-unaligned", (700, 5), D=129, Dv=65, page=16),
]
every_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str
)


def there(given: dict[str, Any]) -> dict[str, Any]:
    """The same arguments on the GPU."""
    return {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in given.items()}


@pytest.mark.parametrize("splits", [None, 1, 5])
@every_dtype
@pytest.mark.parametrize("case", [*CASES, *LONG], ids=lambda case: case.name)
def test_values(case: Case, dtype: torch.dtype, splits: int | None) -> None:
    """Of the result, and of the cache, where nothing but the new keys and values is written."""
    q, k, v = draw(case, dtype)
    held = in_cache(case, k, v)
    arguments = there(held | case.options)
    with poisoned_memory():
        o, lse = attention_decode(q.to(DEVICE), **arguments, return_lse=True, splits=splits)
    check(case, (o.cpu(), lse.cpu()), q, k, v)
    caches = held["k_cache"], held["v_cache"]
    if case.new:
        new = held["k_new"], held["v_new"]
        reference.cache_append(*caches, *new, held["k_lens"], held.get("block_table"))
    written = arguments["k_cache"].cpu(), arguments["v_cache"].cpu()
    torch.testing.assert_close(written, caches, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("splits", [None, 2])
@pytest.mark.parametrize("case", NOTHING, ids=lambda case: case.name)
def test_nothing_to_attend_to(case: Case, splits: int | None) -> None:
    q, k, v = draw(case, torch.float32)
    arguments = there(in_cache(case, k, v))
    with poisoned_memory():
        o, lse = attention_decode(q.to(DEVICE), **arguments, return_lse=True, splits=splits)
    assert o.shape == (len(case.lens), case.H, case.Tq, case.Dv)
    assert not o.any()
    assert (lse == -torch.inf).all()


@pytest.mark.parametrize("splits", [None, 1])
@pytest.mark.parametrize("page", [0, 16])
def test_cuda_graph(page: int, splits: int | None) -> None:
    """Captured once, a graph serves a cache that grows, and nothing synchronises."""
    B, H, Hkv, D, places = 3, 8, 2, 64, 320
    pages = B * places // page if page else 0
    shape = (pages, Hkv, page, D) if page else (B, Hkv, places, D)
    table = torch.randperm(pages, device=DEVICE).view(B, -1).to(torch.int32) if page else None
    caches = torch.randn(2, *shape, device=DEVICE, dtype=torch.bfloat16)
    q = torch.randn(B, H, 1, D, device=DEVICE, dtype=torch.bfloat16)
    k, v = torch.randn(2, B, Hkv, 1, D, device=DEVICE, dtype=torch.bfloat16)
    held = torch.zeros(B, dtype=torch.int32, device=DEVICE)

    def decode() -> list[Tensor]:
        tensors: dict[str, Any] = {"k_lens": held, "k_new": k, "v_new": v, "block_table": table}
        return [*attention_decode(q, *caches, **tensors, return_lse=True, splits=splits)]

    graph, captured = capture(decode)
    for lens in ([5, 0, 319], [250, 17, 130]):
        held.copy_(torch.tensor(lens, dtype=torch.int32))
        before = caches.clone()
        graph.replay()
        replayed = [*captured, caches.clone()]
        assert not torch.equal(caches, before)
        caches.copy_(before)
        torch.testing.assert_close(replayed, [*decode(), caches], rtol=0, atol=0)


@pytest.mark.parametrize("page", [0, 4])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend: str, page: int) -> None:
    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=backend)
    results = [generate(run, page, DEVICE) for run in (step, compiled)]
    torch.testing.assert_close(*results)
    assert results[0][-1].tolist() == [7, 9]


@pytest.mark.parametrize("name", ["lens", "Tq3-append", "everything"])
def test_opcheck(name: str) -> None:
    (case,) = (case for case in CASES if case.name == name)
    for op, args in raw(case):
        given = tuple(x.to(DEVICE) if isinstance(x, Tensor) else x for x in args)
        torch.library.opcheck(op, given)
