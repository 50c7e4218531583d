"""Trains an encoder-decoder to say words backwards, through one vector of fixed size.

    python examples/seq2seq.py [--cell lstm|gru] [--steps 600] [WORD ...]

What the vector cannot hold is lost: long words come out worse than short ones.
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


def backwards(count: int) -> str:
    """Lines of a word and the same word backwards, letter by letter."""
    draw = random.Random(1)
    words = {"".join(draw.choices("abcdefgh", k=draw.randint(2, 8))) for _ in range(count)}
    return "".join(f"{word}\t{' '.join(word[::-1])}\n" for word in sorted(words))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cell", choices=["lstm", "gru"], default="gru")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("words", nargs="*", default=["cafe", "bead", "gaffed"])
    arguments = parser.parse_args()

    options = TrainOptions(steps=arguments.steps, batch_size=64, lr=1e-2, warmup=20)
    torch.set_num_threads(options.threads)
    sizes = {"cell": arguments.cell, "embedding": 16, "hidden": 96, "depth": 1}
    sizes["context"] = arguments.cell == "gru"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "words.tsv"
        path.write_text(backwards(6000))
        job = make_job(JobSpec("seq2seq", "pairs", str(path), sizes=sizes))
    trainer = Trainer(job, options)
    for loss, _ in trainer.train(arguments.steps):
        if trainer.step % 100 == 0 or trainer.finished:
            print(f"step {trainer.step}: loss {loss:.3f}")

    held_out = job.data.test
    answers = dict(zip(held_out, job.predict([pair.source for pair in held_out]), strict=True))
    for length in sorted({len(pair.source) for pair in held_out}):
        of_length = [pair for pair in held_out if len(pair.source) == length]
        right = sum(answers[pair] == pair.target for pair in of_length) / len(of_length)
        print(f"words of {length} letters: {right:.0%} right")
    for word, target in zip(arguments.words, job.predict(arguments.words), strict=True):
        print(word, target, sep="\t")


if __name__ == "__main__":
    main()
