"""The figures of reports and of `seqkern plot`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import ParamSpec

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from seqkern.tasks.checkpoint import write_atomically
from seqkern.tasks.job import Alignment
from seqkern.tasks.translation import LengthGroup

P = ParamSpec("P")
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "svg.fonttype": "path",
}
FORMATS = (".svg", ".png", ".pdf")


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Draws with STYLE, which matplotlib reads as it makes axes, not as it saves them."""

    @wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with matplotlib.style.context(STYLE):
            return draw(*args, **kwargs)

    return drawn


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a figure in the format that the file's name ends with.

    Raises:
        ValueError: another format than FORMATS.
    """
    if path.suffix not in FORMATS:
        raise ValueError(f"a figure's name must end in one of {FORMATS}, got {path.name!r}")
    form = path.suffix[1:]
    write_atomically(path, lambda file: figure.savefig(file, format=form, bbox_inches="tight"))


def smooth(values: Sequence[float], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Means over windows of `width` values, at the windows' middles, counted from 1."""
    width = max(1, min(width, len(values)))
    mean = np.convolve(values, np.full(width, 1 / width), mode="valid")
    return np.arange(len(mean)) + (width + 1) / 2, mean


@styled
def curves(
    losses: Mapping[str, Sequence[float]],
    scores: Mapping[str, Sequence[tuple[int, float]]],
    unit: str,
    score: str,
) -> Figure:
    """Training losses of runs by step, and beside them their scores on the dev part.

    Args:
        losses: of each run, one a step, in nats per `unit`.
        scores: of each run, (step, score) of its evaluations; all empty where there is none.
        unit, score: names for the axes.
    """
    evaluated = any(scores.values())
    figure = Figure(figsize=(9.5 if evaluated else 6, 3.4), layout="constrained")
    axes = figure.subplots(1, 2 if evaluated else 1, squeeze=False)[0]
    for name, values in losses.items():
        axes[0].plot(*smooth(values, max(1, len(values) // 50)), label=name, lw=1.3)
    axes[0].set(xlabel="step", ylabel=f"loss, nats per {unit}")
    axes[0].set_title("training loss, moving mean", loc="left")
    for name, points in scores.items() if evaluated else ():
        axes[1].plot(*zip(*points, strict=True), label=name, lw=1.3, marker="o", ms=3)
    if evaluated:
        axes[1].set(xlabel="step", ylabel=score)
        axes[1].set_title("dev part", loc="left")
    axes[0].legend(frameon=False)
    return figure


@styled
def gradient_curves(norms: Mapping[str, Sequence[float]]) -> Figure:
    """Norms of dL/dx_t of each model against t, the loss being of the last position alone."""
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axis = figure.subplots()
    for name, values in norms.items():
        back = np.arange(len(values)) - len(values) + 1
        axis.plot(back, values, label=name, lw=1.3)
    axis.set(xlabel="t, steps before the loss", ylabel="norm of dL/dx_t", yscale="log")
    axis.legend(frameon=False)
    return figure


@styled
def length_curves(groups: Mapping[str, Sequence[LengthGroup]]) -> Figure:
    """BLEU of each model against the length of the source."""
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axis = figure.subplots()
    for name, of_run in groups.items():
        middles = [(group.shortest + group.longest) / 2 for group in of_run]
        axis.plot(middles, [group.bleu for group in of_run], label=name, lw=1.3, marker="o", ms=3)
    axis.set(xlabel="symbols of the source", ylabel="BLEU", ylim=(0, None))
    axis.legend(frameon=False)
    return figure


@styled
def heat_maps(alignments: Sequence[Alignment]) -> Figure:
    """Alignments, three side by side: rows downwards, sources across."""
    columns = min(3, len(alignments))
    rows = -(-len(alignments) // columns)
    space = ConstrainedLayoutEngine(wspace=0.06, hspace=0.08)
    figure = Figure(figsize=(9.5 / 3 * columns, 3.3 * rows), layout=space)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes[len(alignments) :]:
        axis.set_visible(False)
    for axis, alignment in zip(axes, alignments):
        _heat_map(axis, alignment)
    return figure


def _heat_map(axis: Axes, alignment: Alignment) -> None:
    axis.imshow(alignment.weights.numpy(), cmap="Greys", vmin=0, vmax=1, aspect="auto")
    places = range(len(alignment.source))
    axis.set_xticks(places, alignment.source, fontsize=9)
    if max(map(len, alignment.source)) > 2:  # words do not fit side by side as letters do
        axis.set_xticks(places, alignment.source, rotation=60, ha="left", rotation_mode="anchor")
    ends = [*alignment.target, "end"][: alignment.weights.size(0)]
    axis.set_yticks(range(len(ends)), ends)
    axis.tick_params(length=0, labeltop=True, labelbottom=False)
    for side in ("left", "bottom"):
        axis.spines[side].set_color("#d4d4d8")
