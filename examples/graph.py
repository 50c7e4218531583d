"""Trains a graph network to evaluate expressions, with their edges and without.

    python examples/graph.py [--steps 300] [--data FOLDER]

--data is a folder of train.conllu, dev.conllu and test.conllu: the network then finds the relation
of each word to its head. Without it, expressions of ListOps are graphs of digits and operators.
"""

import argparse

import torch

from seqkern.tasks.job import JobSpec
from seqkern.tasks.options import TrainOptions
from seqkern.tasks.registry import make_job
from seqkern.tasks.training import Trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="", help="a folder of dependency parses")
    parser.add_argument("--steps", type=int, default=300)
    arguments = parser.parse_args()

    options = TrainOptions(steps=arguments.steps, batch_size=32, lr=1e-2, optimizer="adam")
    torch.set_num_threads(options.threads)
    reading = {"examples": 4000, "held_out": 400, "depth": 2, "arguments": 4, "nested": 0.5}
    reading["operators"] = ("MAX", "MIN")
    for edges in (True, False):
        sizes = {"embedding": 32, "hidden": 48, "rounds": 3, "edges": edges}
        if arguments.data:
            spec = JobSpec("graph", "conllu", arguments.data, sizes=sizes)
        else:
            spec = JobSpec("graph", "listops", sizes=sizes, reading=reading)
        trainer = Trainer(make_job(spec), options)
        for loss, _ in trainer.train(arguments.steps):
            if trainer.step % 100 == 0 or trainer.finished:
                print(f"step {trainer.step}: loss {loss:.3f}")
        right = trainer.job.evaluate("test")["accuracy"]
        print(f"{'with' if edges else 'without'} edges: {right:.1%} of held-out labels right")


if __name__ == "__main__":
    main()
