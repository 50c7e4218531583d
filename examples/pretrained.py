"""Reads sentences first, and then learns to label them from the very few that have a label.

    python examples/pretrained.py [--data LABELLED.tsv] [--pretrain 150] [--steps 60] [SENTENCE ...]

--data is a file of `label<TAB>text` lines; without it the sentences are of two dialects of twenty
words each. One sentence in a thousand keeps its label, and at least one of each label. The model
is trained twice, without the first phase and with it.
"""

import argparse
import random
import tempfile
from pathlib import Path

import torch

from seqkern.tasks.job import Job, JobSpec
from seqkern.tasks.options import TrainOptions
from seqkern.tasks.registry import make_job
from seqkern.tasks.training import Trainer

DIALECTS = {
    "north": "burn kirk loch brae glen wee bairn lass lad aye nae ken gang hame braw muckle bonnie "
    "dreich reek sark",
    "south": "brook church lake slope dale small child girl boy yes no know go home fine big fair "
    "grey smoke shirt",
}


def sentences(count: int) -> str:
    """Lines of four words of a dialect: two of one dialect seldom share a word."""
    draw = random.Random(1)
    labels = draw.choices(sorted(DIALECTS), k=count)
    texts = (" ".join(draw.choices(DIALECTS[label].split(), k=4)) for label in labels)
    return "".join(f"{label}\t{text}\n" for label, text in zip(labels, texts, strict=True))


def trained(data: str, pretrain: int, steps: int) -> Job:
    """The job after `pretrain` steps on the text of all sentences and `steps` on the labels."""
    sizes = {"embedding": 16, "hidden": 32, "head": 16, "dropout": 0.0}
    reading = {"share": 0.001, "pretrain": pretrain, "unknown": 0.0}
    options = TrainOptions(steps=steps, batch_size=32, lr=5e-3, warmup=0, schedule="constant")
    spec = JobSpec("pretrained", "labelled", data, sizes=sizes, reading=reading)
    trainer = Trainer(make_job(spec), options)
    for loss, _ in trainer.train(trainer.steps):
        if trainer.step == pretrain or trainer.finished:
            print(f"step {trainer.step}: loss {loss:.3f}")
    return trainer.job


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="a file of label<TAB>text lines")
    parser.add_argument("--pretrain", type=int, default=150)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("sentences", nargs="*", help="what to label in the end")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "dialects.tsv"
        path.write_text(sentences(1500))
        for pretrain in (0, arguments.pretrain):
            job = trained(arguments.data or str(path), pretrain, arguments.steps)
            right = job.evaluate("test")["accuracy"]
            print(f"{len(job.data.train)} labels, {pretrain} steps of reading: {right:.1%} right")
    default = [] if arguments.data else ["aye nae bonnie lass", "yes the girl is fine"]
    texts = arguments.sentences or default
    for text, label in zip(texts, job.predict(texts), strict=True):
        print(label, text, sep="\t")


if __name__ == "__main__":
    main()
