"""How a model is trained: everything besides data and model that decides the losses."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn

SCHEDULES = ("cosine", "linear", "noam", "constant")
PRECISIONS = ("float32", "bfloat16")
MOST_THREADS = 1024  # many more end the process inside OpenMP
SEEDS = 2**32  # a process of many makes its own of it, and 64 bits have to hold that

Optimizers = dict[str, Callable[[list[nn.Parameter], "TrainOptions"], torch.optim.Optimizer]]
OPTIMIZERS: Optimizers = {
    "adamw": lambda p, o: torch.optim.AdamW(
        p, o.lr, betas=(0.9, o.beta2), weight_decay=o.weight_decay, fused=True
    ),
    "adam": lambda p, o: torch.optim.Adam(
        p, o.lr, betas=(0.9, o.beta2), weight_decay=o.weight_decay, fused=True
    ),
    "sgd": lambda p, o: torch.optim.SGD(p, o.lr, weight_decay=o.weight_decay),
    # PyTorch 2.11 has no fused Adagrad for GPUs.
    "adagrad": lambda p, o: torch.optim.Adagrad(
        p, o.lr, weight_decay=o.weight_decay, fused=all(q.is_cpu for q in p) or None
    ),
    "adadelta": lambda p, o: torch.optim.Adadelta(
        p, o.lr, rho=0.95, eps=1e-6, weight_decay=o.weight_decay
    ),
}


def expect_threads(threads: int) -> None:
    """Raises ValueError where a processor has no such number of threads."""
    if not 1 <= threads <= MOST_THREADS:
        raise ValueError(f"threads must be in 1 .. {MOST_THREADS}, got {threads}")


@dataclass(frozen=True)
class TrainOptions:
    """Everything besides data and model that decides the losses.

    Args:
        steps: updates of the weights, after those of the job's first phase where it has one.
        epochs: passes over the training data, which decide in place of `steps` unless 0.
        batch_size: examples of a batch (of a language model: rows of its windows).
        lr: the highest learning rate.
        optimizer: "adamw", "adam", "sgd", "adagrad" (lr .05 and so on) or "adadelta" (rho .95).
        schedule: of the learning rate after its linear rise over `warmup` steps: "cosine" falls
            to zero at the last step along half a cosine, "linear" along a line, "noam" with the
            inverse square root of the step (Vaswani et al., 2017, equation 3, scaled so that it
            peaks at lr), "constant" not at all.
        beta2: of Adam.
        clip: of the gradient's norm; 0 for none.
        accumulate: batches of an update.
        precision: "float32", or "bfloat16" for autocast.
        evaluate_every: steps between two evaluations on the dev part; 0 for one an epoch, where
            `patience` or `average` asks for any.
        patience: evaluations without a better score after which training ends; 0 for never.
        average: weights of how many last evaluations are averaged at the end; 1 for no averaging.
        seed: of the order of the data and of dropout.
        threads: for whoever runs the trainer to set; sums are made in another order on another
            number of them.
    """

    steps: int = 3000
    epochs: int = 0
    batch_size: int = 128
    lr: float = 3e-3
    optimizer: str = "adamw"
    schedule: str = "cosine"
    warmup: int = 200
    weight_decay: float = 0.01
    beta2: float = 0.999
    clip: float = 1.0
    accumulate: int = 1
    precision: str = "float32"
    evaluate_every: int = 0
    patience: int = 0
    average: int = 1
    seed: int = 1
    threads: int = 1

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "average"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        expect_threads(self.threads)
        if not self.lr > 0:
            raise ValueError(f"lr must be positive, got {self.lr}")
        for name in ("epochs", "warmup", "weight_decay", "clip", "evaluate_every", "patience"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.beta2 < 1:
            raise ValueError(f"beta2 must be in [0, 1), got {self.beta2}")
        if not 0 <= self.seed < SEEDS:
            raise ValueError(f"seed must be in 0 .. {SEEDS - 1}, got {self.seed}")
        choices = {"optimizer": OPTIMIZERS, "schedule": SCHEDULES, "precision": PRECISIONS}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} must be one of {tuple(known)}, got {getattr(self, name)!r}"
                )

    def lr_at(self, step: int, steps: int) -> float:
        """The learning rate of a step, 0 being the first, of `steps`."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        if self.schedule == "noam":
            return self.lr * math.sqrt(max(1, self.warmup) / (step + 1))
        done = min((step - self.warmup) / max(1, steps - self.warmup), 1.0)
        if self.schedule == "cosine":
            return self.lr * 0.5 * (1 + math.cos(math.pi * done))
        return self.lr * (1 - done) if self.schedule == "linear" else self.lr

    def build_optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimiser over the parameters that are trained."""
        return OPTIMIZERS[self.optimizer]([p for p in parameters if p.requires_grad], self)
