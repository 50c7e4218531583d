"""What the fuzz tests of the raw ops share: arguments spoilt or laid out at random, and what came
of a call."""

import random
from collections.abc import Callable

import torch
from torch import Tensor

REFUSALS = (RuntimeError, ValueError, TypeError, NotImplementedError)


def spoilt_tensor(r: random.Random, t: Tensor) -> Tensor:
    """Another rank, size, dtype, stride or nothing; some of these are still correct."""
    kind = r.randrange(9)
    dim = r.randrange(t.dim()) if t.dim() else 0
    if kind == 0 and t.dim():
        return t.narrow(dim, 0, max(t.size(dim) - 1, 0))
    if kind == 1 and t.dim():
        return torch.cat([t, t.narrow(dim, 0, min(1, t.size(dim)))], dim)
    if kind == 2:
        return t.unsqueeze(r.randint(0, t.dim()))
    if kind == 3:
        return t.flatten()
    if kind == 4:
        return t.to(r.choice([torch.float64, torch.float16, torch.int64, torch.bool]))
    if kind == 5 and t.dim():
        return t.narrow(dim, 0, 0)
    if kind == 6:
        return torch.empty_like(t, device="meta")
    if kind == 7:
        return t.transpose(0, -1) if t.dim() > 1 else t
    return t.new_zeros(()).expand(t.shape)


def relaid_tensor(r: random.Random, t: Tensor) -> Tensor:
    """The same values in another order, or with NaN between them."""
    if t.dim() > 1 and r.random() < 0.5:
        dim = r.randrange(t.dim() - 1)
        return t.transpose(dim, -1).contiguous().transpose(dim, -1)
    if not t.is_floating_point():
        return t
    pairs = t.new_full((*t.shape, 2), torch.nan)
    pairs[..., 0] = t
    return pairs[..., 0]


def single_tensor(t: Tensor) -> Tensor:
    """One value for all elements, with NaN behind it where a dense tensor would have others."""
    row = t.new_full((t.numel() + 1,), torch.nan if t.is_floating_point() else 1)
    row[0] = 0.5
    return row[0].expand(t.shape)


def outcome(op: Callable, arguments: list) -> str:
    """ "refused" or "computed"; every other exception goes through."""
    try:
        op(*arguments)
    except REFUSALS:
        return "refused"
    return "computed"
