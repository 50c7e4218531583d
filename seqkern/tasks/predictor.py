"""A trained model ready to decode: everything it needs comes from its checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from seqkern.models.rnnsearch import RNNSearch, RNNSearchConfig
from seqkern.tasks import checkpoint
from seqkern.tasks.data import Pair, pad_sources, references
from seqkern.tasks.decoding import beam_search, decode
from seqkern.tasks.metrics import ErrorRates, error_rates
from seqkern.tasks.task import Task
from seqkern.tasks.training import Trainer
from seqkern.tasks.vocab import SPECIALS, UNKNOWN, Vocab

MAX_LENGTH = 48  # of a target; the longest of the dictionary has 28 phonemes


class Alignment(NamedTuple):
    """Symbols of one source and its decoded target, weights (Ly, Tx) with EOS's row last."""

    source: tuple[str, ...]
    target: tuple[str, ...]
    weights: Tensor


class Predictor:
    """Decodes with a model in eval mode.

    Args:
        model: the model; it is put in eval mode.
        task: how text becomes symbols.
        source, target: vocabularies.
    """

    def __init__(self, model: RNNSearch, task: Task, source: Vocab, target: Vocab) -> None:
        self.model, self.task = model.eval(), task
        self.source, self.target = source, target

    @classmethod
    def of(cls, trainer: Trainer) -> Predictor:
        """The model of a trainer as it is now; training on changes it."""
        return cls(trainer.model, trainer.task, trainer.source, trainer.target)

    @classmethod
    def load(cls, path: Path, layers: str | None = None) -> tuple[Predictor, dict[str, Any]]:
        """The model of a checkpoint, and the checkpoint; `layers` as in Trainer.resume."""
        content = checkpoint.load(path)
        config = RNNSearchConfig(**content["model_config"])
        source, target = (Vocab(content[side][len(SPECIALS) :]) for side in ("source", "target"))
        for side, vocab in (("source", source), ("target", target)):
            symbols = getattr(config, f"{side}_symbols")
            if symbols != len(vocab):
                raise ValueError(
                    f"{path}: the model has {symbols} {side} symbols, the vocabulary {len(vocab)}"
                )
        model = RNNSearch(config, layers or content["layers"])
        model.load_state_dict(content["model"])
        return cls(model, Task(**content["task"]), source, target), content

    def symbols_of(self, text: str) -> tuple[str, ...]:
        """The symbols of one source.

        Raises:
            ValueError: it is empty, or has a symbol that the training data had not.
        """
        symbols = self.task.source_of(text)
        numbers = self.source.encode(symbols)
        if not symbols or UNKNOWN in numbers:
            unknown = [s for s, n in zip(symbols, numbers, strict=True) if n == UNKNOWN]
            what = f"symbols {unknown} are not in the training data" if symbols else "is empty"
            raise ValueError(f"cannot decode {text!r}: {what}")
        return symbols

    def decode(self, sources: Sequence[Sequence[str]], beam: int = 4) -> list[tuple[str, ...]]:
        """The best target of each source."""
        return decode(
            self.model, sources, self.source, self.target, beam=beam, max_length=MAX_LENGTH
        )

    def evaluate(self, pairs: Sequence[Pair], beam: int = 4) -> ErrorRates:
        """Error rates over the distinct sources of `pairs`, all their targets as references."""
        answers = references(pairs)
        return error_rates(self.decode(list(answers), beam), list(answers.values()))

    def align(self, source: Sequence[str], beam: int = 4) -> Alignment:
        """The best target of a source with its alignment."""
        x, lengths = pad_sources([self.source.encode(source)])
        best = beam_search(self.model, x, lengths, beam=beam, max_length=MAX_LENGTH)
        target = self.target.decode(best.y[0].tolist())
        return Alignment(tuple(source), target, best.alignment[0, : len(target) + 1])
