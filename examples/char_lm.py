"""Trains RNN, LSTM and GRU on characters: samples of each, and how far its gradient reaches.

    python examples/char_lm.py [--data TEXT.txt] [--steps 300]

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
    parser.add_argument("--steps", type=int, default=300)
    arguments = parser.parse_args()

    for cell in ("RNN", "LSTM", "GRU"):
        sizes = {"cell": cell, "embedding": 32, "hidden": 128, "depth": 1}
        job = make_job(JobSpec("rnnlm", "text", arguments.data, sizes=sizes))
        trainer = Trainer(job, TrainOptions(steps=arguments.steps, batch_size=16, warmup=20))
        for loss, _ in trainer.train(arguments.steps):
            if trainer.step % 100 == 0 or trainer.finished:
                print(f"{cell} step {trainer.step}: loss {loss:.3f}")
        norms = job.gradient_norms(length=50)
        print(f"{cell} gradient 40 characters back: {norms[-41] / norms[-1]:.0e} of the last one's")
        print(job.sample(["def "], length=120)[0])


if __name__ == "__main__":
    main()
