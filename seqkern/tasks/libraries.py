"""Optional packages, imported when they are needed."""

from __future__ import annotations

import importlib
from typing import Any


def library(module: str, package: str, what: str, extra: str = "models") -> Any:
    """A module of an optional package.

    Args:
        module: its name in Python.
        package: its name for pip.
        what: what needs it, for the message.
        extra: the extra of this package that installs it.

    Raises:
        ModuleNotFoundError: it is not installed; the message says how to.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{what} needs the package {package}: pip install 'seqkern[{extra}]'"
        ) from error
