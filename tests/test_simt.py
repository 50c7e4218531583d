"""The emulator that the CUDA kernels are tested on: what it computes, and what it refuses."""

import ctypes
import functools
import re

import pytest
import torch
from torch import Tensor

from tests.simt.emulator import HERE, build

KERNELS = [
    "pass_on",
    "pass_on_without_barrier",
    "overwrite_what_is_read",
    "read_unwritten",
    "read_beyond",
    "write_beyond_shared",
    "write_input",
    "barrier_of_some",
    "barriers_apart",
    "copy_with_wait",
    "copy_without_wait",
    "copied_by_another",
    "product_of_some",
    "products_apart",
]
OF_TWO_BLOCKS = [
    "words_awaited",
    "words_that_never_come",
    "shared_memory_of_another",
    "too_few_bytes",
    "read_too_early",
    "sent_to_the_ended",
    "sent_without_a_barrier",
    "armed_twice",
    "waited_by_one_block",
]
REFUSED = {
    "pass_on_without_barrier": "shared memory",
    "overwrite_what_is_read": "read by another thread since the last barrier",
    "read_unwritten": "shared memory never written",
    "read_beyond": "thread 63: read outside of memory",
    "write_beyond_shared": "write outside of memory",
    "write_input": "write to read-only memory",
    "barrier_of_some": r"does not go on: 40 threads at the barrier toys.cpp:\d+; 24 threads at the",
    "barriers_apart": r"32 threads at the barrier toys.cpp:\d+; 32 threads at the barrier toys",
    "copy_without_wait": "into which a copy is under way",
    "copied_by_another": "shared memory",
    "product_of_some": r"31 threads at the warp instruction toys.cpp:\d+",
    "products_apart": r"warp instruction, while thread \d+ waits at another, toys.cpp:\d+",
    "words_that_never_come": r"block \(1, 0\) does not go on: 64 threads polling at toys.cpp:\d+",
    "too_few_bytes": r"block \(1, 0\) does not go on: 64 threads polling at toys.cpp:\d+",
    "read_too_early": "shared memory into which another block stores",
    "sent_to_the_ended": "a store into the shared memory of a block that has ended",
    "sent_without_a_barrier": "a store that is counted by a barrier not set up",
    "armed_twice": "a barrier armed twice in a phase",
    "waited_by_one_block": "64 threads at the cluster's barrier toys.cpp",
}


@functools.cache
def library() -> ctypes.CDLL:
    loaded = build(HERE / "toys.cpp")
    loaded.toy.restype = ctypes.c_char_p
    return loaded


def pointer(t: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(t.data_ptr())


def run(kernel: str, seed: int) -> tuple[Tensor, Tensor, str]:
    x, y = torch.randn(64), torch.zeros(64)
    which, blocks = (KERNELS + OF_TWO_BLOCKS).index(kernel), 1 + (kernel in OF_TWO_BLOCKS)
    message = library().toy(which, pointer(x), pointer(y), seed, blocks)
    return x, y, (message or b"").decode()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_what_is_allowed_is_computed(seed):
    x, y, message = run("pass_on", seed)
    assert not message
    assert torch.equal(y, x.roll(-1))
    for kernel in ("copy_with_wait", "words_awaited", "shared_memory_of_another"):
        x, y, message = run(kernel, seed)
        assert not message
        assert torch.equal(y, x)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("kernel", REFUSED)
def test_what_a_gpu_would_do_in_silence_is_refused(kernel, seed):
    message = run(kernel, seed)[2]
    assert re.search(REFUSED[kernel], message), message


def test_conversions_are_those_of_pytorch():
    x = torch.cat(
        [
            torch.randn(20000) * 10.0 ** torch.randint(-12, 8, (20000,)),
            torch.tensor([0.0, -0.0, 65504, 65519.99, 65520, -65520, 6e-8, 2.98e-8, 2.99e-8]),
            torch.tensor([2**-14, 2**-14 - 2**-25, 1 + 2**-11, 1 + 3 * 2**-11, 1 + 2**-8]),
            torch.tensor([float("inf"), -float("inf"), float("nan")]),
        ]
    )
    as_bf16, as_f16 = torch.empty_like(x), torch.empty_like(x)
    sizes = ctypes.c_int64(len(x))
    library().through_half(pointer(x), pointer(as_bf16), pointer(as_f16), sizes)
    torch.testing.assert_close(as_bf16, x.bfloat16().float(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(as_f16, x.half().float(), rtol=0, atol=0, equal_nan=True)
