"""Trains a BiLSTM tagger that finds names it has never seen, by their letters and neighbours.

    python examples/tagger.py [--data COLUMNS] [--steps 100] [SENTENCE ...]

--data is a file of a word and its IOB tag a line, with empty lines between sentences; without it
the sentences are generated requests for music.
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


def requests(count: int) -> str:
    """Sentences in columns: after "by" stands an artist, in capitals and of one or two words."""
    draw, lines = random.Random(1), []
    for _ in range(count):
        artist = ["".join(draw.choices("abdeiklmnorstu", k=5)).title() for _ in range(2)]
        artist = artist[: draw.randint(1, 2)]
        words = ["play", *draw.sample(["me", "some", "music", "please"], draw.randint(1, 3)), "by"]
        lines += [f"{word} O" for word in words]
        lines += [f"{w} {t}" for w, t in zip(artist, ["B-artist", "I-artist"], strict=False)]
        lines += ["now O", ""] if draw.random() < 0.5 else [""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="a file of a word and its tag a line")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("sentences", nargs="*", default=["play some music by Nina Simone now"])
    arguments = parser.parse_args()

    options = TrainOptions(steps=arguments.steps, batch_size=32, lr=1e-2, warmup=0)
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "requests.iob"
        path.write_text(requests(400))
        sizes = {"embedding": 16, "hidden": 32, "letter_embedding": 8, "dropout": 0.1}
        data, reading = arguments.data or str(path), {"spellings": True}
        job = make_job(JobSpec("tagger", "iob", data, sizes=sizes, reading=reading))
    trainer = Trainer(job, options)
    for loss, _ in trainer.train(arguments.steps):
        if trainer.step % 50 == 0:
            print(f"step {trainer.step}: loss {loss:.3f}")
    print(f"held-out sentences: F1 of phrases {job.evaluate('test')['slot_f1']:.1%}")
    for sentence, tags in zip(arguments.sentences, job.predict(arguments.sentences), strict=True):
        print(sentence, tags, sep="\t")


if __name__ == "__main__":
    main()
