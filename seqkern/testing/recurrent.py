"""Cases of the recurrent ops, on sizes that fit no vector register."""

import zlib

import torch
from torch import Tensor

from seqkern.ops.recurrent import recurrent
from seqkern.reference import recurrent as reference
from seqkern.reference.cells import GATES
from seqkern.testing.cases import OpCase, Tensors


def recurrent_case(
    mode: str,
    *,
    T: int = 2,
    B: int = 3,
    I: int = 3,
    H: int = 5,
    proj: int = 0,
    bidirectional: bool = False,
    bias: bool = True,
    lengths: tuple[int, ...] = (),
) -> OpCase:
    """One recurrent layer.

    Args:
        mode: "LSTM", "GRU", "RNN_TANH" or "RNN_RELU".
        T, B, I, H: steps, rows, inputs, hidden units.
        proj: size of the projection, 0 for none.
        bidirectional, bias: as in torch.nn.
        lengths: of the rows of a ragged batch, longest first; takes the place of T and B.
    """
    D, P = 1 + bidirectional, proj or H
    batch_sizes = None
    if lengths:
        T, B = lengths[0], len(lengths)
        batch_sizes = torch.tensor([sum(n > t for n in lengths) for t in range(T)])
    shapes = [(T, B, I) if batch_sizes is None else (sum(lengths), I), (D, B, P)]
    if mode == "LSTM":
        shapes.append((D, B, H))
    states = len(shapes)
    n = GATES[mode] * H
    for _ in range(D):
        shapes += [(n, I), (n, P)] + ([(n,), (n,)] if bias else []) + ([(P, H)] if proj else [])
    flags = ("bi", bidirectional), (f"P{proj}", proj), ("nobias", not bias), ("ragged", lengths)
    name = "-".join([mode, f"T{T}", f"B{B}", f"I{I}", f"H{H}", *(f for f, on in flags if on)])

    def tensors(dtype: torch.dtype) -> Tensors:
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        bound = H**-0.5

        def draw(i: int, shape: tuple[int, ...]) -> Tensor:
            values = torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1
            return (values * bound if i >= states else values).to(dtype)

        return tuple(draw(i, shape) for i, shape in enumerate(shapes))

    def split(inputs: Tensors) -> tuple[Tensor, Tensor, Tensor | None, list[Tensor]]:
        c0 = inputs[2] if mode == "LSTM" else None
        return inputs[0], inputs[1], c0, list(inputs[states:])

    def arguments(inputs: Tensors):
        x, h0, c0, weights = split(inputs)
        return x, batch_sizes, h0, c0, weights

    def op(*inputs: Tensor) -> Tensors:
        results = recurrent(mode, *split(inputs), batch_sizes=batch_sizes)
        return tuple(t for t in results if t is not None)

    def forward(*inputs: Tensor) -> Tensors:
        results = reference.recurrent(*arguments(inputs), mode)[:3]
        return tuple(t for t in results if t.dim() > 1)

    def reference_of(inputs: Tensors, grads: Tensors) -> tuple[Tensors, Tensors]:
        x, h0, c0, weights = split(inputs)
        y, h_n, c_n, gates, cells = reference.recurrent(x, batch_sizes, h0, c0, weights, mode)
        dy, dh_n, dc_n = (*grads, None)[:3]
        dx, dh0, dc0, dweights = reference.recurrent_backward(
            (dy, dh_n, dc_n), x, batch_sizes, h0, c0, weights, (y, gates, cells), mode
        )
        if c0 is None:
            return (y, h_n), (dx, dh0, *dweights)
        return (y, h_n, c_n), (dx, dh0, dc0, *dweights)

    def raw(inputs: Tensors):
        grad = inputs[0].requires_grad
        ops, call = torch.ops.seqkern, arguments(inputs)
        plain = arguments(tuple(t.detach() for t in inputs))
        y, _, _, gates, cells = reference.recurrent(*plain, mode)
        dy = torch.ones_like(y)
        if batch_sizes is None:
            # The second derivative runs in Python over the steps of a ragged batch, which are
            # values of a tensor: it cannot be traced, and is called on constants here.
            plain, dy = call, dy.requires_grad_(grad)
        backward = (dy, None, None, *plain, y, gates, cells, mode, True, True)
        listed = [(ops.recurrent, (*call, mode)), (ops.recurrent_backward, backward)]
        if not grad:
            listed.append((ops.recurrent_inference, (*call, [], mode)))
        return listed

    small = T <= 3 and H <= 5
    return OpCase(name, small, tensors, op, forward, reference_of, raw)


def recurrent_cases() -> list[OpCase]:
    """All modes; one step and several, one row and several, ragged, projected, empty."""
    case = recurrent_case
    cases = [
        case("LSTM", T=9, B=7, I=3, H=64),
        case("LSTM", T=9, B=7, I=17, H=33, bidirectional=True, proj=5),
        case("LSTM", T=3, B=2, I=1, H=1, bias=False),
        case("LSTM", T=3, B=3, I=4, H=5, proj=2, bidirectional=True),
        case("LSTM", T=2, B=33, I=5, H=48),
        case("LSTM", I=6, H=16, lengths=(9, 9, 4, 1, 1)),
        case("LSTM", I=2, H=33, lengths=(9, 5, 2), bidirectional=True, proj=3, bias=False),
        case("LSTM", lengths=(3, 1), bidirectional=True),
        case("LSTM", T=1, B=0, bidirectional=True),
    ]
    for mode in GATES:
        if mode != "LSTM":
            cases += [
                case(mode, T=9, B=7, I=3, H=64),
                case(mode, T=3, B=2, I=1, H=1, bias=False),
                case(mode, T=3, B=3, I=4, H=5, bidirectional=True),
                case(mode, I=5, H=33, lengths=(9, 5, 5, 2), bidirectional=True, bias=False),
                case(mode, lengths=(3, 1)),
            ]
        cases += [case(mode, T=1, B=1, I=7, H=16), case(mode, T=2, B=0, I=2, H=3)]
    return cases
