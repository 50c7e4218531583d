"""Every attention layer, of torch.nn and of seqkern.nn, small and with the same weights."""

from typing import Any

import pytest
import torch
from torch import Tensor

import seqkern.nn

F64 = torch.float64
NAMES = (
    "MultiheadAttention",
    "TransformerEncoderLayer",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerDecoder",
    "Transformer",
)


def make(package: Any, name: str, **kwargs: Any) -> Any:
    """A module with E = 8 and two heads, batch first, in float64 unless said."""
    kwargs = {"batch_first": True, "dtype": F64, **kwargs}
    if name == "MultiheadAttention":
        return package.MultiheadAttention(8, 2, **kwargs)
    kwargs = {"dropout": 0.0, **kwargs}
    if name == "Transformer":
        return package.Transformer(8, 2, 1, 1, 12, **kwargs)
    if name.endswith("Layer"):
        return getattr(package, name)(8, 2, 12, **kwargs)
    layer = getattr(package, f"{name}Layer")(8, 2, 12, **kwargs)
    return getattr(package, name)(
        layer, 2, torch.nn.LayerNorm(8, dtype=kwargs["dtype"], device=kwargs.get("device"))
    )


def build(name: str, **kwargs: Any) -> tuple[Any, Any]:
    """torch's module and ours with the same weights."""
    theirs, ours = make(torch.nn, name, **kwargs), make(seqkern.nn, name, **kwargs)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


class Alone(torch.nn.Module):
    """A module of any of the classes as a function of one sequence."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.module, torch.nn.MultiheadAttention):
            return self.module(x, x, x, need_weights=False)[0]
        if hasattr(self.module, "multihead_attn") or hasattr(self.module, "decoder"):
            return self.module(x, x)
        return self.module(x, x) if "Decoder" in type(self.module).__name__ else self.module(x)


def alone(name: str, **kwargs: Any) -> tuple[Any, Any]:
    theirs, ours = build(name, **kwargs)
    return Alone(theirs), Alone(ours)


def results(module: Any, x: Tensor, call: Any = None) -> list[Tensor]:
    """The output and all gradients."""
    x = x.detach().clone().requires_grad_()
    y = (module if call is None else call)(x)
    inputs = [x, *module.parameters()]
    return [y.detach(), *torch.autograd.grad(y.sin().sum(), inputs)]


every_name = pytest.mark.parametrize("name", NAMES)
