"""Inputs of additive attention and its plain formula, for the tests of the op and the layers."""

import torch
from torch import Tensor

import seqkern

F64 = torch.float64


def draw(*shape: int, dtype: torch.dtype = F64, grad: bool = True) -> Tensor:
    return torch.randn(shape, dtype=dtype).requires_grad_(grad)


def inputs_of(B=2, Tq=3, Tk=5, D=7, Dv=4, **options) -> list[Tensor]:
    """query, key, value and v."""
    return [draw(*shape, **options) for shape in ((B, Tq, D), (B, Tk, D), (B, Tk, Dv), (D,))]


def eager(query, key, value, v, *, k_lens=None, mask=None, scale=1.0):
    """o, weights and lse, written as anyone would."""
    scores = scale * ((query.unsqueeze(2) + key.unsqueeze(1)).tanh() * v).sum(-1)
    if k_lens is not None:
        real = torch.arange(key.size(1)) < k_lens.unsqueeze(1)
        scores = scores.masked_fill(~real.unsqueeze(1), -torch.inf)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        scores = scores + mask
    # The softmax of a row of -inf is NaN: it is computed on zeros and thrown away.
    empty = (scores == -torch.inf).all(-1, keepdim=True)
    weights = scores.masked_fill(empty, 0).softmax(-1).masked_fill(empty, 0)
    lse = scores.masked_fill(empty, 0).logsumexp(-1).masked_fill(empty.squeeze(-1), -torch.inf)
    return weights @ value, weights, lse


def attend(*inputs: Tensor, **options) -> tuple[Tensor, Tensor, Tensor]:
    """o, weights and lse of the public function."""
    return seqkern.additive_attention(*inputs, return_weights=True, return_lse=True, **options)


def assert_close(actual, expected) -> None:
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-11)
