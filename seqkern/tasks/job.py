"""A job: one model on one task, as the trainer and the commands see it.

A task's module (classify.py, tagging.py, language.py, translation.py, trees.py, ...) subclasses Job
and says how its data is read, cut into batches, scored and predicted; everything else, training,
resuming, early stopping, the commands, is the same for all.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from seqkern.tasks.batches import Batches, Stream
from seqkern.tasks.subwords import Subwords
from seqkern.tasks.vocab import Labels, Vocab


def restore_vocabulary(state: dict[str, Any]) -> Vocab | Labels | Subwords:
    """The vocabulary whose `state()` this is.

    Raises:
        ValueError: the kind is none of ours.
    """
    kinds = {"symbols": Vocab, "labels": Labels}
    if state.get("kind") == "subwords":
        return Subwords(state["model"])
    if state.get("kind") not in kinds:
        raise ValueError(f"a vocabulary of kind {state.get('kind')!r} is not known")
    return kinds[state["kind"]](state["symbols"])


@dataclass(frozen=True)
class JobSpec:
    """All that decides a model and its data, besides how it is trained; plain values.

    Args:
        model: a name of the registry, as "rnnlm".
        task: a corpus known by name ("trec"), a format of the user's own file ("pairs"), or data
            that is generated ("retrieval"); each job says which it knows.
        data: the folder of the corpora, or the user's file or folder; "" where none is read.
        layers: "seqkern" or "torch".
        seed: of the weights, and of a split or generator where there is one.
        sizes: fields of the model's config, other than its default.
        reading: fields of the job's READING, other than its default.
    """

    model: str
    task: str
    data: str = ""
    layers: str = "seqkern"
    seed: int = 1
    sizes: dict[str, Any] = field(default_factory=dict)
    reading: dict[str, Any] = field(default_factory=dict)


class Parts(NamedTuple):
    """Examples to train on, to choose by, and to report on; each a list of the job's own type."""

    train: list
    dev: list
    test: list


class Alignment(NamedTuple):
    """What a model attends to in one source: the source's symbols, a name for each row (one more
    row may follow, EOS's), and weights (rows, symbols), of which a row sums to 1."""

    source: tuple[str, ...]
    target: tuple[str, ...]
    weights: Tensor


