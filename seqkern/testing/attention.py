"""Cases of the attention ops: every feature, alone and together, on sizes that fit no tile."""

import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from seqkern.ops._attention_autograd import BIAS, DERIVED, SINKS
from seqkern.ops.attention import attention, attention_varlen
from seqkern.reference import attention as reference
from seqkern.testing.cases import OpCase, Tensors


def attention_case(
    label: str,
    *,
    B: int = 2,
    H: int = 4,
    Hkv: int = 2,
    Tq: int = 3,
    Tk: int = 5,
    D: int = 4,
    Dv: int = 4,
    lens: tuple[Sequence[int], Sequence[int]] | None = None,
    packed: tuple[Sequence[int], Sequence[int]] | None = None,
    bias: tuple[int, int, int, int] | None = None,
    **options,
) -> OpCase:
    """One attention.

    Args:
        label: of the features, for the name.
        B, H, Hkv, Tq, Tk, D, Dv: the sizes.
        lens: of the queries and of the keys.
        packed: the same for packed sequences; takes the place of B, Tq and Tk.
        bias: its shape.
        options: causal, window_left, window_right, softcap, dropout_p as in the op; mask, alibi
            and sinks, whether there are any.
    """
    if packed is not None:
        Tq, Tk = (max(n) for n in packed)
        shapes = [(sum(packed[0]), H, D), (sum(packed[1]), Hkv, D), (sum(packed[1]), Hkv, Dv)]
        B = len(packed[0])
    else:
        shapes = [(B, H, Tq, D), (B, Hkv, Tk, D), (B, Hkv, Tk, Dv)]
    shapes += [bias] if bias is not None else []
    shapes += [(H,)] if options.get("sinks") else []
    name = f"attention-{label}-B{B}-H{H}-{Hkv}-Tq{Tq}-Tk{Tk}-D{D}-{Dv}"

    def draw(shape: tuple[int, ...], salt: int) -> Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + salt)
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def tensors(dtype: torch.dtype) -> Tensors:
        return tuple(draw(shape, i).to(dtype) for i, shape in enumerate(shapes))

    def int32(lengths: Sequence[int]) -> Tensor:
        return torch.tensor(lengths, dtype=torch.int32)

    mask = draw((B, 1, Tq, Tk), 10) > -0.5 if options.get("mask") else None
    slopes = draw((H,), 11).abs().float() if options.get("alibi") else None

    def arguments(inputs: Tensors) -> tuple[Any, ...]:
        q, others = inputs[0], iter(inputs[3:])
        args: list = [*inputs[:3], *[None] * 9]

        def there(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.to(q.device)

        if bias is not None:
            args[BIAS] = next(others)
        if options.get("sinks"):
            args[SINKS] = next(others)
        args[3], args[7] = there(mask), there(slopes)
        if lens is not None:
            args[5], args[6] = (there(int32(n)) for n in lens)
        if options.get("dropout_p"):
            args[9] = there(torch.tensor([2**40 + 17]))
        if packed is not None:
            args[10], args[11] = (there(int32([0, *n]).cumsum(0).int()) for n in packed)
        sides = options.get("window_left", -1), options.get("window_right", -1)
        factors = options.get("softcap", 0.0), options.get("dropout_p", 0.0), D**-0.5
        return *args, options.get("causal"), *sides, *factors, Tq, Tk, True

    def finite(results: Tensors) -> Tensors:
        """o, and lse in o's dtype without the infinities of empty rows."""
        o, lse = results
        return o, lse.masked_fill(lse == -torch.inf, 0).to(o.dtype)

    def op(*inputs: Tensor) -> Tensors:
        q, k, v, *extras = arguments(inputs)
        mask, bias, q_lens, k_lens, slopes, sinks, seed, cu_q, cu_k, causal = extras[:10]
        left, right, softcap, dropout_p, scale, max_q, max_k, _ = extras[10:]
        keywords: dict[str, Any] = {
            "causal": causal,
            "mask": mask,
            "bias": bias,
            "window": tuple(None if n < 0 else n for n in (left, right)),
            "alibi_slopes": slopes,
            "softcap": softcap or None,
            "sinks": sinks,
            "dropout_p": dropout_p,
            "dropout_seed": seed,
            "scale": scale,
            "return_lse": True,
        }
        if packed is not None:
            return finite(attention_varlen(q, k, v, cu_q, cu_k, max_q, max_k, **keywords))
        return finite(attention(q, k, v, q_lens=q_lens, k_lens=k_lens, **keywords))

    def forward(*inputs: Tensor) -> Tensors:
        return finite(reference.attention(*arguments(inputs)))

    def reference_of(inputs: Tensors, grads: Tensors) -> tuple[Tensors, Tensors]:
        args = arguments(inputs)
        o, lse = reference.attention(*args)
        given: tuple[Any, ...] = *grads, o, lse, *args, True, True, True
        derived = reference.attention_backward(*given)
        grads = tuple(g for i, g in zip(DERIVED, derived, strict=True) if args[i] is not None)
        return finite((o, lse)), grads

    def raw(inputs: Tensors):
        args, ops = arguments(inputs), torch.ops.seqkern
        o, lse = reference.attention(*arguments(tuple(t.detach() for t in inputs)))
        do = torch.ones_like(o).requires_grad_(inputs[0].requires_grad)
        backward = (do, None, o, lse, *args, True, True, bias is not None)
        return [(ops.attention, args), (ops.attention_backward, backward)]

    small = B * H * Tq * Tk <= 150
    return OpCase(name, small, tensors, op, forward, reference_of, raw, autocast=3)


def attention_cases() -> list[OpCase]:
    """Each feature alone where PyTorch's function serves, and the rest in company."""
    case = attention_case
    window: dict[str, Any] = {"window_left": 2, "window_right": 1}
    return [
        case("plain", Hkv=4),
        case("plain", Tq=17, Tk=33, D=8, Dv=8),
        case("causal", causal="top_left", Tq=5),
        case("causal", causal="bottom_right", Tq=5, Tk=3),
        case("causal", causal="bottom_right", Tq=63, Tk=97, D=16, Dv=16, lens=((63, 9), (50, 97))),
        case("lens", lens=((3, 0), (5, 2))),
        case("lens", lens=((2, 3), (0, 5)), causal="bottom_right", softcap=2.0, sinks=True),
        case("mask", mask=True, bias=(1, 4, 1, 5)),
        case("mask", mask=True, bias=(2, 1, 3, 5), causal="top_left", dropout_p=0.3),
        case("window", causal="bottom_right", **window, alibi=True, Tq=9, Tk=9),
        case("bias", bias=(2, 1, 3, 1), Dv=4),
        case("window", **window, alibi=True, bias=(1, 1, 3, 1), sinks=True, Dv=7),
        case("sinks", sinks=True, Hkv=1, Tq=1),
        case("dropout", dropout_p=0.4, sinks=True, lens=((3, 3), (0, 4))),
        case("packed", packed=((2, 0, 3), (4, 1, 0)), causal="bottom_right"),
        case("packed", packed=((2, 1), (4, 3)), bias=(1, 4, 2, 4), softcap=1.5, dropout_p=0.2),
        case("one", B=1, H=1, Hkv=1, Tq=1, Tk=1, D=1, Dv=1),
        case("empty", B=0),
        case("empty", Tq=0),
        case("empty", Tk=0, sinks=True),
    ]
