"""What the reference models share: which layers they stand on, and the check of their sizes."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from torch import nn

import seqkern.nn

LAYERS = ("seqkern", "torch")


def layers_named(layers: str) -> ModuleType:
    """The namespace that a model takes its recurrent and attention layers from.

    Args:
        layers: "seqkern" for seqkern.nn, "torch" for torch.nn.

    Raises:
        ValueError: another name.
    """
    if layers not in LAYERS:
        raise ValueError(f"layers must be one of {LAYERS}, got {layers!r}")
    return seqkern.nn if layers == "seqkern" else nn


SYMBOLS = ("pad", "bos", "start")  # fields of a config that are numbers of symbols


def check_sizes(config: Any, shares: tuple[str, ...] = (), free: tuple[str, ...] = ()) -> None:
    """Raises ValueError unless the numbers of a config are possible.

    Args:
        config: a dataclass; what is neither in SYMBOLS, nor in `shares` nor in `free`, and is a
            number, is a size and must be at least 1.
        shares: fields that are probabilities, in [0, 1).
        free: fields that are checked elsewhere, or may be anything.
    """
    known = min((n for name, n in vars(config).items() if name.endswith("symbols")), default=0)
    for name, value in vars(config).items():
        if name in shares:
            if not 0 <= value < 1:
                raise ValueError(f"{name} must be in [0, 1), got {value}")
        elif name not in (*free, *SYMBOLS) and type(value) in (int, float) and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    for name in SYMBOLS:
        if name in vars(config) and not 0 <= getattr(config, name) < known:
            raise ValueError(f"{name} must be in 0 .. {known - 1}, got {getattr(config, name)}")
