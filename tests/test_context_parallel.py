"""Attention over a sequence that two gloo processes share, and the function that joins its parts.

The workers are this file run as a script, one process a rank.
"""

import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from seqkern import attention
from seqkern.ops.combine import combine_partials

RANKS = 2
# An odd number of positions: the ranks' shares differ.
B, H, HKV, T, D, DV = 2, 4, 2, 13, 8, 6
CASES = {"full": (None, None), "causal": ("bottom_right", None), "window": ("bottom_right", 5)}


def tensors() -> list[Tensor]:
    """q, k, v and the gradient of o, the same in every process."""
    generator = torch.Generator().manual_seed(1)
    shapes = (B, H, T, D), (B, HKV, T, D), (B, HKV, T, DV), (B, H, T, DV)
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]


def attend(case: str, q: Tensor, k: Tensor, v: Tensor, **more) -> tuple[Tensor, Tensor]:
    causal, left = CASES[case]
    window = None if left is None else (left, 0)
    return attention(q, k, v, causal=causal, window=window, return_lse=True, **more)


class FromTheOther(torch.autograd.Function):
    """The other rank's tensor of a given length; its gradient goes back to where it came from."""

    @staticmethod
    def forward(ctx, mine: Tensor, length: int) -> Tensor:
        ctx.length = mine.size(2)
        return exchange(mine, length)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        return exchange(grads[0], ctx.length), None


def exchange(mine: Tensor, length: int) -> Tensor:
    other = 1 - dist.get_rank()
    theirs = mine.new_empty(*mine.shape[:2], length, mine.size(3))
    sent = dist.isend(mine.contiguous(), other)
    dist.recv(theirs, other)
    sent.wait()
    return theirs


def sharded(case: str, rank: int) -> list[Tensor]:
    """o of this rank's queries, and the gradients of its shares of q, k and v."""
    q, k, v, do = (t.chunk(RANKS, 2)[rank].clone() for t in tensors())
    for t in (q, k, v):
        t.requires_grad_()
    length = T - q.size(2)
    theirs = [FromTheOther.apply(t, length) for t in (k, v)]
    parts = [attend(case, q, k, v)]
    causal, left = CASES[case]
    if causal is None:
        parts.append(attend(case, q, *theirs))
    elif rank == 0:
        # All of the other's keys are later than these queries: a part with nothing in it.
        nothing = torch.zeros(B, dtype=torch.int32)
        parts.append(attend(case, q, *theirs, k_lens=nothing))
    else:
        # These queries stand after all of the other's keys, by one and more.
        distance = torch.arange(q.size(2))[:, None] + length - torch.arange(length)
        mask = None if left is None else distance <= left
        parts.append(attention(q, *theirs, mask=mask, return_lse=True))
    o, _ = combine_partials(*zip(*parts))
    o.backward(do)
    return [o.detach(), q.grad, k.grad, v.grad]


