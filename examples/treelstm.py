"""Trains a Tree-LSTM to evaluate nested expressions, or to label your own trees.

    python examples/treelstm.py [--data FOLDER] [--steps 400] [TREE ...]

--data is a folder of train.txt, dev.txt and test.txt with trees in brackets, as
`(3 (2 Not) (4 (2 too) (3 bad)))`; without it the trees are expressions of ListOps, as
`[MAX 2 9 [MIN 4 7 ] 0 ]`.
"""

import argparse

import torch

from seqkern.tasks.job import JobSpec
from seqkern.tasks.options import TrainOptions
from seqkern.tasks.registry import make_job
from seqkern.tasks.training import Trainer

EXPRESSIONS = ["[MAX 2 9 [MIN 4 7 ] 0 ]", "[MIN 8 [MAX 3 5 ] [MAX 1 7 [MIN 9 6 ] ] ]"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="", help="a folder of trees in brackets")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("trees", nargs="*", help="what to label in the end")
    arguments = parser.parse_args()

    if arguments.data:
        spec = JobSpec("treelstm", "trees", arguments.data, sizes={"kind": "childsum"})
    else:
        sizes = {"kind": "childsum", "embedding": 16, "hidden": 48}
        reading = {"examples": 4000, "held_out": 400, "depth": 3, "arguments": 4}
        reading["operators"] = ("MAX", "MIN")
        spec = JobSpec("treelstm", "listops", sizes=sizes, reading=reading)
    options = TrainOptions(steps=arguments.steps, batch_size=32, lr=1e-2, optimizer="adam")
    torch.set_num_threads(options.threads)
    trainer = Trainer(make_job(spec), options)
    for loss, _ in trainer.train(arguments.steps):
        if trainer.step % 100 == 0 or trainer.finished:
            print(f"step {trainer.step}: loss {loss:.3f}")
    print(f"held-out trees: {trainer.job.evaluate('test')['accuracy']:.1%} right")
    texts = arguments.trees or ([] if arguments.data else EXPRESSIONS)
    for text, label in zip(texts, trainer.job.predict(texts), strict=True):
        print(label, text, sep="\t")


if __name__ == "__main__":
    main()
