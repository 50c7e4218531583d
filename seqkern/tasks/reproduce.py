"""Training a recipe to its end, and the result beside its target."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from seqkern.tasks import checkpoint
from seqkern.tasks.checkpoint import write_atomically
from seqkern.tasks.job import JobSpec
from seqkern.tasks.options import TrainOptions
from seqkern.tasks.recipes import RECIPES, Recipe
from seqkern.tasks.registry import entry, load, make_job
from seqkern.tasks.run import (
    OnScores,
    OnStep,
    StopRequest,
    checkpoint_path,
    expect_kept,
    log_path,
    read_log,
    result_path,
    run_steps,
    start_log,
)
from seqkern.tasks.training import Trainer, restore_job


@dataclass(frozen=True)
class Result:
    """What a recipe came to under one seed.

    score: in the recipe's unit; reached: None without a target; seconds: of all training steps;
    scorer: what computed it.
    """

    recipe: str
    seed: int
    layers: str
    score: float
    target: float | None
    reached: bool | None
    scores: dict[str, float]
    steps: int
    seconds: float
    parameters: int
    scorer: str
    published: str
    machine: dict[str, Any]


def recipe_named(name: str) -> Recipe:
    """The recipe of a name.

    Raises:
        ValueError: there is none.
    """
    if name not in RECIPES:
        raise ValueError(f"recipe must be one of {', '.join(sorted(RECIPES))}, got {name!r}")
    return RECIPES[name]


def start(recipe: Recipe, data: str, seed: int, layers: str, folder: Path, device: str) -> Trainer:
    """The trainer of a recipe: a new one, or that of the folder's checkpoint.

    One folder of corpora is given to all recipes, and to those that read none too.

    Raises:
        ValueError: the checkpoint is of other settings than the recipe's, or as Trainer.resume.
    """
    if recipe.task in load(entry(recipe.model).job).WITHOUT_DATA:
        data = ""
    spec = JobSpec(
        recipe.model, recipe.task, data, layers, seed, dict(recipe.sizes), dict(recipe.reading)
    )
    options = TrainOptions(**{**recipe.options, "seed": seed})
    path = checkpoint_path(folder)
    if path.exists():
        trainer = Trainer.resume(path, device=device, data=data or None)
        kept = {**asdict(trainer.options), **asdict(trainer.job.spec)}
        settings = {**asdict(options), **asdict(spec), "data": kept["data"]}  # it may have moved
        expect_kept(path, kept, settings, "choose another --out")
    else:
        job = make_job(spec)
        job.model.to(device)
        trainer = Trainer(job, options)
    start_log(folder, trainer.step)
    return trainer


def finish(name: str, trainer: Trainer, folder: Path) -> Result:
    """Scores of the best weights of a finished training, written to folder/result.json too."""
    recipe = recipe_named(name)
    data, device = trainer.job.spec.data, trainer.job.device
    job = restore_job(checkpoint.load(result_path(folder)), data=data, device=str(device))
    scores = job.evaluate(recipe.part, **recipe.evaluate)
    score, target = scores[recipe.score], recipe.target
    result = Result(
        recipe=name,
        seed=job.spec.seed,
        layers=job.spec.layers,
        score=score,
        target=target,
        reached=None if target is None else score >= target if job.higher else score <= target,
        scores=scores,
        steps=trainer.step,
        seconds=sum(line["seconds"] for line in read_log(log_path(folder))),
        parameters=sum(p.numel() for p in job.model.parameters()),
        scorer=job.scorer(),
        published=f"{recipe.published} ({recipe.source})" if recipe.published else "",
        machine=machine(device),
    )
    text = json.dumps(asdict(result), indent=1, ensure_ascii=False)
    write_atomically(folder / "result.json", lambda file: file.write(text.encode() + b"\n"))
    return result


def reproduce(
    name: str,
    data: str,
    seed: int,
    layers: str,
    folder: Path,
    stop: StopRequest,
    on_start: Callable[[Trainer], None] = lambda trainer: None,
    on_step: OnStep = lambda loss: None,
    on_scores: OnScores = lambda step, scores: None,
    device: str = "cpu",
) -> Result | None:
    """Trains a recipe in a folder and scores it; None where it was asked to stop before.

    Args:
        on_start: is called before the first step, and may set the threads: on other ones than the
            recipe's own, trainer.options.threads, sums are made in another order.

    Raises:
        ValueError: there is no such recipe, its data is not there, or the folder is of a run with
            other settings.
    """
    trainer = start(recipe_named(name), data, seed, layers, folder, device)
    on_start(trainer)
    run_steps(trainer, folder, trainer.steps, stop, on_step, on_scores)
    return finish(name, trainer, folder) if trainer.finished else None


def machine(device: torch.device) -> dict[str, Any]:
    """What a figure has beside it: processor, threads, versions, date, and any GPU."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [n for n in cpuinfo.read_text().splitlines() if n.startswith("model name")]
        processor = names[0].partition(":")[2].strip() if names else processor
    return {
        "processor": processor,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "seqkern": version("seqkern"),
        "date": date.today().isoformat(),
        **({"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}),
    }
