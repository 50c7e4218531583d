"""A training run in a folder, and a stop that loses nothing.

checkpoint.pt   where the training stands; it goes on from there
best.pt         the weights of the best evaluation, or their average; only where it evaluates
losses.jsonl    a line a step: step, loss (nats per unit), rows, seconds
scores.jsonl    a line an evaluation: step and the scores on the dev part
"""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from seqkern.tasks import checkpoint
from seqkern.tasks.checkpoint import write_atomically
from seqkern.tasks.lines import malformed
from seqkern.tasks.training import Trainer

SAVE_EVERY = 100  # steps; what a killed run repeats at most

OnStep = Callable[[float], None]
OnScores = Callable[[int, dict[str, float]], None]


def checkpoint_path(folder: Path) -> Path:
    return folder / "checkpoint.pt"


def best_path(folder: Path) -> Path:
    return folder / "best.pt"


def log_path(folder: Path) -> Path:
    return folder / "losses.jsonl"


def scores_path(folder: Path) -> Path:
    return folder / "scores.jsonl"


def result_path(path: Path) -> Path:
    """The checkpoint to use of a run's folder, the best one where there is one; or the file."""
    if not path.is_dir():
        return path
    return best_path(path) if best_path(path).exists() else checkpoint_path(path)


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
    """Keeps the lines of the logs up to `step`: those after it are about to be written again.

    A new run does not keep the best weights of another that had the folder before.
    """
    if not step:
        best_path(folder).unlink(missing_ok=True)
    for path in (log_path(folder), scores_path(folder)):
        kept = []
        if step and path.exists():
            kept = [n for n in path.read_bytes().splitlines(True) if _step_of(n) <= step]
        write_atomically(path, lambda file, kept=kept: file.writelines(kept))


def _step_of(line: bytes) -> float:
    """The step of a log's line; infinite for one that a killed process cut short."""
    try:
        return json.loads(line)["step"]
    except json.JSONDecodeError:
        return math.inf


def read_log(path: Path) -> list[dict[str, float]]:
    """The lines of a log, without a last one that a killed process cut short.

    Raises:
        ValueError: another line is no JSON; the message names the file and the line.
        OSError: the file cannot be read.
    """
    *lines, _ = path.read_text().split("\n")
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise malformed(path, number, f"JSON ({error.msg})", line) from error
    return found


def expect_kept(path: Path, kept: dict[str, Any], given: dict[str, Any], instead: str) -> None:
    """Raises ValueError where a run that goes on is given other settings than it began with.

    Args:
        path: the run's checkpoint.
        kept: what it began with, by name.
        given: what it is given now; names of `kept`.
        instead: what to do about it.
    """
    for name, value in given.items():
        if kept[name] != (tuple(value) if isinstance(value, list) else value):
            raise ValueError(
                f"{name} is {value!r} here and {kept[name]!r} in {path}: a resumed run keeps its "
                f"options; {instead}"
            )


def save(trainer: Trainer, path: Path) -> None:
    """Writes a checkpoint; every process has to call it, the first one writes."""
    content = trainer.content()
    if trainer.rank == 0:
        checkpoint.save(path, content)


def run_steps(
    trainer: Trainer,
    folder: Path,
    steps: int,
    stop: StopRequest,
    on_step: OnStep = lambda loss: None,
    on_scores: OnScores = lambda step, scores: None,
) -> list[tuple[int, float]]:
    """Trains up to `steps` steps, logs each, evaluates, saves every SAVE_EVERY and at the end.

    Returns examples and seconds of every step taken. When asked to stop it saves and returns
    early; so it does when the trainer's patience has run out.
    """
    taken = []
    before = time.perf_counter()
    for loss, rows in trainer.train(steps):
        seconds = time.perf_counter() - before
        taken.append((rows, seconds))
        line = {"step": trainer.step, "loss": loss, "rows": rows, "seconds": seconds}
        _append(trainer, log_path(folder), line)
        on_step(loss)
        if trainer.evaluation_due:
            on_scores(trainer.step, _evaluate(trainer, folder))
        if trainer.finished or _asked(trainer, stop):
            break
        if trainer.step % SAVE_EVERY == 0:
            save(trainer, checkpoint_path(folder))
        before = time.perf_counter()
    # Before the last checkpoint, which says that nothing is left to do.
    if taken and trainer.finished and len(trainer.recent) > 1:
        on_scores(trainer.step, _try_average(trainer, folder))
    save(trainer, checkpoint_path(folder))
    return taken


def _append(trainer: Trainer, path: Path, line: dict[str, Any]) -> None:
    if trainer.rank == 0:
        with path.open("a") as log:
            log.write(json.dumps(line) + "\n")


def _asked(trainer: Trainer, stop: StopRequest) -> bool:
    """Whether any process was asked to stop: they have to leave after the same step."""
    if trainer.world == 1:
        return bool(stop)
    asked = [False] * trainer.world
    dist.all_gather_object(asked, bool(stop))
    return any(asked)


def _evaluate(trainer: Trainer, folder: Path) -> dict[str, float]:
    scores, better = trainer.evaluate()
    _append(trainer, scores_path(folder), {"step": trainer.step, **scores})
    if better:
        save(trainer, best_path(folder))
    return scores


def _try_average(trainer: Trainer, folder: Path) -> dict[str, float]:
    """Scores of the averaged weights, which become the best ones where they are no worse."""
    model, job = trainer.job.model, trainer.job
    last = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(trainer.averaged())
    scores = job.evaluate("dev")
    score, best = scores[job.score], trainer.best
    if best is None or (score >= best.score if job.higher else score <= best.score):
        save(trainer, best_path(folder))
    _append(trainer, scores_path(folder), {"step": trainer.step, "averaged": True, **scores})
    model.load_state_dict(last)
    return scores
