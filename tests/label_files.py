"""Small files of labelled and tagged sentences for the tests of their readers and jobs."""

import gzip


def write(path, content, encoding="utf-8"):
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = content.encode(encoding)
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


def triples(folder, part, *rows):
    for end, lines in zip(("seq.in", "seq.out", "label"), zip(*rows, strict=True), strict=True):
        write(folder / f"{part}.{end}.gz", "".join(f"{line} \n" for line in lines))
    return folder
