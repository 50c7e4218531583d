"""Custom kernels for sequence models, behind drop-in PyTorch layers."""

from seqkern import _extension as _extension

__version__ = "0.1.0"

__all__ = ["__version__"]
