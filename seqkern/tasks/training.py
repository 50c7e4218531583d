"""The training loop: a fixed number of steps from one seed, and its checkpoints."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from seqkern.models.rnnsearch import RNNSearch, RNNSearchConfig
from seqkern.tasks import checkpoint
from seqkern.tasks.data import Batch, Batches, Split, fingerprint
from seqkern.tasks.task import Task
from seqkern.tasks.vocab import PAD, Vocab


@dataclass(frozen=True)
class TrainOptions:
    """Everything besides data and model sizes that decides the losses.

    The learning rate rises linearly to `lr` over `warmup` steps, then falls to zero at `steps`
    along half a cosine. `threads` is for whoever runs the trainer to set: sums are made in another
    order on another number of them. At the default sizes a second thread mostly waits.
    """

    steps: int = 3000
    batch_size: int = 128
    lr: float = 3e-3
    warmup: int = 200
    weight_decay: float = 0.01
    clip: float = 1.0
    seed: int = 1
    threads: int = 1

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("lr", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("warmup", "weight_decay"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")

    def lr_at(self, step: int) -> float:
        """The learning rate of a step, 0 being the first."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


class Trainer:
    """A model, its optimiser and its place in the data.

    It keeps a random state of its own, so several trainers can take turns in one process and each
    sees the numbers that it would see alone.

    Args:
        task: where the pairs come from; its split decides which are trained on.
        options: how to train.
        sizes: keyword arguments of RNNSearchConfig besides the vocabularies' sizes.
        layers: "seqkern" or "torch".
        split: the task's pairs, where they are read already.
    """

    def __init__(
        self,
        task: Task,
        options: TrainOptions,
        sizes: dict[str, Any] | None = None,
        layers: str = "seqkern",
        split: Split | None = None,
    ) -> None:
        self.task, self.options = task, options
        self.split = split or task.load()
        pairs = self.split.train
        self.source = Vocab.build(pair.source for pair in pairs)
        self.target = Vocab.build(pair.target for pair in pairs)
        self.batches = Batches(pairs, self.source, self.target, options.batch_size, options.seed)
        self.data = fingerprint(pairs)
        self.step = 0
        config = RNNSearchConfig(len(self.source), len(self.target), **(sizes or {}))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            self.model = RNNSearch(config, layers)
            self._rng_state = torch.get_rng_state()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), options.lr, weight_decay=options.weight_decay, fused=True
        )

    @property
    def finished(self) -> bool:
        return self.step >= self.options.steps

    def train(self, steps: int) -> Iterator[tuple[float, int]]:
        """Takes up to `steps` steps; yields each one's loss (nats per symbol) and its words.

        Between two of them the trainer is whole and may be saved.
        """
        self.model.train()
        for _ in range(min(steps, self.options.steps - self.step)):
            batch = self.batches[self.step]
            with self._own_random_state():
                loss = self._update(batch)
            self.step += 1
            if not math.isfinite(loss):
                raise ValueError(f"the loss of step {self.step} is {loss}; try a smaller lr")
            yield loss, batch.x.size(0)

    def _update(self, batch: Batch) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.lr_at(self.step)
        scores = self.model(batch.x, batch.lengths, batch.y_previous)
        loss = F.cross_entropy(scores.flatten(0, 1), batch.y.flatten(), ignore_index=PAD)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.options.clip)
        self.optimizer.step()
        return loss.item()

    @contextmanager
    def _own_random_state(self) -> Iterator[None]:
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self._rng_state)
            yield
            self._rng_state = torch.get_rng_state()

    def save(self, path: Path) -> None:
        """Writes all that the next step depends on."""
        content = {
            "task": asdict(self.task),
            "data": self.data,
            "source": list(self.source.symbols),
            "target": list(self.target.symbols),
            "layers": self.model.layers,
            "options": asdict(self.options),
            "model_config": asdict(self.model.config),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "rng_state": self._rng_state,
        }
        checkpoint.save(path, content)

    @classmethod
    def resume(cls, path: Path, layers: str | None = None) -> Trainer:
        """The trainer that `save` wrote; its next losses are those of a run never interrupted.

        Args:
            path: a checkpoint.
            layers: "seqkern" or "torch", where other than before.

        Raises:
            ValueError: the file is no checkpoint, or the data it was trained on has changed.
        """
        content = checkpoint.load(path)
        task, config = Task(**content["task"]), dict(content["model_config"])
        del config["source_symbols"], config["target_symbols"]  # the data says them again
        options = TrainOptions(**content["options"])
        trainer = cls(task, options, config, layers or content["layers"])
        expect_same_data(path, content, trainer.split)
        vocabularies = list(trainer.source.symbols), list(trainer.target.symbols)
        if vocabularies != (content["source"], content["target"]):
            raise ValueError(f"{path}: its vocabularies are not those of its data")
        trainer.model.load_state_dict(content["model"])
        trainer.optimizer.load_state_dict(content["optimizer"])
        trainer.step, trainer._rng_state = content["step"], content["rng_state"]
        return trainer


def expect_same_data(path: Path, content: dict[str, Any], split: Split) -> None:
    """Raises ValueError where the training pairs are not those of the checkpoint."""
    if fingerprint(split.train) != content["data"]:
        raise ValueError(
            f"{path}: was trained on other pairs than {content['task']['data']} now holds; "
            "give it the data it was trained on, or start a new run"
        )
