"""The training loop: a fixed number of steps from one seed, and its checkpoints."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from seqkern.tasks import checkpoint
from seqkern.tasks.batches import Stream, processes
from seqkern.tasks.job import Job, JobSpec
from seqkern.tasks.options import TrainOptions
from seqkern.tasks.registry import make_job


class Best(NamedTuple):
    """The best evaluation so far: its score and step, and how many were not better since."""

    score: float
    step: int
    stale: int


class Trainer:
    """A job's model, its optimiser and its place in the data.

    It keeps a random state of its own, so several trainers can take turns in one process and each
    sees the numbers that it would see alone. Under torch.distributed every process takes its share
    of a step's batches, `accumulate` of them, and the gradients are summed over all: N processes
    with accumulate=1 do what one does with accumulate=N, but for dropout, and but for a language
    model that carries its state on, which they train as one does with N times the batch_size.

    Args:
        job: the model and its data.
        options: how to train.
    """

    def __init__(self, job: Job, options: TrainOptions) -> None:
        self.job, self.options = job, options
        self.rank, self.world = processes()
        self.batches = job.batches(options.batch_size, options.seed)
        if job.first_phase:
            self.first_batches = job.first_batches(options.batch_size, options.seed)
        self.step, self.best = 0, None
        self.recent: list[dict[str, Tensor]] = []  # weights of the last evaluations
        self.optimizer = options.build_optimizer(job.model.parameters())
        self._rng_state = job.rng_state
        if self.rank:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(options.seed * 1_000_003 + self.rank)
                self._rng_state = torch.get_rng_state()

    @property
    def steps(self) -> int:
        """All steps of the training, the job's first phase among them."""
        per_epoch = self.batches.per_epoch / (self.options.accumulate * self.world)
        return self.job.first_phase + (
            math.ceil(self.options.epochs * per_epoch) or self.options.steps
        )

    @property
    def evaluate_every(self) -> int:
        """Steps between two evaluations; 0 where none is asked for."""
        options = self.options
        if options.evaluate_every or not (options.patience or options.average > 1):
            return options.evaluate_every
        return max(1, self.batches.per_epoch // (options.accumulate * self.world))

    @property
    def evaluation_due(self) -> bool:
        """Whether the step just taken is one to evaluate after."""
        done, every = self.step - self.job.first_phase, self.evaluate_every
        return done > 0 and every > 0 and (done % every == 0 or self.step == self.steps)

    @property
    def finished(self) -> bool:
        """Whether all steps are taken, or patience has run out."""
        patience = self.options.patience
        out = self.best is not None and 0 < patience <= self.best.stale
        return out or self.step >= self.steps

    def train(self, steps: int) -> Iterator[tuple[float, int]]:
        """Takes up to `steps` steps; yields each one's loss (nats per unit) and its examples.

        Between two of them the trainer is whole and may be saved.

        Raises:
            ValueError: the loss is not finite.
        """
        last = self.step + steps
        while self.step < last and not self.finished:
            self.job.model.train()
            with self._own_random_state():
                loss, rows = self._update()
            self.step += 1
            if not math.isfinite(loss):
                raise ValueError(f"the loss of step {self.step} is {loss}; try a smaller lr")
            yield loss, rows

    def _update(self) -> tuple[float, int]:
        options, model = self.options, self.job.model
        stream, step, steps = self._phase()
        if step == 0 and self.step:
            # Moments of the first phase's gradients would hold the next one back. The
            # optimiser is new, not cleared: PyTorch 2.11's Adagrad fills its state only when built.
            self.optimizer = options.build_optimizer(model.parameters())
        for group in self.optimizer.param_groups:
            group["lr"] = options.lr_at(step, steps)
        # Each process takes every N-th batch: that of Windows, its own streams of the text.
        first = step * options.accumulate
        places = [(first + i) * self.world + self.rank for i in range(options.accumulate)]
        batches = [self.job.place(stream[place]) for place in places]
        counts = torch.tensor([sum(b.units for b in batches), sum(b.rows for b in batches)])
        self._sum([counts])
        self.optimizer.zero_grad()
        losses = []
        for batch in batches:
            with torch.autocast(
                self.job.device.type, torch.bfloat16, enabled=options.precision == "bfloat16"
            ):
                loss = self.job.loss(batch) * (batch.units / counts[0].item())
            loss.backward()
            losses.append(loss.detach())
        total = torch.stack(losses).sum()
        if self.world > 1:
            self._sum([total, *self._gradients()])
        if options.clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip)
        self.optimizer.step()
        self.job.after_step()
        return total.item(), int(counts[1])

    def _gradients(self) -> list[Tensor]:
        """The gradients of what has one in any process; weight decay leaves the others alone."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        having = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int64)
        self._sum([having])
        kept = [p for p, n in zip(parameters, having.tolist(), strict=True) if n]
        for p in kept:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        return [p.grad for p in kept if p.grad is not None]

    def _phase(self) -> tuple[Stream, int, int]:
        """The batches of the phase that the next step is in, its place in it, and its length."""
        first = self.job.first_phase
        if self.step < first:
            return self.first_batches, self.step, first
        return self.batches, self.step - first, self.steps - first

    def _sum(self, tensors: list[Tensor]) -> None:
        if self.world > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)

    @contextmanager
    def _own_random_state(self) -> Iterator[None]:
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self._rng_state)
            yield
            self._rng_state = torch.get_rng_state()

    def evaluate(self) -> tuple[dict[str, float], bool]:
        """Scores on the dev part, and whether they are the best so far.

        Every process finds the same scores, so all of them end together.
        """
        with torch.random.fork_rng(devices=[]):
            scores = self.job.evaluate("dev")
        score = scores[self.job.score]
        better = self.best is None or (
            score > self.best.score if self.job.higher else score < self.best.score
        )
        if better:
            self.best = Best(score, self.step, 0)
        elif self.best is not None:
            self.best = self.best._replace(stale=self.best.stale + 1)
        if self.options.average > 1:
            weights = {n: t.detach().clone() for n, t in self.job.model.state_dict().items()}
            self.recent = [*self.recent, weights][-self.options.average :]
        return scores, better

    def averaged(self) -> dict[str, Tensor]:
        """The mean of the weights of the last evaluations (Vaswani et al., 2017, section 6.1)."""
        mean = {}
        for name, value in self.recent[-1].items():
            if value.is_floating_point():
                value = torch.stack([weights[name] for weights in self.recent]).mean(0)
            mean[name] = value
        return mean

    def content(self) -> dict[str, Any]:
        """All that the next step depends on; see checkpoint.save. Every process has to call it."""
        return {
            "spec": asdict(self.job.spec),
            "data": self.job.fingerprint(),
            "vocabularies": {name: v.state() for name, v in self.job.vocabs.items()},
            "options": asdict(self.options),
            "model": self.job.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "best": None if self.best is None else list(self.best),
            "recent": self.recent,
            "random": self._gather({"rng_state": self._rng_state, **self.job.carried()}),
        }

    def _gather(self, state: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        states = [state] * self.world
        if self.world > 1:
            dist.all_gather_object(states, state)
        return states

    @classmethod
    def resume(
        cls,
        path: Path,
        layers: str | None = None,
        device: str = "cpu",
        data: str | None = None,
    ) -> Trainer:
        """The trainer whose `content` was saved; its next losses are those of a run never stopped.

        Args:
            path: a checkpoint.
            layers: "seqkern" or "torch", where other than before.
            device: where to train.
            data: where the data lies now, where elsewhere than before.

        Raises:
            ValueError: the file is no checkpoint, or the data it was trained on has changed, or
                it was trained by another number of processes.
        """
        content = checkpoint.load(path)
        job = restore_job(content, layers, data, device)
        expect_same_data(path, content, job)
        trainer = cls(job, TrainOptions(**content["options"]))
        if len(content["random"]) != trainer.world:
            raise ValueError(
                f"{path}: was trained by {len(content['random'])} processes, here are "
                f"{trainer.world}; a resumed run keeps their number"
            )
        trainer.optimizer.load_state_dict(content["optimizer"])
        trainer.step = content["step"]
        trainer.recent = [
            {name: t.to(device) for name, t in weights.items()} for weights in content["recent"]
        ]
        trainer.best = None if content["best"] is None else Best(*content["best"])
        carried = copy.copy(content["random"][trainer.rank])
        trainer._rng_state = carried.pop("rng_state")
        job.carry({name: state.to(device) for name, state in carried.items()})
        return trainer


def restore_job(
    content: dict[str, Any],
    layers: str | None = None,
    data: str | None = None,
    device: str = "cpu",
) -> Job:
    """The job of a checkpoint with its trained weights.

    Args:
        content: what checkpoint.load returned.
        layers: "seqkern" or "torch", where other than in the training.
        data: where the data lies now, where elsewhere; it is read only when it is needed.
        device: where the model is to be.

    Raises:
        ValueError: weights, vocabularies and sizes do not belong together.
    """
    spec = JobSpec(**content["spec"])
    spec = replace(
        spec,
        layers=layers or spec.layers,
        data=spec.data if data is None else data,
    )
    job = make_job(spec, content["vocabularies"])
    try:
        job.model.load_state_dict(content["model"])
    except RuntimeError as error:
        reason = str(error).strip().split("\n")[1:2] or [str(error)]
        raise ValueError(
            f"the checkpoint's weights do not fit its model: {reason[0].strip()}"
        ) from error
    job.model.to(device)
    return job


def expect_same_data(path: Path, content: dict[str, Any], job: Job) -> None:
    """Raises ValueError where the training examples are not those of the checkpoint."""
    if job.fingerprint() != content["data"]:
        raise ValueError(
            f"{path}: was trained on other data than {job.spec.data or job.spec.task} now holds; "
            "give it the data it was trained on, or start a new run"
        )
