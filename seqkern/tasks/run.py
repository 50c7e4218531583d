"""A training run in a folder: `losses.jsonl`, `checkpoint.pt`, and a stop that loses nothing."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from seqkern.tasks.checkpoint import write_atomically
from seqkern.tasks.training import Trainer

SAVE_EVERY = 100  # steps; what a killed run repeats at most


def checkpoint_path(folder: Path) -> Path:
    return folder / "checkpoint.pt"


def log_path(folder: Path) -> Path:
    return folder / "losses.jsonl"


class StopRequest:
    """True once the process was asked to stop."""

    def __init__(self) -> None:
        self.asked = False

    def __bool__(self) -> bool:
        return self.asked


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Turns the first Ctrl-C or SIGTERM into a request; a second Ctrl-C interrupts as usual."""
    stop = StopRequest()

    def ask(signum: int, frame: object) -> None:
        stop.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    previous = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def start_log(folder: Path, step: int) -> None:
    """Keeps the lines of the log up to `step`: those after it are about to be written again."""
    path, kept = log_path(folder), []
    if step and path.exists():
        kept = path.read_bytes().splitlines(keepends=True)[:step]
    write_atomically(path, lambda file: file.writelines(kept))


def read_log(folder: Path) -> list[dict[str, float]]:
    """The log's lines: step, loss (nats per symbol), words and seconds of each step."""
    with log_path(folder).open() as file:
        return [json.loads(line) for line in file]


def run_steps(
    trainer: Trainer,
    folder: Path,
    steps: int,
    stop: StopRequest,
    on_step: Callable[[float], None] = lambda loss: None,
) -> list[tuple[int, float]]:
    """Trains up to `steps` steps, logs each, saves every SAVE_EVERY and at the end.

    Returns words and seconds of every step taken. When asked to stop it saves and returns early.
    """
    taken = []
    with log_path(folder).open("a") as log:
        before = time.perf_counter()
        for loss, words in trainer.train(steps):
            seconds = time.perf_counter() - before
            taken.append((words, seconds))
            line = {"step": trainer.step, "loss": loss, "words": words, "seconds": seconds}
            log.write(json.dumps(line) + "\n")
            log.flush()
            on_step(loss)
            if stop:
                break
            if trainer.step % SAVE_EVERY == 0:
                trainer.save(checkpoint_path(folder))
            before = time.perf_counter()
    trainer.save(checkpoint_path(folder))
    return taken
