"""Trains a TextCNN to tell two kinds of sentences apart, and labels some with it.

    python examples/textcnn.py [--data LABELLED.tsv] [--steps 100] [SENTENCE ...]

--data is a file of `label<TAB>text` lines; without it the sentences are generated opinions.
"""

import argparse
import random
import tempfile
from pathlib import Path

import torch

from seqkern.tasks.job import JobSpec
from seqkern.tasks.options import TrainOptions
from seqkern.tasks.registry import make_job
from seqkern.tasks.training import Trainer

KINDS = {"good": ["great", "fine", "not dull", "not bad"], "bad": ["dull", "bad", "not great"]}


def opinions(count: int) -> str:
    """Lines of which a phrase of one or two words tells the label."""
    draw = random.Random(1)
    lines = []
    for _ in range(count):
        label = draw.choice(sorted(KINDS))
        before = draw.choice(["the plot is", "all in all a film that is", "it was"])
        after = draw.choice(["", "indeed", "to me", "from the first scene to the last"])
        lines.append(f"{label}\t{before} {draw.choice(KINDS[label])} {after}\n")
    return "".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="a file of label<TAB>text lines")
    parser.add_argument("--steps", type=int, default=100)
    default = ["the film is great", "to me it was not great", "a plot that is not bad indeed"]
    parser.add_argument("sentences", nargs="*", default=default)
    arguments = parser.parse_args()

    options = TrainOptions(steps=arguments.steps, batch_size=32, lr=1e-2, warmup=0)
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "opinions.tsv"
        path.write_text(opinions(600))
        sizes = {"embedding": 32, "widths": (1, 2, 3), "maps": 32}
        job = make_job(JobSpec("textcnn", "labelled", arguments.data or str(path), sizes=sizes))
    trainer = Trainer(job, options)
    for loss, _ in trainer.train(arguments.steps):
        if trainer.step % 50 == 0:
            print(f"step {trainer.step}: loss {loss:.3f}")
    print(f"held-out sentences: {job.evaluate('test')['accuracy']:.1%} right")
    for sentence, label in zip(arguments.sentences, job.predict(arguments.sentences), strict=True):
        print(label, sentence, sep="\t")


if __name__ == "__main__":
    main()
