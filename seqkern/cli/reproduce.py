"""`seqkern reproduce RECIPE`: trains with fixed settings and shows the score by its target."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from seqkern.cli.common import (
    INTERRUPTED,
    Data,
    Device,
    expect_device,
    progress_bar,
    user_errors,
)
from seqkern.tasks.options import expect_threads
from seqkern.tasks.recipes import RECIPES
from seqkern.tasks.reproduce import Result
from seqkern.tasks.reproduce import reproduce as run_recipe
from seqkern.tasks.run import stop_on_signal
from seqkern.tasks.training import Trainer

OPTION = typer.Option


def reproduce(
    recipe: Annotated[str | None, typer.Argument(help="left out, all recipes are listed")] = None,
    data: Data = "",
    seeds: Annotated[int, OPTION(help="how many trainings, with seeds 1, 2, ...")] = 1,
    layers: Annotated[str, OPTION(help="seqkern or torch")] = "seqkern",
    threads: Annotated[int | None, OPTION(help="of the processor; the recipe's own: 1")] = None,
    device: Device = "cpu",
    out: Annotated[Path, OPTION(help="folder of the runs")] = Path("runs/reproduce"),
) -> None:
    """Train a reference model as its recipe says and print its score beside its target."""
    if recipe is None:
        Console().print(_recipes())
        return
    with user_errors():
        if seeds < 1:
            raise ValueError(f"seeds must be at least 1, got {seeds}")
        if threads is not None:
            expect_threads(threads)
        expect_device(device)
        for seed in range(1, seeds + 1):
            folder = out / f"{recipe}-{layers}-{seed}"
            result = _run(recipe, data, seed, layers, threads, device, folder)
            if result is None:
                print("stopped; the same command goes on")
                raise typer.Exit(INTERRUPTED)
            _show(result, folder)


def _run(
    recipe: str,
    data: str,
    seed: int,
    layers: str,
    threads: int | None,
    device: str,
    folder: Path,
) -> Result | None:
    with stop_on_signal() as stop, progress_bar() as bar:
        line = bar.add_task(recipe, total=None, note="")

        def on_start(trainer: Trainer) -> None:
            torch.set_num_threads(threads or trainer.options.threads)
            bar.update(line, total=trainer.steps, completed=trainer.step)

        def on_step(loss: float) -> None:
            bar.update(line, advance=1, note=f"loss {loss:.3f}")

        def on_scores(step: int, scores: dict[str, float]) -> None:
            shown = ", ".join(f"{name} {value:.4g}" for name, value in scores.items())
            bar.console.print(f"step {step}: dev {shown}", highlight=False)

        hooks = (stop, on_start, on_step, on_scores)
        return run_recipe(recipe, data, seed, layers, folder, *hooks, device)


def _show(result: Result, folder: Path) -> None:
    recipe = RECIPES[result.recipe]
    print(f"{result.recipe}, seed {result.seed}: {recipe.score} {result.score:.4g}")
    if result.target is None:
        print(f"to be compared with {recipe.beside}")
    else:
        print(f"target {result.target:g}: {'reached' if result.reached else 'MISSED'}")
    if result.published:
        print(f"published {result.published}")
    where = f" on {result.machine['gpu']}" if "gpu" in result.machine else ""
    print(f"{result.steps} steps, {result.seconds:.0f} s{where}, {result.parameters:,} parameters")
    if result.scorer:
        print(f"by {result.scorer}")
    print(f"{folder / 'result.json'}")


def _recipes() -> Table:
    table = Table("recipe", "model", "task", "score", "target", "published")
    for name, row in sorted(RECIPES.items()):
        target = f"beside {row.beside}" if row.target is None else f"{row.target:g}"
        table.add_row(name, row.model, row.task, row.score, target, row.published)
    return table
