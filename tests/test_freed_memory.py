"""Tensors whose memory was given back, as that of a sharded parameter between two uses: the C++
kernels refuse them by name, before a pointer is read."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from seqkern.ops.choice import has_native_kernel
from tests import test_decoder_fuzz, test_fuzz

pytestmark = pytest.mark.skipif(
    not has_native_kernel("recurrent", "cpu"), reason="the reference reads no pointers"
)


def recurrent_calls(r: random.Random) -> dict[str, list[Any]]:
    call = test_fuzz.correct_call(r)
    # Packed weights serve dense batches alone.
    dense = call["batch_sizes"] is None
    ops = [op for op in test_fuzz.NAMES if dense or op != "recurrent_prepacked"]
    return {op: [call[name] for name in test_fuzz.NAMES[op]] for op in ops}


def additive_calls(r: random.Random) -> dict[str, list[Any]]:
    call = test_fuzz.additive_call(r)
    return dict(zip(test_fuzz.ADDITIVE, ([*call[5:], True], [*call, *[True] * 5]), strict=True))


def decoder_calls(r: random.Random) -> dict[str, list[Any]]:
    call = test_decoder_fuzz.correct_call(r)
    return {op: [call[name] for name in names] for op, names in test_decoder_fuzz.NAMES.items()}


def freed(t: Tensor, left: int) -> Tensor:
    """A copy with `left` bytes of its memory, fewer than its elements take."""
    t = t.clone()
    t.untyped_storage().resize_(left)
    return t


def spoilt_calls(arguments: list[Any]) -> list[list[Any]]:
    """The same arguments with one tensor or one of a list without its memory, or its last byte."""
    found = []
    for i, value in enumerate(arguments):
        for at, t in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if not isinstance(t, Tensor) or not t.numel():
                continue
            for left in (0, t.numel() * t.element_size() - 1):
                new = freed(t, left)
                put = new if at is None else [*value[:at], new, *value[at + 1 :]]
                found.append([*arguments[:i], put, *arguments[i + 1 :]])
    return found


@pytest.mark.parametrize("calls", [recurrent_calls, additive_calls, decoder_calls])
def test_memory_that_was_given_back_is_refused(
    calls: Callable[[random.Random], dict[str, list[Any]]],
) -> None:
    tried = 0
    for seed in range(30):
        torch.manual_seed(seed)
        for op, arguments in calls(random.Random(seed)).items():
            for spoilt in spoilt_calls(arguments):
                with pytest.raises(RuntimeError, match=rf"{op}: \w+ must have \d+ bytes of memory"):
                    getattr(torch.ops.seqkern, op).default(*spoilt)
                tried += 1
    assert tried > 500
