"""The HTML report of a comparison: one file with its figures inside."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib.style
import numpy as np
from jinja2 import Environment, PackageLoader
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from seqkern.tasks.checkpoint import write_atomically
from seqkern.tasks.compare import Comparison, Result
from seqkern.tasks.figures import STYLE, heat_maps, smooth
from seqkern.tasks.job import Alignment

COLOURS = {"torch": "#8a8f98", "seqkern": "#c2410c"}
NAMES = {"torch": "torch.nn", "seqkern": "seqkern.nn"}


def table_rows(comparison: Comparison) -> list[tuple[str, str, str, str]]:
    """The one table: what, torch.nn, seqkern.nn, and the two compared."""
    a, b = comparison.torch, comparison.seqkern
    return [
        (
            "training, words/s",
            f"{a.train_rate:,.0f}",
            f"{b.train_rate:,.0f}",
            f"{comparison.train_ratio:.2f} x",
        ),
        (
            f"decoding, words/s (beam {comparison.beam})",
            f"{a.decode_rate:,.0f}",
            f"{b.decode_rate:,.0f}",
            f"{comparison.decode_ratio:.2f} x",
        ),
        (
            "largest difference of the first 50 losses",
            "",
            "",
            f"{comparison.loss_difference:.1e}",
        ),
        ("phoneme error rate", f"{a.errors.symbol:.2%}", f"{b.errors.symbol:.2%}", ""),
        ("word error rate", f"{a.errors.sequence:.2%}", f"{b.errors.sequence:.2%}", ""),
    ]


def write_report(
    path: Path,
    comparison: Comparison,
    alignments: Sequence[Alignment],
    facts: Sequence[tuple[str, str]],
    machine: str,
) -> None:
    """Writes the report.

    Args:
        path: the HTML file.
        alignments: of some words, as the seqkern run decodes them.
        facts: what was trained and on what, as name and value.
        machine: lines on hardware and versions.
    """
    with matplotlib.style.context(STYLE):
        figures = {
            "curves": _image(_curves(comparison)),
            "bars": _image(_bars(comparison)),
            "heat_maps": _image(heat_maps(alignments)),
        }
    template = Environment(
        loader=PackageLoader("seqkern.tasks", "."), autoescape=True, trim_blocks=True
    ).get_template("report.html")
    page = template.render(rows=table_rows(comparison), facts=facts, machine=machine, **figures)
    write_atomically(path, lambda file: file.write(page.encode()))


def _image(figure: Figure) -> str:
    """A figure as a data URI: inside the page, and apart from the other figures' ids."""
    svg = io.BytesIO()
    figure.savefig(svg, format="svg", bbox_inches="tight")
    return "data:image/svg+xml;base64," + base64.b64encode(svg.getvalue()).decode()


def _curves(comparison: Comparison) -> Figure:
    figure = Figure(figsize=(9.5, 3.4), layout="constrained")
    whole, first = figure.subplots(1, 2, width_ratios=[3, 2])
    runs: list[tuple[str, Result]] = [("torch", comparison.torch), ("seqkern", comparison.seqkern)]
    for name, run in runs:
        # the wide grey line under the thin one: both show where they lie on each other
        look = {"color": COLOURS[name], "label": NAMES[name], "lw": 4 if name == "torch" else 1.2}
        whole.plot(*smooth(run.losses, 40), **look)
        first.plot(np.arange(1, len(run.losses[:50]) + 1), run.losses[:50], **look)
    whole.set(xlabel="step", ylabel="loss, nats per phoneme", yscale="log")
    whole.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    whole.yaxis.set_major_formatter("{x:g}")
    whole.yaxis.set_minor_formatter("")
    whole.set_title("training loss, mean of 40 steps", loc="left")
    first.set(xlabel="step")
    first.set_title("the first 50 losses", loc="left")
    whole.legend(frameon=False)
    return figure


def _bars(comparison: Comparison) -> Figure:
    figure = Figure(figsize=(9.5, 1.9), layout="constrained")
    axes = figure.subplots(1, 2)
    rates = {
        "training": (comparison.torch.train_rate, comparison.seqkern.train_rate),
        f"decoding, beam {comparison.beam}": (
            comparison.torch.decode_rate,
            comparison.seqkern.decode_rate,
        ),
    }
    for axis, (title, values) in zip(axes, rates.items(), strict=True):
        bars = axis.barh(list(NAMES.values()), values, color=list(COLOURS.values()), height=0.6)
        axis.bar_label(bars, fmt="{:,.0f}", padding=4)
        axis.set_title(f"{title}: words/s", loc="left")
        axis.set_xlim(0, 1.2 * max(values))
        axis.xaxis.set_visible(False)
        axis.spines["bottom"].set_visible(False)
        axis.invert_yaxis()
    return figure
