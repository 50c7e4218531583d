"""`seqkern train`: trains RNNSearch on pairs, in a folder that an interrupted run resumes from."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from seqkern.cli.common import INTERRUPTED, Layers, progress_bar, user_errors
from seqkern.tasks.run import checkpoint_path, run_steps, start_log, stop_on_signal
from seqkern.tasks.task import Task
from seqkern.tasks.training import Trainer, TrainOptions

OPTION = typer.Option
SIZES = ("hidden",)
TASK = ("data", "source_tokens", "target_tokens")


def train(
    run: Annotated[Path, OPTION(help="folder of checkpoint.pt and losses.jsonl")] = Path(
        "runs/g2p"
    ),
    data: Annotated[
        str | None, OPTION(help="cmudict (default), or a source<TAB>target file")
    ] = None,
    tokens: Annotated[
        str | None, OPTION(help="SOURCE:TARGET, each chars or words; default chars:words")
    ] = None,
    layers: Layers = None,
    steps: Annotated[int | None, OPTION(help=f"default {TrainOptions.steps}")] = None,
    batch_size: Annotated[int | None, OPTION(help=f"default {TrainOptions.batch_size}")] = None,
    lr: Annotated[float | None, OPTION(help=f"highest; default {TrainOptions.lr}")] = None,
    hidden: Annotated[int | None, OPTION(help="units of encoder and decoder; default 128")] = None,
    seed: Annotated[int | None, OPTION(help=f"default {TrainOptions.seed}")] = None,
    threads: Annotated[int | None, OPTION(help=f"default {TrainOptions.threads}")] = None,
) -> None:
    """Train an encoder-decoder with additive attention on pairs of sequences.

    Where the folder holds a checkpoint, the run goes on from there with the options it began
    with, to the same losses as if it had not been interrupted.
    """
    given: dict[str, Any] = {
        "data": data,
        "steps": steps,
        "batch_size": batch_size,
        "lr": lr,
        "hidden": hidden,
        "seed": seed,
        "threads": threads,
    }
    with user_errors():
        if tokens is not None:
            given["source_tokens"], _, given["target_tokens"] = tokens.partition(":")
        given = {name: value for name, value in given.items() if value is not None}
        resume = checkpoint_path(run).exists()
        trainer = _resume(run, given, layers) if resume else _start(given, layers)
        torch.set_num_threads(trainer.options.threads)
        start_log(run, trainer.step)
        finished = _run(trainer, run)
    if not finished:
        print(f"stopped after step {trainer.step}; resume with: seqkern train --run {run}")
        raise typer.Exit(INTERRUPTED)
    print(f"done: {checkpoint_path(run)}")


def _start(given: dict[str, Any], layers: str | None) -> Trainer:
    task = Task(**{k: v for k, v in given.items() if k in (*TASK, "seed")})
    sizes = {k: v for k, v in given.items() if k in SIZES}
    options = {k: v for k, v in given.items() if k not in (*TASK, *SIZES)}
    return Trainer(task, TrainOptions(**options), sizes, layers or "seqkern")


def _resume(run: Path, given: dict[str, Any], layers: str | None) -> Trainer:
    path = checkpoint_path(run)
    trainer = Trainer.resume(path, layers)
    kept = vars(trainer.model.config) | vars(trainer.task) | vars(trainer.options)
    for name, value in given.items():
        if kept[name] != value:
            raise ValueError(
                f"{name} is {value!r} here and {kept[name]!r} in {path}: a resumed run keeps its "
                "options; leave it out, or choose another --run"
            )
    print(f"resuming {run} after step {trainer.step}")
    return trainer


def _run(trainer: Trainer, run: Path) -> bool:
    """Trains to the end; returns False where it was asked to stop before."""
    with stop_on_signal() as stop, progress_bar() as bar:
        options = trainer.options
        line = bar.add_task(
            trainer.model.layers, total=options.steps, completed=trainer.step, note=""
        )
        run_steps(
            trainer,
            run,
            options.steps,
            stop,
            lambda loss: bar.update(line, advance=1, note=f"loss {loss:.3f}"),
        )
    sys.stdout.flush()
    return trainer.finished
