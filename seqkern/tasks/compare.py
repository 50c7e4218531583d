"""The same training twice in one process, on torch.nn's recurrent layers and on seqkern's.

The two take turns, a block of steps each, so that whatever else the machine does meets both; a
rate is the median over the blocks.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from seqkern.tasks.data import references
from seqkern.tasks.metrics import ErrorRates, error_rates
from seqkern.tasks.run import (
    StopRequest,
    checkpoint_path,
    log_path,
    read_log,
    run_steps,
    start_log,
)
from seqkern.tasks.sides import tokenize
from seqkern.tasks.training import Trainer
from seqkern.tasks.translation import TranslationJob

RUNS = ("torch", "seqkern")
BLOCK = 50  # steps of a turn, and the losses that are compared one by one
PARTS = 8  # turns of decoding


@dataclass
class Result:
    """One of the two runs: rates in words/s, losses in nats per symbol."""

    train_rate: float
    decode_rate: float
    errors: ErrorRates
    losses: list[float]


@dataclass
class Comparison:
    """Both runs, and what is only known of the two together."""

    torch: Result
    seqkern: Result
    beam: int

    @property
    def train_ratio(self) -> float:
        return self.seqkern.train_rate / self.torch.train_rate

    @property
    def decode_ratio(self) -> float:
        return self.seqkern.decode_rate / self.torch.decode_rate

    @property
    def loss_difference(self) -> float:
        """The largest difference of the first BLOCK losses; later ones drift apart chaotically."""
        pairs = zip(self.torch.losses[:BLOCK], self.seqkern.losses[:BLOCK])
        return max(abs(a - b) for a, b in pairs)


def train_in_turns(
    trainers: dict[str, Trainer],
    folder: Path,
    stop: StopRequest,
    on_step: Callable[[str, float], None],
) -> dict[str, float]:
    """Trains all to their end, or until asked to stop; returns each one's words/s.

    Logs and checkpoints go to folder/NAME; those of an earlier comparison are removed.
    """
    for name, trainer in trainers.items():
        start_log(folder / name, trainer.step)
        checkpoint_path(folder / name).unlink(missing_ok=True)
    rates: dict[str, list[float]] = {name: [] for name in trainers}
    names = list(trainers)
    while not stop and not all(trainer.finished for trainer in trainers.values()):
        for name in names:
            taken = run_steps(
                trainers[name], folder / name, BLOCK, stop, lambda loss, n=name: on_step(n, loss)
            )
            rates[name].append(sum(words for words, _ in taken) / sum(s for _, s in taken))
        names.reverse()  # whoever went last goes first: neither has the warmer turn
    return {name: statistics.median(values) for name, values in rates.items()}


def decode_in_turns(
    jobs: dict[str, TranslationJob],
    sources: Sequence[str],
    beam: int,
    on_words: Callable[[str, int], None],
) -> tuple[dict[str, list[str]], dict[str, float]]:
    """Every job's targets of the sources, in their order, and its words/s."""
    order = list(range(len(sources)))
    random.Random(0).shuffle(order)  # parts of like mixture
    targets: dict[str, list[str]] = {name: [""] * len(sources) for name in jobs}
    rates: dict[str, list[float]] = {name: [] for name in jobs}
    names = list(jobs)
    for start in range(min(PARTS, len(order))):
        part = order[start::PARTS]
        for name in names:
            before = time.perf_counter()
            decoded = jobs[name].decode([sources[i] for i in part], beam)
            rates[name].append(len(part) / (time.perf_counter() - before))
            for i, target in zip(part, decoded, strict=True):
                targets[name][i] = target
            on_words(name, len(part))
        names.reverse()
    return targets, {name: statistics.median(values) for name, values in rates.items()}


def compare(
    jobs: dict[str, TranslationJob],
    folder: Path,
    train_rates: dict[str, float],
    beam: int,
    on_words: Callable[[str, int], None],
) -> Comparison:
    """Decodes the test words with both trained models and puts all figures together."""
    answers = references(jobs["seqkern"].data.test)
    targets, decode_rates = decode_in_turns(jobs, list(answers), beam, on_words)
    tokens = jobs["seqkern"].target.tokens
    right = [[tokenize(t, tokens) for t in targets] for targets in answers.values()]
    results = {
        name: Result(
            train_rates[name],
            decode_rates[name],
            error_rates([tokenize(t, tokens) for t in targets[name]], right),
            [line["loss"] for line in read_log(log_path(folder / name))],
        )
        for name in RUNS
    }
    return Comparison(results["torch"], results["seqkern"], beam)
