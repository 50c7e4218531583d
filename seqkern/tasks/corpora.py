"""Where a corpus lies that is known by its name."""

from __future__ import annotations

from pathlib import Path


def corpus_folder(root: str | Path, name: str) -> Path:
    """The folder of a corpus: `root/name`, or `root/ANY/name` where the corpora are sorted.

    Raises:
        ValueError: root is empty, is no folder, or holds no such corpus.
    """
    if not str(root):
        raise ValueError(f"task {name!r} needs data: the folder that holds the corpus {name!r}")
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"data must be the folder that holds the corpus {name!r}, got {root}")
    found = [path for path in (root / name, *sorted(root.glob(f"*/{name}"))) if path.is_dir()]
    if not found:
        raise ValueError(f"{root} holds no corpus {name!r}, neither there nor one folder below")
    return found[0]
