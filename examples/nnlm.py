"""Trains Bengio's neural language model on words, beside counts with Kneser-Ney.

    python examples/nnlm.py [--data TEXT.txt] [--steps 600]

Without --data it reads the source of Python's own argparse. Needs: pip install nltk.
"""

import argparse

from seqkern.tasks.job import JobSpec
from seqkern.tasks.options import TrainOptions
from seqkern.tasks.registry import make_job
from seqkern.tasks.training import Trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default=argparse.__file__, help="a text file")
    parser.add_argument("--steps", type=int, default=600)
    arguments = parser.parse_args()

    sizes = {"order": 4, "features": 32, "hidden": 64, "dropout": 0.3}
    reading = {"tokens": "words", "min_count": 2, "window": 16}
    job = make_job(JobSpec("nnlm", "text", arguments.data, sizes=sizes, reading=reading))
    trainer = Trainer(job, TrainOptions(steps=arguments.steps, batch_size=32, warmup=20))
    for loss, _ in trainer.train(arguments.steps):
        if trainer.step % 100 == 0 or trainer.finished:
            print(f"step {trainer.step}: loss {loss:.3f}")
    scores = job.evaluate("dev", ngram=4)
    print(f"perplexity {scores['perplexity']:.1f}, counted {scores['kneser_ney']:.1f}")


if __name__ == "__main__":
    main()