class Job(ABC):
    """A model with the data it learns from, its loss and its scores.

    Args:
        spec: what to build.
        vocabularies: states of the vocabularies, from a checkpoint; without them they are built
            from the training data.

    Raises:
        ValueError, OSError: the spec names something unknown or impossible, or the data is absent
            or malformed.
    """

    TASKS: ClassVar[dict[str, str]]  # what the job reads: name, and a line on it
    WITHOUT_DATA: ClassVar[tuple[str, ...]] = ()  # tasks that read no file or folder of the user's
    READING: ClassVar[dict[str, Any]] = {}  # options of reading, with their defaults
    OF_TASKS: ClassVar[dict[str, tuple[str, ...]]] = {}  # options that these tasks alone have
    unit: ClassVar[str]  # what the loss is the mean over
    score: str  # the dev score that early stopping looks at, a key of `evaluate`'s result
    higher: bool  # whether a higher score is better

    def __init__(
        self, spec: JobSpec, vocabularies: dict[str, dict[str, Any]] | None = None
    ) -> None:
        if spec.task not in self.TASKS:
            known = ", ".join(sorted(self.TASKS))
            raise ValueError(
                f"task of model {spec.model!r} must be one of {known}, got {spec.task!r}"
            )
        options = {n for n in self.READING if spec.task in self.OF_TASKS.get(n, self.TASKS)}
        if unknown := spec.reading.keys() - options:
            known = ", ".join(sorted(options)) or "none"
            raise ValueError(
                f"{sorted(unknown)}: not options of task {spec.task!r}, which has {known}"
            )
        if vocabularies is None:
            self.expect_data_for(spec.task, spec.data)
        self.spec = spec
        self.reading = self.READING | self.task_reading() | spec.reading
        self.check_reading()
        self.vocabs: dict[str, Any] = {}
        if vocabularies is None:
            self.vocabs = self.build_vocabs()
        else:
            self.vocabs = {name: restore_vocabulary(s) for name, s in vocabularies.items()}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(spec.seed)
            self.model: Any = self.build_model()
            self.rng_state = torch.get_rng_state()

    @classmethod
    def expect_data_for(cls, task: str, data: str) -> None:
        """Raises ValueError where data is given to a task that reads none."""
        if data and task in cls.WITHOUT_DATA:
            raise ValueError(f"task {task!r} takes no data, got {data!r}")

    @cached_property
    def data(self) -> Parts:
        """The examples, read when first asked for: a restored job predicts without them."""
        return self.read()

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def task_reading(self) -> dict[str, Any]:
        """What of READING is other for the spec's task."""
        return {}

    def check_reading(self) -> None:  # noqa: B027 - most options are checked by what reads them
        """Raises ValueError where an option of reading is out of range."""

    @abstractmethod
    def read(self) -> Parts:
        """Reads the data that the spec names."""

    @abstractmethod
    def build_vocabs(self) -> dict[str, Any]:
        """Vocab, Labels or Subwords by name, from self.data.train."""

    @abstractmethod
    def build_model(self) -> nn.Module:
        """The model of the spec's sizes and layers, for self.vocabs."""

    @abstractmethod
    def collate(self, examples: list) -> Any:
        """A batch of examples: a NamedTuple of CPU tensors with `units` and `rows`."""

    @abstractmethod
    def length(self, example: Any) -> tuple[int, ...]:
        """The key by which examples of like length come into one batch."""

    @abstractmethod
    def loss(self, batch: Any) -> Tensor:
        """Mean loss over batch.units in nats, 0-d, of the model in its present mode."""

    @abstractmethod
    def evaluate(self, part: str, **options: Any) -> dict[str, float]:
        """Scores on part "dev" or "test", of the model in eval mode."""

    @abstractmethod
    def predict(self, texts: Sequence[str], **options: Any) -> list[str]:
        """One line of answer for each line of input."""

    def expect_readable(self, text: str) -> None:  # noqa: B027 - some answer any text
        """Raises ValueError where `predict` cannot answer a text."""

    def align(self, text: str) -> Alignment:
        """What the model attends to in a text.

        Raises:
            ValueError: the model attends to nothing.
        """
        raise ValueError(f"model {self.spec.model!r} has no alignments: it attends to no text")

    def scorer(self) -> str:
        """What computes the scores, as precisely as two papers would have to agree on it."""
        return ""

    def batches(self, batch_size: int, seed: int) -> Stream:
        """The training batches."""
        return Batches(self.data.train, self.collate, self.length, batch_size, seed)

    @property
    def first_phase(self) -> int:
        """Steps of a phase before the training proper, as pre-training; 0 for none.

        The options' steps and epochs count from its end, the optimiser and the learning rate's
        schedule start anew there, and nothing is evaluated before.
        """
        return 0

    def first_batches(self, batch_size: int, seed: int) -> Stream:
        """The batches of the first phase, where there is one."""
        raise NotImplementedError(f"{type(self).__name__} has no first phase")

    def after_step(self) -> None:  # noqa: B027 - most jobs have no constraint
        """Called after each update of the weights, for constraints on them."""

    def carried(self) -> dict[str, Tensor]:
        """What the next step needs besides weights and data, as a recurrent state."""
        return {}

    def carry(self, state: dict[str, Tensor]) -> None:  # noqa: B027 - most jobs carry nothing
        """Takes back what `carried` returned."""

    def part(self, name: str) -> list:
        """The examples of "train", "dev" or "test".

        Raises:
            ValueError: another name, or the part is empty.
        """
        if name not in Parts._fields:
            raise ValueError(f"part must be one of {Parts._fields}, got {name!r}")
        if not getattr(self.data, name):
            raise ValueError(f"the data has no {name} part")
        return getattr(self.data, name)

    def place(self, batch: Any) -> Any:
        """The batch with its tensors on the model's device."""
        tensors = {n: t for n, t in batch._asdict().items() if isinstance(t, Tensor)}
        return batch._replace(**{n: t.to(self.device) for n, t in tensors.items()})

    def fingerprint(self) -> str:
        """A hash of the training examples in their order: a checkpoint knows its data by it."""
        return hash_of(self.data.train)


def hash_of(examples: Iterable[Any]) -> str:
    """A hash of examples in their order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(repr(example).encode())
    return digest.hexdigest()
