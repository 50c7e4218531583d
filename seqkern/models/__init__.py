"""Reference models, one file each; they train through seqkern's layers or torch's alike."""

from seqkern.models.bilstm import BiLSTMClassifier, BiLSTMConfig
from seqkern.models.fast_weights import FastWeights, FastWeightsConfig
from seqkern.models.graph import GraphConfig, GraphNet
from seqkern.models.hyperlstm import HyperLSTM, HyperLSTMConfig
from seqkern.models.nnlm import NNLM, NNLMConfig
from seqkern.models.pretrained import PretrainedClassifier, PretrainedConfig
from seqkern.models.rnnlm import RNNLM, RNNLMConfig
from seqkern.models.rnnsearch import RNNSearch, RNNSearchConfig
from seqkern.models.self_attentive import SelfAttentive, SelfAttentiveConfig
from seqkern.models.seq2seq import Seq2Seq, Seq2SeqConfig
from seqkern.models.tagger import BiLSTMTagger, TaggerConfig
from seqkern.models.textcnn import TextCNN, TextCNNConfig
from seqkern.models.transformer import Transformer, TransformerConfig
from seqkern.models.transformer_lm import TransformerLM, TransformerLMConfig
from seqkern.models.treelstm import TreeLSTM, TreeLSTMConfig

__all__ = [
    "NNLM",
    "RNNLM",
    "BiLSTMClassifier",
    "BiLSTMConfig",
    "BiLSTMTagger",
    "FastWeights",
    "FastWeightsConfig",
    "GraphConfig",
    "GraphNet",
    "HyperLSTM",
    "HyperLSTMConfig",
    "NNLMConfig",
    "PretrainedClassifier",
    "PretrainedConfig",
    "RNNLMConfig",
    "RNNSearch",
    "RNNSearchConfig",
    "SelfAttentive",
    "SelfAttentiveConfig",
    "Seq2Seq",
    "Seq2SeqConfig",
    "TaggerConfig",
    "TextCNN",
    "TextCNNConfig",
    "Transformer",
    "TransformerConfig",
    "TransformerLM",
    "TransformerLMConfig",
    "TreeLSTM",
    "TreeLSTMConfig",
]
