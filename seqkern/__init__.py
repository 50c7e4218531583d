"""Custom kernels for sequence models, behind drop-in PyTorch layers."""

__version__ = "0.1.0"
