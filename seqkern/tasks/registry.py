"""The reference models by name, and the job that trains each; imported when asked for."""

from __future__ import annotations

import importlib
from dataclasses import fields
from typing import Any, NamedTuple

from torch import nn

from seqkern.tasks.job import Job, JobSpec


class Entry(NamedTuple):
    """Where a model's job, class and config are ("module:Name" below seqkern), and a line on it."""

    job: str
    model: str
    config: str
    about: str


MODELS: dict[str, Entry] = {
    "seq2seq": Entry(
        "tasks.translation:TranslationJob",
        "models.seq2seq:Seq2Seq",
        "models.seq2seq:Seq2SeqConfig",
        "encoder-decoder with a fixed vector (Sutskever et al., 2014; Cho et al., 2014)",
    ),
    "transformer": Entry(
        "tasks.translation:TranslationJob",
        "models.transformer:Transformer",
        "models.transformer:TransformerConfig",
        "encoder-decoder of attention alone (Vaswani et al., 2017)",
    ),
    "rnnsearch": Entry(
        "tasks.translation:TranslationJob",
        "models.rnnsearch:RNNSearch",
        "models.rnnsearch:RNNSearchConfig",
        "encoder-decoder with additive attention (Bahdanau et al., 2015)",
    ),
    "textcnn": Entry(
        "tasks.classify:ClassifyJob",
        "models.textcnn:TextCNN",
        "models.textcnn:TextCNNConfig",
        "sentences by convolution and max over time (Kim, 2014)",
    ),
    "bilstm": Entry(
        "tasks.classify:ClassifyJob",
        "models.bilstm:BiLSTMClassifier",
        "models.bilstm:BiLSTMConfig",
        "sentences by a BiLSTM and one of four pools (Conneau et al., 2017)",
    ),
    "self-attentive": Entry(
        "tasks.classify:ClassifyJob",
        "models.self_attentive:SelfAttentive",
        "models.self_attentive:SelfAttentiveConfig",
        "sentences by self-attention over a BiLSTM (Lin et al., 2017)",
    ),
    "pretrained": Entry(
        "tasks.finetune:FineTuneJob",
        "models.pretrained:PretrainedClassifier",
        "models.pretrained:PretrainedConfig",
        "a language model that becomes a classifier (Dai and Le, 2015)",
    ),
    "tagger": Entry(
        "tasks.tagging:TaggingJob",
        "models.tagger:BiLSTMTagger",
        "models.tagger:TaggerConfig",
        "a tag for each word by a BiLSTM, with letters and CRF as options (Lample et al., 2016)",
    ),
    "joint": Entry(
        "tasks.tagging:JointJob",
        "models.tagger:BiLSTMTagger",
        "models.tagger:TaggerConfig",
        "the intent of a sentence and its slots by one BiLSTM (Liu and Lane, 2016)",
    ),
    "rnnlm": Entry(
        "tasks.language:LanguageModelJob",
        "models.rnnlm:RNNLM",
        "models.rnnlm:RNNLMConfig",
        "RNN, LSTM or GRU language model (Mikolov et al., 2010; Zaremba et al., 2014)",
    ),
    "nnlm": Entry(
        "tasks.language:LanguageModelJob",
        "models.nnlm:NNLM",
        "models.nnlm:NNLMConfig",
        "neural probabilistic language model (Bengio et al., 2003)",
    ),
    "transformer-lm": Entry(
        "tasks.language:LanguageModelJob",
        "models.transformer_lm:TransformerLM",
        "models.transformer_lm:TransformerLMConfig",
        "decoder-only Transformer language model (Radford et al., 2019)",
    ),
    "hyperlstm": Entry(
        "tasks.language:LanguageModelJob",
        "models.hyperlstm:HyperLSTM",
        "models.hyperlstm:HyperLSTMConfig",
        "language model of an LSTM whose weights another sets (Ha et al., 2017)",
    ),
    "fast-weights": Entry(
        "tasks.retrieval:RetrievalJob",
        "models.fast_weights:FastWeights",
        "models.fast_weights:FastWeightsConfig",
        "recurrent net with a fast associative memory (Ba et al., 2016)",
    ),
    "treelstm": Entry(
        "tasks.trees:TreeJob",
        "models.treelstm:TreeLSTM",
        "models.treelstm:TreeLSTMConfig",
        "trees, child-sum or with a place for each child (Tai et al., 2015)",
    ),
    "graph": Entry(
        "tasks.graphs:GraphJob",
        "models.graph:GraphNet",
        "models.graph:GraphConfig",
        "gated message passing on labelled graphs (Li et al., 2016; Marcheggiani and Titov, 2017)",
    ),
}


def entry(model: str) -> Entry:
    """The entry of a model.

    Raises:
        ValueError: there is no such model.
    """
    if model not in MODELS:
        raise ValueError(f"model must be one of {', '.join(sorted(MODELS))}, got {model!r}")
    return MODELS[model]


def load(where: str) -> Any:
    """The object at "module:Name" below seqkern."""
    module, _, name = where.partition(":")
    return getattr(importlib.import_module(f"seqkern.{module}"), name)


def build_model(spec: JobSpec, **sizes: int) -> nn.Module:
    """The model of a spec.

    Args:
        spec: names it, with sizes and layers.
        sizes: those that follow from the data.

    Raises:
        ValueError: the spec has one of those sizes too, or an impossible one.
    """
    if given := sorted(spec.sizes.keys() & sizes.keys()):
        raise ValueError(f"{given} follow from data and reading, and are not for setting")
    found = entry(spec.model)
    return load(found.model)(load(found.config)(**sizes, **spec.sizes), spec.layers)


def make_job(spec: JobSpec, vocabularies: dict[str, dict[str, Any]] | None = None) -> Job:
    """The job of a spec; see Job for the arguments and for what is raised."""
    found = entry(spec.model)
    known = {field.name for field in fields(load(found.config))}
    if unknown := spec.sizes.keys() - known:
        raise ValueError(
            f"{sorted(unknown)}: not sizes of model {spec.model!r}, which has {sorted(known)}"
        )
    return load(found.job)(spec, vocabularies)
