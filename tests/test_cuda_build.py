"""The recurrent CUDA kernels as compiled for each card: registers, spills, shared memory and
instructions against a budget. Nothing here runs on a GPU."""

import re

import pytest
import torch

from tests.simt import assembled, emulator
from tests.test_packaging import load_setup

binaries = pytest.importorskip("tests.offline.binaries", reason="nvdisasm comes with Triton")
CUDA_HOME = load_setup().find_cuda_home()
needs_nvcc = pytest.mark.skipif(CUDA_HOME is None, reason="no nvcc on this machine")

CELLS = {0: "LSTM", 1: "GRU", 2: "RNN_TANH"}  # by Mode; the last is that of both Elman cells
TYPES = {"f": "float32", "NS_4bf16E": "bfloat16", "NS_3f16E": "float16"}
NAME = re.compile(r"block_(forward|backward)ILNS_4ModeE(\d)E(f|NS_4bf16E|NS_3f16E)E")

REGISTERS = 168  # the 65536 of a multiprocessor over the 384 threads of the largest block
# Bytes of shared memory that a block may ask for.
SHARED = {"sm_80": 163 << 10, "sm_90a": 227 << 10, "sm_100": 227 << 10, "sm_120": 99 << 10}


@pytest.fixture(scope="module")
def kernels():
    """By card, then by (pass, cell, dtype)."""
    source = assembled.ROOT / "csrc/core/cuda/block.cu"
    found = assembled.usage(source, CUDA_HOME, binaries.TOOLS / "nvdisasm")
    named = {}
    for arch, of in found.items():
        named[arch] = {}
        for mangled, usage in of.items():
            match = NAME.search(mangled)
            assert match, mangled
            named[arch][match[1], CELLS[int(match[2])], TYPES[match[3]]] = usage
    return named


@needs_nvcc
@pytest.mark.xdist_group("assembled")
@pytest.mark.parametrize("arch", assembled.ARCHS)
def test_every_kernel_keeps_its_budget(kernels, arch):
    assert len(kernels[arch]) == 2 * len(CELLS) * len(TYPES)
    over = []
    for (which, cell, dtype), used in kernels[arch].items():
        product = "FFMA" if dtype == "float32" else "HMMA"
        wanted = [product, "BAR", "LDS"] + ["LDGSTS"] * (which == "forward")
        # CALL: a slow path of a division or the like; the others: local memory and float atomics.
        refused = ["LDL", "STL", "CALL", "ATOM", "ATOMG", "ATOMS", "RED", "REDG"]
        refused += ["HMMA"] * (dtype == "float32")
        wrong = [f"no {name}" for name in wanted if not used.count(name)]
        wrong += [name for name in refused if used.count(name)]
        if used.registers > REGISTERS:
            wrong.append(f"{used.registers} registers")
        if used.stack or used.spilled:
            wrong.append(f"{used.stack} bytes of stack, {used.spilled} spilled")
        if wrong:
            over.append(f"{which} {cell} {dtype}: {', '.join(wrong)}")
    assert not over


@needs_nvcc
@pytest.mark.xdist_group("assembled")
@pytest.mark.parametrize("arch", assembled.ARCHS)
def test_weights_in_shared_memory_are_read_16_bytes_at_a_time(kernels, arch):
    for (_, cell, dtype), used in kernels[arch].items():
        if dtype == "float32" or cell != "RNN_TANH":
            assert used.count("LDS.128"), (cell, dtype)


# The largest H whose forward and backward both fit one block: what the documentation promises.
LARGEST = {
    ("LSTM", torch.float32): (64, 88, 104),
    ("LSTM", torch.bfloat16): (112, 144, 176),
    ("GRU", torch.float32): (80, 96, 128),
    ("GRU", torch.float16): (144, 176, 192),
    ("RNN_TANH", torch.float32): (136, 184, 192),
    ("RNN_RELU", torch.bfloat16): (192, 192, 192),
}


@pytest.mark.parametrize(("mode", "dtype"), LARGEST, ids=str)
def test_largest_layer_of_a_block(mode, dtype):
    for arch, expected in zip(("sm_120", "sm_80", "sm_90a"), LARGEST[mode, dtype], strict=True):
        fitting = [h for h in range(257) if emulator.fits(mode, dtype, h, SHARED[arch])]
        assert fitting == list(range(1, expected + 1)), arch
