"""Reference models, one file each; they train through seqkern's layers or torch's alike."""

from seqkern.models.rnnsearch import RNNSearch, RNNSearchConfig

__all__ = ["RNNSearch", "RNNSearchConfig"]
