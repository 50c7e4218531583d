"""Inputs of the attention functions that their tests share."""

import torch
from torch import Tensor


def draw(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
    return torch.randn(shape, dtype=dtype, requires_grad=grad)


def qkv(B=2, H=4, Hkv=4, Tq=7, Tk=9, D=8, Dv=8, **options) -> tuple[Tensor, Tensor, Tensor]:
    sizes = (B, H, Tq, D), (B, Hkv, Tk, D), (B, Hkv, Tk, Dv)
    q, k, v = (draw(*size, **options) for size in sizes)
    return q, k, v
