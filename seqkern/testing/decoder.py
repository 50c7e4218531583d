"""Cases of the decoder ops: every cell, beams, ragged sources, on sizes that fit no register."""

import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from seqkern.ops.decoder import attention_decoder
from seqkern.reference import decoder as reference
from seqkern.reference.cells import GATES
from seqkern.reference.recurrent import accumulation_dtype
from seqkern.testing.cases import OpCase, Tensors


def decoder_case(
    mode: str,
    *,
    T: int = 2,
    B: int = 2,
    K: int = 1,
    Tk: int = 3,
    I: int = 3,
    H: int = 5,
    A: int = 4,
    C: int = 3,
    bias: bool = True,
    lens: Sequence[int] = (),
) -> OpCase:
    """One decoder.

    Args:
        mode: "LSTM", "GRU", "RNN_TANH" or "RNN_RELU".
        T, B, K, Tk, I, H, A, C: steps, sources, rows of each source, positions, inputs, hidden
            units, units of the attention, features of a value.
        bias: whether b_q, b_ih and b_hh are given.
        lens: k_lens; all positions if empty.
    """
    N, G = B * K, GATES[mode] * H
    k_lens = torch.tensor(lens, dtype=torch.int32) if lens else None
    shapes = {"x": (N, T, I), "s_0": (N, H)}
    if mode == "LSTM":
        shapes["c_0"] = (N, H)
    shapes |= {"key": (B, Tk, A), "value": (B, Tk, C), "w_q": (A, H), "v": (A,)}
    shapes |= {"w_ih": (G, I + C), "w_hh": (G, H)}
    if bias:
        shapes |= {"b_q": (A,), "b_ih": (G,), "b_hh": (G,)}
    sizes = f"T{T}-B{B}-K{K}-Tk{Tk}-I{I}-H{H}-A{A}-C{C}"
    flags = ("nobias", not bias), ("ragged", lens)
    name = "-".join(["decoder", mode, sizes, *(f for f, on in flags if on)])

    def tensors(dtype: torch.dtype) -> Tensors:
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))

        def draw(name: str, shape: tuple[int, ...]) -> Tensor:
            values = torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1
            scaled = name[:2] in ("w_", "b_")
            return (values * H**-0.5 if scaled else values).to(dtype)

        return tuple(draw(name, shape) for name, shape in shapes.items())

    def by_name(inputs: Tensors) -> dict[str, Tensor]:
        return dict(zip(shapes, inputs, strict=True))

    def there(t: Tensor) -> Tensor | None:
        return None if k_lens is None else k_lens.to(t.device)

    def op(*inputs: Tensor) -> Tensors:
        n = by_name(inputs)
        state = (n["s_0"], n["c_0"]) if mode == "LSTM" else n["s_0"]
        attention = n["w_q"], n.get("b_q"), n["v"]
        cell = n["w_ih"], n["w_hh"], n.get("b_ih"), n.get("b_hh")
        s, contexts, weights, state = attention_decoder(
            n["x"], state, n["key"], n["value"], attention, cell, mode=mode, k_lens=there(n["key"])
        )
        return (s, contexts, weights, state[1]) if mode == "LSTM" else (s, contexts, weights)

    def arguments(inputs: Tensors) -> reference.Arguments:
        n = by_name(inputs)
        acc = accumulation_dtype(n["x"].dtype)
        w_ih = n["w_ih"]
        gates_x = n["x"].to(acc) @ w_ih[:, :I].to(acc).t()
        gates_x = gates_x + n["b_ih"].to(acc) if bias else gates_x
        return reference.Arguments(
            gates_x,
            n["s_0"],
            n.get("c_0"),
            n["key"],
            n["value"],
            there(n["key"]),
            n["w_q"],
            n.get("b_q"),
            n["v"],
            w_ih[:, I:],
            n["w_hh"],
            n.get("b_hh"),
            mode,
        )

    def forward(*inputs: Tensor) -> Tensors:
        return reference.attention_decoder(*arguments(inputs))[: 3 + (mode == "LSTM")]

    def reference_of(inputs: Tensors, grads: Tensors) -> tuple[Tensors, Tensors]:
        n, args = by_name(inputs), arguments(inputs)
        results = reference.attention_decoder(*args)
        s, contexts, weights, _, *rest = results
        saved = reference.Saved(s, contexts, weights, *rest)
        ds, dcontexts, dweights, dc_n = (*grads, None)[:4]
        dgates_x, dproducts, dh0, dc0, dkey, dvalue, dv = reference.attention_decoder_backward(
            ds, dcontexts, dweights, dc_n, saved, *args
        )
        dw, db, dw_c = reference.weight_gradients(dgates_x, dproducts, n["s_0"], s, contexts)
        dtype, flat = n["x"].dtype, dgates_x.flatten(0, 1)
        dw_x = (flat.t() @ n["x"].flatten(0, 1).to(flat.dtype)).to(dtype)
        dx = (dgates_x @ n["w_ih"][:, :I].to(flat.dtype)).to(dtype)
        derived = {"x": dx, "s_0": dh0, "c_0": dc0, "key": dkey, "value": dvalue, "v": dv}
        derived |= {"w_q": dw[:A], "w_hh": dw[A:], "w_ih": torch.cat([dw_x, dw_c], 1)}
        derived |= {"b_q": db[:A], "b_hh": db[A:], "b_ih": flat.sum(0).to(dtype)}
        return results[: len(grads)], tuple(derived[name] for name in shapes)

    def raw(inputs: Tensors):
        ops, grad = torch.ops.seqkern, inputs[0].requires_grad

        def leaf(t: Any) -> Any:
            floating = isinstance(t, Tensor) and t.dtype.is_floating_point
            return t.detach().requires_grad_(grad) if floating else t

        args = tuple(map(leaf, arguments(inputs)))
        s, contexts, weights, _, *rest = (
            t.detach() for t in reference.attention_decoder(*arguments(inputs))
        )
        grads = [torch.ones_like(t).requires_grad_(grad) for t in (s, contexts, weights)]
        backward = (*grads, None, s, contexts, weights, *rest, *args)
        listed = [(ops.attention_decoder, args), (ops.attention_decoder_backward, backward)]
        if not grad:
            listed.append((ops.attention_decoder_inference, args))
        return listed

    small = T <= 3 and H <= 5
    return OpCase(name, small, tensors, op, forward, reference_of, raw)


def decoder_cases() -> list[OpCase]:
    """All modes; one step and several, beams, empty and ragged sources, no rows."""
    case = decoder_case
    cases = [
        case("GRU", T=5, B=3, K=4, Tk=9, I=7, H=33, A=17, C=21, lens=(9, 1, 4)),
        case(
            "GRU", T=7, B=31, Tk=8, I=6, H=64, A=64, C=64, lens=(8, 3, 5, 7, 0, 2, 1) * 4 + (6,) * 3
        ),
        case("GRU", T=2, B=2, K=2, Tk=4, lens=(0, 3)),
        case("LSTM", T=4, B=2, K=3, Tk=17, I=5, H=48, A=9, C=40, lens=(17, 6)),
        case("LSTM", T=2, B=2, K=2, Tk=4, lens=(2, 4), bias=False),
    ]
    for mode in GATES:
        cases += [
            case(mode, T=3, B=7, Tk=5, I=3, H=16, A=32, C=8),
            case(mode, T=2, B=1, K=1, Tk=1, I=1, H=1, A=1, C=1, bias=False),
            case(mode, T=1, B=0, Tk=2),
        ]
    return [*cases, case("GRU", Tk=0), case("RNN_RELU", T=2, B=2, K=2, Tk=4, lens=(4, 2))]
