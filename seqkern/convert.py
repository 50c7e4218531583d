"""``convert``: put seqkern's layers in the place of torch.nn's in a built model."""

from typing import NamedTuple

import torch
from torch.nn.utils import parametrize

from seqkern import nn
from seqkern.nn.transformer import REPLACEMENTS

_REPLACEMENTS: dict[type, type] = {
    torch.nn.RNN: nn.RNN,
    torch.nn.LSTM: nn.LSTM,
    torch.nn.GRU: nn.GRU,
    torch.nn.RNNCell: nn.RNNCell,
    torch.nn.LSTMCell: nn.LSTMCell,
    torch.nn.GRUCell: nn.GRUCell,
    **REPLACEMENTS,
}


class Swapped(NamedTuple):
    """A module whose class was changed; ``name`` is its path, "" for the root."""

    name: str
    old: type
    new: type


class Left(NamedTuple):
    """A module of one of torch.nn's classes that was not changed, and why."""

    name: str
    type: type
    reason: str


class Conversion(NamedTuple):
    """What ``convert`` did; a module reached by several paths is listed under the first."""

    swapped: list[Swapped]
    left: list[Left]


def convert(model: torch.nn.Module) -> Conversion:
    """Turn the layers of torch.nn in ``model`` that seqkern has too into seqkern's, in place.

    These are RNN, LSTM, GRU and their cells, MultiheadAttention, Transformer, and its encoder,
    decoder and their layers; each on its own, so a layer inside a module that is left alone is
    converted nevertheless.

    Each module stays the same object and only changes its class, so parameters, optimizers that
    hold them, hooks, training mode, sharing, parametrizations and references to the module from
    elsewhere stay as they are; ``model`` may itself be such a layer. A second call finds nothing
    to do.

    Left alone, and named with the reason in the result, are modules that would not behave the
    same: subclasses of torch.nn's classes (their own code may rely on the base), and modules
    with a ``forward`` of their own instance. Call ``convert`` before ``fully_shard``, which
    makes such a subclass, and before ``torch.compile``, but after ``quantize_dynamic``: that
    finds the recurrent layers of torch.nn alone, and what it has quantised stays as it is.

    Args:
        model: any module.

    Returns:
        ``Conversion(swapped, left)``, in the order of ``model.named_modules()``.

    Raises:
        TypeError: ``model`` is no ``torch.nn.Module``.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"convert: model must be a torch.nn.Module, got {type(model).__name__}")
    result = Conversion([], [])
    for name, module in model.named_modules():
        if isinstance(module, tuple(_REPLACEMENTS.values())):
            continue
        if not isinstance(module, tuple(_REPLACEMENTS)):
            continue
        old = type(module)
        reason = _reason_to_leave(module)
        if reason:
            result.left.append(Left(name, old, reason))
            continue
        new = _replacement(module)
        # seqkern's layers read the weights by name and keep no list that could be stale.
        module.__dict__.pop("_flat_weights", None)
        module.__class__ = new
        result.swapped.append(Swapped(name, old, new))
    return result


def _plain_class(module: torch.nn.Module) -> type:
    """The class of a module before its parametrizations, which subclass it for one instance."""
    return type(module).__bases__[0] if parametrize.is_parametrized(module) else type(module)


def _reason_to_leave(module: torch.nn.Module) -> str:
    plain = _plain_class(module)
    if plain not in _REPLACEMENTS:
        return f"{plain.__qualname__} is a subclass with code of its own"
    if "forward" in vars(module):
        return "forward is replaced on the instance"
    return ""


def _replacement(module: torch.nn.Module) -> type:
    new = _REPLACEMENTS[_plain_class(module)]
    if not parametrize.is_parametrized(module):
        return new
    # The same properties that parametrize put on the old class, over the new one.
    own = {k: v for k, v in vars(type(module)).items() if k not in ("__dict__", "__weakref__")}
    return type(type(module).__name__, (new,), own)
