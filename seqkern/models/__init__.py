"""Reference models, one file each; they train through seqkern's layers or torch's alike."""

from seqkern.models.rnnsearch import RNNSearch, RNNSearchConfig
from seqkern.models.seq2seq import Seq2Seq, Seq2SeqConfig
from seqkern.models.transformer import Transformer, TransformerConfig

__all__ = [
    "RNNSearch",
    "RNNSearchConfig",
    "Seq2Seq",
    "Seq2SeqConfig",
    "Transformer",
    "TransformerConfig",
]
