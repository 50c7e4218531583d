"""Trains a Transformer to write numbers in digits, and shows which word it reads for each.

python examples/transformer.py [--layers seqkern|torch] [--steps 500] ["NUMBER IN WORDS" ...]
"""

import argparse
import tempfile
from pathlib import Path

import torch

from seqkern.tasks.job import JobSpec
from seqkern.tasks.options import TrainOptions
from seqkern.tasks.registry import make_job
from seqkern.tasks.training import Trainer

ONES = [
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
]
ONES += ["fifteen", "sixteen", "seventeen", "eighteen", "nineteen"]
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]


def in_words(number: int) -> str:
    """A number from 1 to 9999 in words."""
    for unit, name in ((1000, "thousand"), (100, "hundred")):
        if number >= unit:
            rest = f" {in_words(number % unit)}" if number % unit else ""
            return f"{in_words(number // unit)} {name}{rest}"
    if number < 20:
        return ONES[number - 1]
    return TENS[number // 10 - 2] + (f" {ONES[number % 10 - 1]}" if number % 10 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", choices=["seqkern", "torch"], default="seqkern")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("numbers", nargs="*", default=["four thousand two"])
    arguments = parser.parse_args()

    options = TrainOptions(steps=arguments.steps, batch_size=64, warmup=50, schedule="noam")
    torch.set_num_threads(options.threads)
    sizes = {"width": 64, "heads": 4, "ffn": 128, "depth": 2, "dropout": 0.0}
    reading = {"source_tokens": "words", "target_tokens": "chars"}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "numbers.tsv"
        path.write_text("".join(f"{in_words(n)}\t{n}\n" for n in range(1, 10000)))
        spec = JobSpec("transformer", "pairs", str(path), arguments.layers, 1, sizes, reading)
        job = make_job(spec)
    trainer = Trainer(job, options)
    for loss, _ in trainer.train(arguments.steps):
        if trainer.step % 100 == 0 or trainer.finished:
            print(f"step {trainer.step}: loss {loss:.3f}")

    print(f"held-out numbers: {job.evaluate('test')['sequence_error']:.1%} wrong")
    for text in arguments.numbers:
        source, target, weights = job.align(text)
        print(text, "".join(target), sep="\t")
        for digit, row in zip(target, weights, strict=False):
            print(f"  {digit} reads {source[int(row.argmax())]} ({row.max():.0%})")


if __name__ == "__main__":
    main()
