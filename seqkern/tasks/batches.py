"""Batches of like length, in an order that the seed and the step decide."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from seqkern.tasks.vocab import PAD


class Batch(Protocol):
    """A NamedTuple of tensors, with how many units its loss is the mean of, and its examples."""

    @property
    def units(self) -> int: ...

    @property
    def rows(self) -> int: ...

    def _replace(self, **fields: Any) -> Batch: ...

    def _asdict(self) -> dict[str, Any]: ...


class Stream(Protocol):
    """Where a trainer's batches come from: which one stands at a step does not depend on others."""

    @property
    def per_epoch(self) -> int: ...

    def __getitem__(self, step: int) -> Batch: ...


def processes() -> tuple[int, int]:
    """This process's number and how many there are, under torchrun; (0, 1) otherwise."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def pad(rows: Sequence[Sequence[int]], value: int = PAD) -> Tensor:
    """Rows of numbers as one int64 tensor (B, T), `value` past the end of a row."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows], dtype=torch.int64)


def pad_sources(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """x (B, Tx) and lengths (B,) of rows of numbers."""
    return pad(rows), torch.tensor([len(row) for row in rows])


class Batches:
    """Training batches of like length; which batch stands at a step is a function of the seed.

    Each epoch shuffles the examples, sorts pools of `pool` batches by length, cuts them into
    batches and shuffles those.

    Args:
        examples: the training examples, at least one.
        collate: makes a batch of a list of them.
        length: the key that examples of a pool are sorted by.
        batch_size: rows of a batch; the last batch of an epoch may have fewer.
        seed: of the order.
        pool: batches that are sorted together.

    Raises:
        ValueError: there is no example, or a size is below 1.
    """

    def __init__(
        self,
        examples: Sequence[Any],
        collate: Callable[[list], Any],
        length: Callable[[Any], tuple[int, ...]],
        batch_size: int,
        seed: int,
        pool: int = 64,
    ) -> None:
        if not examples or batch_size < 1 or pool < 1:
            raise ValueError(
                "Batches needs an example, batch_size >= 1 and pool >= 1, "
                f"got {len(examples)}, {batch_size} and {pool}"
            )
        self._examples, self._collate, self._length = examples, collate, length
        self._batch_size, self._seed, self._pool = batch_size, seed, pool
        self._epoch, self._order = -1, []

    @property
    def per_epoch(self) -> int:
        """Batches of an epoch."""
        return -(-len(self._examples) // self._batch_size)

    def __getitem__(self, step: int) -> Any:
        """The batch of a step, 0 being the first of the first epoch."""
        epoch, place = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, list(self._epoch_order(epoch))
        return self._collate([self._examples[i] for i in self._order[place]])

    def _epoch_order(self, epoch: int) -> Iterator[list[int]]:
        shuffle = random.Random(f"{self._seed} {epoch}")
        order = list(range(len(self._examples)))
        shuffle.shuffle(order)
        size, batches = self._batch_size * self._pool, []
        for start in range(0, len(order), size):
            pool = sorted(
                order[start : start + size], key=lambda i: self._length(self._examples[i])
            )
            batches += [
                pool[i : i + self._batch_size] for i in range(0, len(pool), self._batch_size)
            ]
        shuffle.shuffle(batches)
        yield from batches
