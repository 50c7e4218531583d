"""Trains a HyperLSTM and an LSTM of the same size on characters.

    python examples/hyperlstm.py [--data TEXT.txt] [--steps 200]

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
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args()

    main_sizes = {"embedding": 32, "hidden": 96}
    models = {
        "hyperlstm": main_sizes | {"hyper": 24, "z": 8},
        "rnnlm": main_sizes | {"cell": "LSTM", "depth": 1},
    }
    options = TrainOptions(steps=arguments.steps, batch_size=16, lr=5e-3, warmup=20)
    for model, sizes in models.items():
        job = make_job(JobSpec(model, "text", arguments.data, sizes=sizes))
        trainer = Trainer(job, options)
        for loss, _ in trainer.train(arguments.steps):
            if trainer.step % 50 == 0 or trainer.finished:
                print(f"{model} step {trainer.step}: loss {loss:.3f}")
        print(f"{model}: {job.evaluate('dev')['bits']:.2f} bits a character on text not seen")


if __name__ == "__main__":
    main()
