"""Where a corpus lies that is known by its name, and the files of a folder."""

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


def part_file(folder: str | Path, *names: str) -> Path | None:
    """The first of these files that a folder holds, with .gz after its name or without."""
    for name in names:
        for path in (Path(folder) / name, Path(folder) / f"{name}.gz"):
            if path.is_file():
                return path
    return None


def needed_file(folder: str | Path, *names: str) -> Path:
    """`part_file`, or a ValueError that says what is missing."""
    path = part_file(folder, *names)
    if path is None:
        raise ValueError(f"{folder} holds no {' or '.join(names)}, nor one that ends in .gz")
    return path


def multi30k_files(root: str | Path, language: str) -> list[Path]:
    """Multi30k's captions in "de" or "en", tokenised in lower case: train, val and test 2016.

    Raises:
        ValueError: one of them is absent.
    """
    folder = corpus_folder(root, "multi30k") / "tok"
    parts = ("train", "val", "test_2016_flickr")
    return [needed_file(folder, f"{part}.lc.norm.tok.{language}") for part in parts]
