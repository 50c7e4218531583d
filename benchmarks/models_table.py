"""The table of docs/models.md: `python -m benchmarks.models_table [FOLDER]`.

The folder holds the result.json files of `seqkern reproduce`, each as RECIPE-SEED.json.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean

from seqkern.tasks.recipes import RECIPES

FOLDER = Path(__file__).parent / "results" / "models"
HEAD = (
    "| recipe | model | task | score | target | | published | seeds | seconds "
    "| machine, threads |\n"
    "|---|---|---|---|---|---|---|---|---|---|"
)


def machine(of: dict) -> str:
    """Its processor, without what only its maker needs, and the threads."""
    processor = of["processor"].replace("(R)", "").removesuffix(" Processor")
    return f"{processor}, {of['threads']}"


def line(recipe: str, results: list[dict]) -> str:
    """One recipe: the mean of its seeds, and the lowest and highest where there are several."""
    row = RECIPES[recipe]
    scores = [result["score"] for result in results]
    shown = f"{mean(scores):.4g}"
    if len(scores) > 1:
        shown += f" ({min(scores):.4g} to {max(scores):.4g})"
    missed = sum(not result["reached"] for result in results)
    verdict = "reached" if not missed else "**missed**"
    if 0 < missed < len(results):
        verdict = f"**missed by {missed} of {len(results)}**"
    target = f"beside `{row.beside}` |" if row.target is None else f"{row.target:g} | {verdict}"
    seconds = mean(result["seconds"] for result in results)
    seeds = ", ".join(str(result["seed"]) for result in results)
    machines = {machine(result["machine"]) for result in results}
    published = f"{row.published}: {row.source}" if row.published else ""
    return (
        f"| `{recipe}` | {row.model} | {row.task} | {row.score} {shown} | {target} | "
        f"{published} | {seeds} | {seconds:.0f} | {'; '.join(sorted(machines))} |"
    )


def table(folder: Path = FOLDER) -> str:
    """The results of a folder in Markdown, in the order of the recipes."""
    found = defaultdict(list)
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text())
        found[result["recipe"]].append(result)
    lines = [line(recipe, found[recipe]) for recipe in RECIPES if recipe in found]
    return "\n".join([HEAD, *lines])


def main() -> None:
    """Prints the table."""
    print(table(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER))


if __name__ == "__main__":
    main()
