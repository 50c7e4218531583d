"""Loads the C++ kernels, which replace the reference on the devices they were built for."""

import importlib
import warnings

# torch first: the extension's symbols are found in the libraries that torch loads.
import torch


def _load() -> str | None:
    """Imports seqkern._C; returns None, or the reason why the reference serves instead."""
    try:
        importlib.import_module("seqkern._C")
    except ModuleNotFoundError as error:
        return "it was not built" if error.name == "seqkern._C" else str(error)
    except ImportError as error:
        warnings.warn(
            f"seqkern's C++ kernels do not load, the PyTorch reference serves: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return str(error)
    return None


def cpu_capability() -> str | None:
    """The instruction set that the C++ kernels chose; None where they are absent."""
    return torch.ops.seqkern.cpu_capability() if ERROR is None else None


ERROR = _load()
