"""`seqkern train MODEL`: trains a model in a folder that an interrupted run resumes from."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from seqkern.cli.common import (
    INTERRUPTED,
    Data,
    Device,
    Layers,
    expect_device,
    progress_bar,
    user_errors,
)
from seqkern.cli.parallel import joined_processes
from seqkern.tasks.batches import processes
from seqkern.tasks.libraries import library
from seqkern.tasks.registry import MODELS, make_job
from seqkern.tasks.run import (
    checkpoint_path,
    expect_kept,
    run_steps,
    start_log,
    stop_on_signal,
)
from seqkern.tasks.settings import expect_known, parse_settings, resolve
from seqkern.tasks.training import Trainer

OPTION = typer.Option


def train(
    model: Annotated[str, typer.Argument(help=f"one of {', '.join(sorted(MODELS))}")],
    task: Annotated[str, OPTION(help="a corpus by name, or the format of your own data")],
    data: Data = "",
    run: Annotated[Path | None, OPTION(help="folder of the run; default runs/MODEL-TASK")] = None,
    layers: Layers = None,
    steps: Annotated[int | None, OPTION(help="updates of the weights")] = None,
    seed: Annotated[int | None, OPTION(help="of split, weights, order and dropout")] = None,
    device: Device = "cpu",
    settings: Annotated[
        list[str] | None, OPTION("--set", help="NAME=VALUE of model, task or training, as lr=0.01")
    ] = None,
    tensorboard: Annotated[bool, OPTION(help="log for TensorBoard in the folder too")] = False,
) -> None:
    """Train a reference model on a corpus or on your own files.

    Settings that are not given are those of the model's recipe on that corpus (seqkern reproduce),
    and else the defaults. Where the
    folder holds a checkpoint, the run goes on from there with the options it began with, to the
    same losses as if it had not been interrupted. Under torchrun the processes share the work.
    """
    folder = run or Path("runs") / f"{model}-{task}"
    given: dict[str, Any] = {"steps": steps, "seed": seed}
    with user_errors(), joined_processes():
        expect_device(device)
        given = {name: value for name, value in given.items() if value is not None}
        given |= parse_settings(settings or [])
        path = checkpoint_path(folder)
        if path.exists():
            trainer = Trainer.resume(path, layers, device)
            _expect_kept(trainer, path, {"model": model, "task": task, "data": data}, given)
            _say(f"resuming {folder} after step {trainer.step}")
        else:
            spec, options = resolve(model, task, data, layers or "seqkern", given)
            job = make_job(spec)
            job.model.to(device)
            trainer = Trainer(job, options)
        torch.set_num_threads(trainer.options.threads)
        start_log(folder, trainer.step)
        finished = _run(trainer, folder, tensorboard)
        stopped = f"stopped after step {trainer.step}; the same command goes on"
        _say(f"done: {folder}" if finished else stopped)
    if not finished:
        raise typer.Exit(INTERRUPTED)


def _say(text: str) -> None:
    if processes()[0] == 0:
        print(text)


def _expect_kept(trainer: Trainer, path: Path, spec: dict[str, str], given: dict[str, Any]) -> None:
    """Raises ValueError where a resumed run is given other settings than it began with."""
    job = trainer.job
    kept = {**vars(job.model.config), **job.reading, **vars(trainer.options), **vars(job.spec)}
    expect_known(job.spec.model, given)
    given = {**{n: v for n, v in spec.items() if v}, **given}
    expect_kept(path, kept, given, "leave it out, or choose another --run")


def _run(trainer: Trainer, folder: Path, tensorboard: bool) -> bool:
    """Trains to the end; returns False where it was asked to stop before."""
    writer = _writer(folder) if tensorboard and trainer.rank == 0 else None
    with stop_on_signal() as stop, progress_bar(disable=trainer.rank > 0) as bar:
        name = trainer.job.spec.model
        line = bar.add_task(name, total=trainer.steps, completed=trainer.step, note="")

        def on_step(loss: float) -> None:
            bar.update(line, advance=1, note=f"loss {loss:.3f}")
            if writer:
                writer.add_scalar("train/loss", loss, trainer.step)

        def on_scores(step: int, scores: dict[str, float]) -> None:
            shown = ", ".join(f"{name} {value:.4g}" for name, value in scores.items())
            if trainer.rank == 0:  # a bar that is disabled prints all the same
                bar.console.print(f"step {step}: dev {shown}", highlight=False)
            if writer:
                for score, value in scores.items():
                    writer.add_scalar(f"dev/{score}", value, step)

        run_steps(trainer, folder, trainer.steps, stop, on_step, on_scores)
    if writer:
        writer.close()
    sys.stdout.flush()
    return trainer.finished


def _writer(folder: Path):
    writer = "torch.utils.tensorboard.writer"
    return library(writer, "tensorboard", "--tensorboard", "tensorboard").SummaryWriter(str(folder))
