"""Trains a small decoder-only Transformer on characters and lets it write on.

    python examples/transformer_lm.py [--data TEXT.txt] [--steps 500] [PROMPT]

Without --data it reads the source of Python's own argparse.
"""

import argparse

from seqkern.tasks.job import JobSpec
from seqkern.tasks.options import TrainOptions
from seqkern.tasks.registry import make_job
from seqkern.tasks.training import Trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default=argparse.__file__, help="a text file")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("prompt", nargs="?", default="def ")
    arguments = parser.parse_args()

    sizes = {"width": 64, "heads": 4, "depth": 2, "context": 64}
    job = make_job(JobSpec("transformer-lm", "text", arguments.data, sizes=sizes))
    trainer = Trainer(job, TrainOptions(steps=arguments.steps, batch_size=12, warmup=50))
    for loss, _ in trainer.train(arguments.steps):
        if trainer.step % 100 == 0 or trainer.finished:
            print(f"step {trainer.step}: loss {loss:.3f}")
    print(arguments.prompt + job.sample([arguments.prompt], length=200)[0])


if __name__ == "__main__":
    main()
