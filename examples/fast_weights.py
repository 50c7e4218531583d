"""Fast weights and an LSTM of the same size recall which digit stood beside a letter.

python examples/fast_weights.py [--pairs 2] [--steps 600]
"""

import argparse

from seqkern.tasks.job import JobSpec
from seqkern.tasks.options import TrainOptions
from seqkern.tasks.registry import make_job
from seqkern.tasks.training import Trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--steps", type=int, default=600)
    arguments = parser.parse_args()

    reading = {"pairs": arguments.pairs, "train": 20_000, "dev": 2000, "test": 2000}
    options = TrainOptions(steps=arguments.steps, lr=1e-2, warmup=20, weight_decay=0)
    for cell in ("fast", "LSTM"):
        sizes = {"cell": cell, "hidden": 50}
        job = make_job(JobSpec("fast-weights", "retrieval", sizes=sizes, reading=reading))
        trainer = Trainer(job, options)
        for loss, _ in trainer.train(arguments.steps):
            if trainer.step % 100 == 0 or trainer.finished:
                print(f"{cell} step {trainer.step}: loss {loss:.3f}")
        print(f"{cell}: {job.evaluate('test')['error']:.1%} wrong")
        text = job.data.test[0].text
        print(text, *job.predict([text]))


if __name__ == "__main__":
    main()
