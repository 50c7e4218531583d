"""`seqkern demo`: grapheme-to-phoneme, trained on torch.nn's layers and on seqkern's."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from seqkern.cli import doctor
from seqkern.cli.common import INTERRUPTED, Beam, progress_bar, user_errors
from seqkern.tasks.compare import RUNS, Comparison, compare, train_in_turns
from seqkern.tasks.data import references
from seqkern.tasks.job import Alignment, JobSpec
from seqkern.tasks.options import TrainOptions
from seqkern.tasks.report import table_rows, write_report
from seqkern.tasks.run import stop_on_signal
from seqkern.tasks.training import Trainer
from seqkern.tasks.translation import TranslationJob

OPTION = typer.Option
SHOWN = 6  # words with a heat-map


def demo(
    out: Annotated[Path, OPTION(help="folder of both runs and report.html")] = Path("runs/demo"),
    data: Annotated[str, OPTION(help="cmudict, or a source<TAB>target file")] = "cmudict",
    steps: Annotated[int, OPTION(help="steps of each run")] = TrainOptions.steps,
    batch_size: Annotated[int, OPTION(help="words of a step")] = TrainOptions.batch_size,
    hidden: Annotated[int, OPTION(help="units of encoder and decoder")] = 128,
    seed: Annotated[int, OPTION(help="of split, weights and order")] = TrainOptions.seed,
    threads: Annotated[int, OPTION(help="of the processor")] = TrainOptions.threads,
    beam: Beam = 4,
) -> None:
    """Train the same model on both sets of layers, compare them, and write a report."""
    started = time.perf_counter()
    console = Console()
    with user_errors():
        if beam < 1:
            raise ValueError(f"beam must be at least 1, got {beam}")
        options = TrainOptions(steps=steps, batch_size=batch_size, seed=seed, threads=threads)
        torch.set_num_threads(threads)
        jobs = {name: _job(data, seed, hidden, name) for name in RUNS}
        trainers = {name: Trainer(job, options) for name, job in jobs.items()}
        facts = _facts(jobs["seqkern"], options)
        for name, value in facts:
            console.print(f"{name}: {value}", highlight=False)
        rates = _train(trainers, out)
        comparison = _decode(jobs, out, rates, beam)
        console.print(_table(comparison))
        facts.append(("whole time", f"{time.perf_counter() - started:.0f} s"))
        report = out / "report.html"
        alignments = _alignments(jobs["seqkern"], beam)
        write_report(report, comparison, alignments, facts, "\n".join(doctor.report()))
    console.print(f"{facts[-1][1]}; report: {report}", highlight=False)


def _job(data: str, seed: int, hidden: int, layers: str) -> TranslationJob:
    task, data = ("cmudict", "") if data == "cmudict" else ("pairs", data)
    return TranslationJob(JobSpec("rnnsearch", task, data, layers, seed, {"hidden": hidden}))


def _facts(job: TranslationJob, options: TrainOptions) -> list[tuple[str, str]]:
    parts = [len(references(part)) for part in job.data]
    size = sum(p.numel() for p in job.model.parameters())
    return [
        (
            "data",
            f"{job.spec.data or job.spec.task}: {parts[0]:,} words to train, {parts[1]:,} dev, "
            f"{parts[2]:,} test; {len(job.data.train):,} training pairs",
        ),
        ("model", f"RNNSearch, hidden {job.spec.sizes['hidden']}, {size:,} parameters"),
        (
            "training",
            f"{options.steps} steps of {options.batch_size} words, lr {options.lr}, "
            f"seed {options.seed}, {options.threads} thread(s)",
        ),
    ]


def _train(trainers: dict[str, Trainer], out: Path) -> dict[str, float]:
    with stop_on_signal() as stop, progress_bar() as bar:
        lines = {
            name: bar.add_task(name, total=trainer.options.steps, note="")
            for name, trainer in trainers.items()
        }

        def on_step(name: str, loss: float) -> None:
            bar.update(lines[name], advance=1, note=f"loss {loss:.3f}")

        rates = train_in_turns(trainers, out, stop, on_step)
    if stop:
        spec = trainers["seqkern"].job.spec
        print(
            f"stopped; either run goes on with: seqkern train {spec.model} --task {spec.task} "
            f"--run {out}/torch (or {out}/seqkern)"
        )
        raise typer.Exit(INTERRUPTED)
    return rates


def _decode(
    jobs: dict[str, TranslationJob], out: Path, rates: dict[str, float], beam: int
) -> Comparison:
    words = len(references(jobs["seqkern"].data.test))
    with progress_bar() as bar:
        lines = {name: bar.add_task(name, total=words, note="decoding") for name in jobs}
        return compare(jobs, out, rates, beam, lambda name, n: bar.update(lines[name], advance=n))


def _table(comparison: Comparison) -> Table:
    table = Table("", "torch.nn", "seqkern.nn", "compared")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in table_rows(comparison):
        table.add_row(*row)
    return table


def _alignments(job: TranslationJob, beam: int) -> list[Alignment]:
    """Of test words from all over the alphabet, long enough to show much where there are such."""
    sources = list(references(job.data.test))
    words = [source for source in sources if 7 <= len(source) <= 12] or sources
    spread = words[:: max(1, len(words) // SHOWN)][:SHOWN]
    return [job.align(word, beam) for word in spread]
