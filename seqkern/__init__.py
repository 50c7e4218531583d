"""Custom kernels for sequence models, behind drop-in PyTorch layers."""

from seqkern import _extension as _extension
from seqkern.convert import convert as convert

__version__ = "0.1.0"

__all__ = ["__version__", "convert"]
