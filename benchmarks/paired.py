"""Interleaved timing: every round gives each contestant one sample, in a shuffled order."""

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median

BURST_SECONDS = 3e-4


@dataclass
class Samples:
    """Seconds a call, one entry a round: wall clock and CPU time of the whole process."""

    calls_per_sample: int
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def take(self, run: Callable[[], object]) -> None:
        """One sample: the mean of `calls_per_sample` calls in a row."""
        calls = range(self.calls_per_sample)
        cpu, wall = time.process_time(), time.perf_counter()
        for _ in calls:
            run()
        self.wall.append((time.perf_counter() - wall) / len(calls))
        self.cpu.append((time.process_time() - cpu) / len(calls))

    def as_microseconds(self) -> dict[str, int | list[float]]:
        """For the results file: four digits, both clocks, in the order they were taken."""
        clocks = {"wall_us": self.wall, "cpu_us": self.cpu}
        rounded = {k: [float(f"{1e6 * s:.4g}") for s in v] for k, v in clocks.items()}
        return {"calls": self.calls_per_sample} | rounded


def seconds_of_one_call(run: Callable[[], object]) -> float:
    """Wall seconds of a call, rough: the mean over 50 ms of calls after the first.

    A mean, since on a busy machine a call on two threads may now and then take a hundred times
    as long as its best, and the rounds have to fit their budget there too.
    """
    start = time.perf_counter()
    run()
    if (first := time.perf_counter() - start) > 1.0:
        return first
    calls, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < 0.05:
        run()
        calls += 1
    return elapsed / calls


def calls_per_sample(seconds: float) -> int:
    """How many calls make a sample: enough to drown the clock, one for long calls."""
    return max(1, math.ceil(BURST_SECONDS / max(seconds, 1e-7)))


def rounds_within(budget: float, seconds: Sequence[float], most: int = 25) -> int:
    """Rounds that fit `budget` seconds when a round costs the sum of one sample of each.

    At least nine, or three where a round takes so long that scheduling noise averages out in it:
    on a shared machine, medians of three short rounds were found up to 20 % off those of nine.
    """
    one_round = sum(s * calls_per_sample(s) for s in seconds)
    return max(3 if one_round > 20 else 9, min(most, int(budget / one_round)))


def shuffled_orders(contestants: int, seed: int = 0) -> Iterator[list[int]]:
    """Endless shuffled orders of the contestants.

    Who runs after whom decides what the caches hold; a fixed or a rotating order would hand the
    same neighbour to the same contestant in every round.
    """
    shuffle = random.Random(seed).shuffle
    while True:
        order = list(range(contestants))
        shuffle(order)
        yield order


def ratio(peer: Sequence[float], ours: Sequence[float]) -> float:
    """Speed of ours over a peer: the ratio of the medians of interleaved samples."""
    return median(peer) / median(ours)