def worker(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=RANKS
    )
    torch.save({case: sharded(case, rank) for case in CASES}, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, run_ranks) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(__file__, RANKS, folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_compute_what_one_does(case, results):
    q, k, v, do = tensors()
    for t in (q, k, v):
        t.requires_grad_()
    o, _ = attend(case, q, k, v)
    o.backward(do)
    actual = [torch.cat(shares, 2) for shares in zip(*(r[case] for r in results))]
    torch.testing.assert_close(actual, [o.detach(), q.grad, k.grad, v.grad])


# ---- combine_partials ---------------------------------------------------------------------


def parts_of(dtype: torch.dtype, bounds: list[int], **options):
    """q, k, v (6 queries, 11 keys, the first query without any) and the parts between bounds."""
    q = torch.randn(2, 4, 6, 8, dtype=dtype, requires_grad=True)
    k, v = (torch.randn(2, 2, 11, 8, dtype=dtype, requires_grad=True) for _ in "kv")
    mask = torch.rand(2, 1, 6, 11) < 0.5
    mask[:, :, 0] = False
    parts = [
        attention(q, k[:, :, a:b], v[:, :, a:b], mask=mask[..., a:b], return_lse=True, **options)
        for a, b in pairwise(bounds)
    ]
    return (q, k, v), mask, parts


@pytest.mark.parametrize("bounds", [[0, 11], [0, 4, 11], [0, 1, 1, 6, 11]])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_parts_make_the_whole(dtype, bounds):
    leaves, mask, parts = parts_of(dtype, bounds, softcap=3.0)
    whole = attention(*leaves, mask=mask, softcap=3.0, return_lse=True)
    joined = combine_partials(*zip(*parts))
    assert [t.dtype for t in joined] == [t.dtype for t in whole]
    assert (joined[1][:, :, 0] == -torch.inf).all()
    assert not joined[0][:, :, 0].any()
    # A part is rounded to bf16 before it is joined; otherwise only sums differ.
    close = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(joined, whole, **close)
    do = torch.randn_like(whole[0])
    dlse = torch.randn_like(whole[1])
    seen = mask.any(-1).expand_as(dlse)
    grads = [
        torch.autograd.grad((o, lse[seen]), leaves, (do, dlse[seen])) for o, lse in (joined, whole)
    ]
    for actual, expected in zip(*grads):
        assert actual.isfinite().all()
        torch.testing.assert_close(actual, expected, **close)


def test_order_and_grouping_do_not_matter():
    _, _, (a, b, c) = parts_of(torch.float64, [0, 3, 7, 11])
    at_once = combine_partials(*zip(a, b, c))
    in_steps = combine_partials(*zip(combine_partials(*zip(c, a)), b))
    torch.testing.assert_close(in_steps, at_once)


def test_logarithms_of_any_size_combine():
    o = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).unsqueeze(1)
    joined, lse = combine_partials(list(o), [torch.tensor([2e4]), torch.tensor([2e4 + 1])])
    share = torch.sigmoid(torch.tensor(-1.0))
    torch.testing.assert_close(joined[0], torch.stack([share, 1 - share]))
    torch.testing.assert_close(lse, torch.tensor([2e4 + 1]) + torch.log1p(torch.tensor(-1.0).exp()))


def test_a_sink_in_one_part_is_the_rows_sink():
    (q, k, v), mask, _ = parts_of(torch.float64, [0, 11])
    sinks = torch.randn(4, dtype=torch.float64)
    parts = [
        attention(q, k[:, :, s], v[:, :, s], mask=mask[..., s], sinks=sink, return_lse=True)
        for s, sink in ((slice(0, 5), sinks), (slice(5, 11), None))
    ]
    whole = attention(q, k, v, mask=mask, sinks=sinks, return_lse=True)
    torch.testing.assert_close(combine_partials(*zip(*parts)), whole)


def test_derivatives_of_first_and_second_order():
    os = [torch.randn(3, 2, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    lses = [torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(3)]

    def joined(*t: Tensor):
        return combine_partials(t[:3], t[3:])

    assert torch.autograd.gradcheck(joined, (*os, *lses))
    assert torch.autograd.gradgradcheck(joined, (*os, *lses))


def test_bad_parts_are_refused():
    o, lse = torch.zeros(2, 3, 4), torch.zeros(2, 3)
    for os, lses, message in (
        ([], [], "one entry for each part, got 0 and 0"),
        ([o], [lse, lse], "one entry for each part, got 1 and 2"),
        ([o], [lse[:1]], r"lses\[0\] must be \(..., Tq\)"),
        ([o], [lse.double()], r"lses\[0\] must be torch.float32"),
        ([o.half()], [lse.half()], r"lses\[0\] must be torch.float32"),
        ([o, o[:1]], [lse, lse], r"os\[1\] must be like the first part"),
        ([o, o.double()], [lse, lse], r"os\[1\] must be like the first part"),
        ([o, o], [lse, lse.to("meta")], r"lses\[1\] must be like the first part"),
    ):
        with pytest.raises(ValueError, match=message):
            combine_partials(os, lses)
    with pytest.raises(TypeError, match="os must be a list or a tuple"):
        combine_partials(o, [lse])
    with pytest.raises(TypeError, match=r"lses\[1\] must be a Tensor, got float"):
        combine_partials([o, o], [lse, 0.0])


if __name__ == "__main__":
    worker(int(sys.argv[1]), Path(sys.argv[2]))
