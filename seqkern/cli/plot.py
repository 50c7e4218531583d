"""`seqkern plot KIND RUN...`: learning curves, alignments, lengths, gradient norms as figures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from seqkern.cli.common import Device, user_errors
from seqkern.cli.predict import load_job
from seqkern.tasks.figures import (
    curves,
    gradient_curves,
    heat_maps,
    length_curves,
    save_figure,
)
from seqkern.tasks.run import checkpoint_path, log_path, read_log, scores_path
from seqkern.tasks.translation import LengthGroup, TranslationJob

OPTION = typer.Option


def plot(
    kind: Annotated[str, typer.Argument(help="curves, alignments, lengths or gradients")],
    runs: Annotated[list[Path], typer.Argument(help="folders of runs")],
    out: Annotated[Path, OPTION(help="the figure: .svg, .png or .pdf")] = Path("figure.svg"),
    text: Annotated[list[str] | None, OPTION(help="a source, for alignments; repeat it")] = None,
    device: Device = "cpu",
) -> None:
    """Draw learning curves, the alignments of texts, BLEU by length, or vanishing gradients."""
    with user_errors():
        if text and kind != "alignments":
            raise ValueError(f"text is for alignments, got it for {kind!r}")
        if kind == "curves":
            figure = _curves(runs, device)
        elif kind == "alignments":
            figure = _alignments(runs, text or [], device)
        elif kind == "lengths":
            figure = length_curves(_lengths(runs, device))
        elif kind == "gradients":
            figure = gradient_curves(_gradients(runs, device))
        else:
            raise ValueError(f"kind must be curves, alignments, lengths or gradients, got {kind!r}")
        save_figure(figure, out)
    print(out)


def _curves(runs: list[Path], device: str):
    names = _names(runs)
    jobs = [load_job(checkpoint_path(run), device=device) for run in runs]
    (unit, score), *others = dict.fromkeys((job.unit, job.score) for job in jobs)
    if others:
        raise ValueError(
            f"curves need runs of one unit and one score, got {unit} and {score}, "
            + ", ".join(map(" and ".join, others))
        )
    losses = {names[run]: [line["loss"] for line in read_log(log_path(run))] for run in runs}
    scores: dict[str, list[tuple[int, float]]] = {}
    for run in runs:
        lines = read_log(scores_path(run)) if scores_path(run).exists() else []
        scores[names[run]] = [(int(line["step"]), line[score]) for line in lines if score in line]
    return curves(losses, scores, unit, score)


def _alignments(runs: list[Path], texts: list[str], device: str):
    if not texts:
        raise ValueError("alignments need a source: --text TEXT, as often as you like")
    if len(runs) > 1:
        raise ValueError(f"alignments are of one run, got {len(runs)}")
    job = load_job(runs[0], device=device)
    return heat_maps([job.align(text) for text in texts])


def _lengths(runs: list[Path], device: str) -> dict[str, list[LengthGroup]]:
    groups = {}
    for run, name in _names(runs).items():
        job = load_job(run, device=device)
        if not isinstance(job, TranslationJob):
            raise ValueError(f"model {job.spec.model!r} does not translate: it has no BLEU")
        groups[name] = job.bleu_by_length("test")
        for group in groups[name]:
            print(
                f"{name}: {group.shortest} to {group.longest} symbols, {group.sources} sources, "
                f"BLEU {group.bleu:.2f}"
            )
    return groups


def _gradients(runs: list[Path], device: str) -> dict[str, list[float]]:
    norms = {}
    for run in runs:
        job = load_job(run, device=device)
        measure = getattr(job, "gradient_norms", None)
        if measure is None:
            raise ValueError(f"model {job.spec.model!r} has no gradients over time to show")
        norms[_names(runs)[run]] = measure()
    return norms


def _names(runs: list[Path]) -> dict[Path, str]:
    """The folders' own names, or their whole paths where two have one name."""
    alone = len({run.resolve().name for run in runs}) == len(runs)
    return {run: run.resolve().name if alone else str(run) for run in runs}
