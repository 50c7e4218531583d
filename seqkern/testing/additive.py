"""Cases of the additive attention ops: every feature, on sizes that fit no tile."""

import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from seqkern.ops._additive_autograd import DERIVED
from seqkern.ops.additive import additive_attention
from seqkern.reference import additive as reference
from seqkern.testing.cases import OpCase, Tensors


def additive_case(
    label: str,
    *,
    B: int = 2,
    Tq: int = 3,
    Tk: int = 5,
    D: int = 7,
    Dv: int = 5,
    lens: Sequence[int] | None = None,
    bias: tuple[int, int, int] | None = None,
    mask: tuple[int, int, int] | None = None,
    scale: float = 1.0,
    weights: bool = False,
) -> OpCase:
    """One additive attention.

    Args:
        label: of the features, for the name.
        B, Tq, Tk, D, Dv: the sizes.
        lens: of the keys.
        bias, mask: the shapes of a floating and of a boolean mask.
        scale: of the scores.
        weights: whether they are returned.
    """
    shapes: list[tuple[int, ...]] = [(B, Tq, D), (B, Tk, D), (B, Tk, Dv), (D,)]
    shapes += [bias] if bias is not None else []
    name = f"additive-{label}-B{B}-Tq{Tq}-Tk{Tk}-D{D}-{Dv}"

    def draw(shape: tuple[int, ...], salt: int) -> Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + salt)
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def tensors(dtype: torch.dtype) -> Tensors:
        return tuple(draw(shape, i).to(dtype) for i, shape in enumerate(shapes))

    live = None if mask is None else draw(mask, 10) > -0.5
    k_lens = None if lens is None else torch.tensor(lens, dtype=torch.int32)

    def arguments(inputs: Tensors) -> tuple[Any, ...]:
        query, key, value, v, *added = inputs
        mask, lens = (None if t is None else t.to(query.device) for t in (live, k_lens))
        return query, key, value, v, mask, added[0] if added else None, lens, scale, weights

    def chosen(results: tuple[Any, ...]) -> Tensors:
        """o, the weights where wanted, and lse in o's dtype without the infinities."""
        o, w, lse = results
        finite = lse.masked_fill(lse == -torch.inf, 0).to(o.dtype)
        return (o, w, finite) if weights else (o, finite)

    def op(*inputs: Tensor) -> Tensors:
        query, key, value, v, mask, added, lens, *_ = arguments(inputs)
        results = additive_attention(
            query,
            key,
            value,
            v,
            mask=added if mask is None else mask,
            k_lens=lens,
            scale=scale,
            return_weights=weights,
            return_lse=True,
        )
        return chosen(results if weights else (results[0], None, results[1]))

    def forward(*inputs: Tensor) -> Tensors:
        return chosen(reference.additive_attention(*arguments(inputs)))

    def reference_of(inputs: Tensors, grads: Tensors) -> tuple[Tensors, Tensors]:
        args = arguments(inputs)
        o, w, lse = reference.additive_attention(*args)
        given = (grads[0], grads[1] if weights else None, grads[-1].to(lse.dtype), o, lse)
        derived = reference.additive_attention_backward(*given, *args[:-1], *[True] * 5)
        grads = tuple(g for i, g in zip(DERIVED, derived, strict=True) if args[i] is not None)
        return chosen((o, w, lse)), grads

    def raw(inputs: Tensors):
        args, ops = arguments(inputs), torch.ops.seqkern
        o, w, lse = reference.additive_attention(*(arguments(tuple(t.detach() for t in inputs))))
        grad = inputs[0].requires_grad
        do, dlse = torch.ones_like(o).requires_grad_(grad), torch.ones_like(lse)
        dw = torch.ones_like(w).requires_grad_(grad) if weights else None
        needs = *[True] * 4, bias is not None
        backward = do, dw, dlse, o, lse, *args[:-1], *needs
        return [(ops.additive_attention, args), (ops.additive_attention_backward, backward)]

    small = B * Tq * Tk * D <= 500
    return OpCase(name, small, tensors, op, forward, reference_of, raw, autocast=4)


def additive_cases() -> list[OpCase]:
    """Odd and even sizes, one query, ragged and empty rows, masks, and every result's gradient."""
    case = additive_case
    return [
        case("plain"),
        case("weights", weights=True, scale=0.5),
        case("step", Tq=1, Tk=9, D=5, Dv=9, weights=True, lens=(9, 4)),
        case("lens", lens=(5, 0)),
        case("lens", B=5, Tq=4, Tk=17, D=33, Dv=9, lens=(17, 0, 1, 16, 3), weights=True, scale=2.0),
        case("mask", mask=(2, 3, 5), weights=True),
        case("mask", mask=(1, 4, 6), B=3, Tq=4, Tk=6, D=6, Dv=3, lens=(6, 2, 0)),
        case("mask", mask=(3, 1, 19), B=3, Tq=9, Tk=19, D=16, Dv=16),
        case("bias", bias=(2, 3, 5), weights=True, lens=(4, 2)),
        case("bias", bias=(1, 3, 1), D=6, Dv=1),
        case("bias", bias=(2, 1, 21), Tq=11, Tk=21, D=40, Dv=7, scale=0.3),
        case("large", B=3, Tq=37, Tk=70, D=65, Dv=33, lens=(70, 33, 64), weights=True),
        case("long", B=1, Tq=3, Tk=301, D=19, Dv=18),
        case("one", B=1, Tq=1, Tk=1, D=1, Dv=1, weights=True),
        case("empty", B=0),
        case("empty", Tq=0, bias=(1, 1, 5), weights=True),
        case("empty", Tk=0, weights=True),
    ]
