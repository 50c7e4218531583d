"""The recurrent CUDA kernels as compiled for each card: registers, spills, shared memory and
instructions against a budget. Nothing here runs on a GPU."""

import functools
import json
import os
import re
import subprocess
from collections.abc import Iterable

import pytest
import torch

from tests.simt import assembled, emulator
from tests.test_gpu_sanitizer import SIZES
from tests.test_packaging import load_setup
from tests.test_recurrent_gpu import HIDDEN

binaries = pytest.importorskip("tests.offline.binaries", reason="nvdisasm comes with Triton")
CUDA_HOME = load_setup().find_cuda_home()
needs_nvcc = pytest.mark.skipif(CUDA_HOME is None, reason="no nvcc on this machine")

CELLS = {0: "LSTM", 1: "GRU", 2: "RNN_TANH"}  # by Mode; the last is that of both Elman cells
TYPES = {"f": "float32", "NS_4tf32E": "tf32", "NS_4bf16E": "bfloat16", "NS_3f16E": "float16"}
NAME = re.compile(
    r"recurrent_(forward|backward)ILNS_4ModeE(\d)E(f|NS_4tf32E|NS_4bf16E|NS_3f16E)NS0_\d+(\w+?)EEE"
)

# The 65536 of a multiprocessor over the threads of a block, and what an instruction can name.
REGISTERS = {"block": 168, "cluster": 255, "grid": 255}
# Bytes of shared memory that a block may ask for.
SHARED = {"sm_80": 163 << 10, "sm_90a": 227 << 10, "sm_100": 227 << 10, "sm_120": 99 << 10}
CARDS = {"block": assembled.ARCHS, "cluster": assembled.ARCHS[1:], "grid": assembled.ARCHS}
EVERY = [(skeleton, arch) for skeleton, archs in CARDS.items() for arch in archs]
# By skeleton: what passes values between blocks, and how often it may stand in a kernel.
PASSED = {
    "block": {},
    "cluster": {"STAS.128": None, "SYNCS": None, "UCGABAR_ARV": 1},
    "grid": {"STG.E.64.STRONG.GPU": 1, "LDG.E.64.STRONG.GPU": 8},
}


def output(command: list[str]) -> str:
    """What a tool prints; it has to succeed. cuobjdump looks for nvdisasm on the path."""
    done = subprocess.run(
        command,
        env={**os.environ, "PATH": f"{binaries.TOOLS}:{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@functools.cache
def kernels(skeleton: str):
    """By card, then by (pass, cell, dtype)."""
    source = assembled.ROOT / f"csrc/core/cuda/{skeleton}.cu"
    nvdisasm = binaries.TOOLS / "nvdisasm"
    found = assembled.usage(source, CUDA_HOME, nvdisasm, CARDS[skeleton])
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
@pytest.mark.parametrize(("skeleton", "arch"), EVERY)
def test_every_kernel_keeps_its_budget(skeleton, arch):
    assert len(kernels(skeleton)[arch]) == 2 * len(CELLS) * len(TYPES)
    over = []
    for (which, cell, dtype), used in kernels(skeleton)[arch].items():
        product = "FFMA" if dtype == "float32" else "HMMA"
        wanted = [product, "BAR", "LDS"] + ["LDGSTS"] * (which == "forward")
        # CALL: a slow path of a division or the like; the others: local memory and float atomics.
        refused = ["CALL", "LDL", "STL", "ATOM", "ATOMG", "ATOMS", "RED", "REDG"]
        refused += ["HMMA"] * (dtype == "float32")
        refused += [name for of in PASSED.values() for name in of if name not in PASSED[skeleton]]
        wrong = [f"no {name}" for name in wanted if not used.count(name)]
        wrong += [name for name in refused if used.count(name)]
        for name, times in PASSED[skeleton].items():
            if (n := used.count(name)) == 0 or (times and n != times):
                wrong.append(f"{n} {name}")
        if used.registers > REGISTERS[skeleton]:
            wrong.append(f"{used.registers} registers")
        if used.stack or used.spilled:
            wrong.append(f"{used.stack} bytes of stack, {used.spilled} spilled")
        if wrong:
            over.append(f"{which} {cell} {dtype}: {', '.join(wrong)}")
    assert not over


@needs_nvcc
@pytest.mark.xdist_group("assembled")
@pytest.mark.parametrize(("skeleton", "arch"), EVERY)
def test_weights_in_shared_memory_are_read_16_bytes_at_a_time(skeleton, arch):
    for (_, cell, dtype), used in kernels(skeleton)[arch].items():
        if dtype == "float32" or cell != "RNN_TANH":
            assert used.count("LDS.128"), (cell, dtype)


STEP = re.compile(r"step_(forward|backward)ILNS_4ModeE(\d)E(f|NS_4bf16E|NS_3f16E)Li(\d)EEE")


@needs_nvcc
@pytest.mark.xdist_group("assembled")
def test_the_kernels_of_one_step_take_16_bytes_at_a_time():
    """And keep everything in registers, for each card."""
    source = assembled.ROOT / "csrc/core/cuda/step.cu"
    found = assembled.usage(source, CUDA_HOME, binaries.TOOLS / "nvdisasm")
    for arch, of in found.items():
        assert len(of) == 2 * len(CELLS) * 3 * 2, arch
        for mangled, used in of.items():
            name = STEP.search(mangled)
            assert name, mangled
            assert (used.stack, used.spilled, used.count("CALL")) == (0, 0, 0), (arch, mangled)
            wide = int(name[4]) > 1
            loads, stores = used.count("LDG.E.128"), used.count("STG.E.128")
            assert (loads >= 3, stores >= 2) == (wide, wide), (arch, mangled, loads, stores)


# The largest H whose forward and backward both fit one block: what the documentation promises.
LARGEST = {
    ("LSTM", torch.float32): (64, 88, 104),
    ("LSTM", "tf32"): (80, 96, 120),
    ("LSTM", torch.bfloat16): (112, 144, 176),
    ("GRU", torch.float32): (80, 96, 128),
    ("GRU", "tf32"): (96, 120, 144),
    ("GRU", torch.float16): (144, 176, 192),
    ("RNN_TANH", torch.float32): (136, 184, 192),
    ("RNN_TANH", "tf32"): (192, 192, 192),
    ("RNN_RELU", torch.bfloat16): (192, 192, 192),
}


@pytest.mark.parametrize(("mode", "dtype"), LARGEST, ids=str)
def test_largest_layer_of_a_block(mode, dtype):
    for arch, expected in zip(("sm_120", "sm_80", "sm_90a"), LARGEST[mode, dtype], strict=True):
        fitting = [h for h in range(257) if emulator.fits(mode, dtype, h, SHARED[arch])]
        assert fitting == list(range(1, expected + 1)), arch


# Multiprocessors, and whether there are clusters, of a card of each.
CARD = {"sm_120": (170, True), "sm_80": (108, False), "sm_90a": (132, True)}
# Likewise for a cluster's forward, its backward, and a grid that has both.
LARGEST_SHARED = {
    ("LSTM", torch.float32): ((256, 0, 352), (256, 0, 384), (240, 416, 592)),
    ("LSTM", "tf32"): ((320, 0, 512), (384, 0, 512), (496, 672, 848)),
    ("LSTM", torch.bfloat16): ((512, 0, 768), (512, 0, 768), (1008, 1360, 1696)),
    ("GRU", torch.float32): ((256, 0, 480), (256, 0, 480), (336, 560, 784)),
    ("GRU", "tf32"): ((416, 0, 512), (448, 0, 512), (672, 896, 1120)),
    ("GRU", torch.float16): ((576, 0, 768), (576, 0, 768), (1360, 1728, 2112)),
    ("RNN_TANH", torch.float32): ((480, 0, 768), (512, 0, 768), (992, 1680, 2112)),
    ("RNN_TANH", "tf32"): ((720, 0, 960), (768, 0, 1024), (2016, 1728, 2112)),
    ("RNN_RELU", torch.bfloat16): ((1024, 0, 1344), (1024, 0, 1344), (2720, 3232, 4064)),
}


@pytest.mark.parametrize(("mode", "dtype"), LARGEST_SHARED, ids=str)
def test_largest_layer_of_blocks_that_share_it(mode, dtype):
    for i, arch in enumerate(CARD):
        reached: dict[tuple[str, bool], int] = {}
        for hidden in range(16, 4129, 16):
            for backward in (False, True):
                card = (SHARED[arch], *CARD[arch])
                for plan in emulator.plans(mode, dtype, hidden, backward, card):
                    assert plan.shared <= SHARED[arch]
                    assert plan.members <= (16 if plan.skeleton == "cluster" else CARD[arch][0])
                    assert plan.members * plan.groups * 16 >= hidden
                    reached[plan.skeleton, backward] = hidden
        grid = min(reached["grid", False], reached["grid", True])
        found = (reached.get(("cluster", False), 0), reached.get(("cluster", True), 0), grid)
        assert found == tuple(of[i] for of in LARGEST_SHARED[mode, dtype]), arch


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_an_lstm_of_768_units_goes_through_a_cluster(dtype):
    """Of 16 blocks with 3 groups of units each, on a card like the H200."""
    card = (SHARED["sm_90a"], *CARD["sm_90a"])
    for backward in (False, True):
        plans = emulator.plans("LSTM", dtype, 768, backward, card)
        assert plans[0][:4] == ("cluster", 16, 3, 8)


@pytest.mark.parametrize("products", ["bfloat16", "float32", "tf32"])
@pytest.mark.parametrize("mode", ["LSTM", "GRU", "RNN"])
def test_the_sizes_tried_on_a_gpu_take_every_skeleton(mode, products):
    """In the forward and in the backward, on a card like the H200."""
    card = (SHARED["sm_90a"], *CARD["sm_90a"])
    of = {"RNN": "RNN_TANH"}.get(mode, mode), getattr(torch, products, products)

    def taken(sizes: Iterable[int]) -> list[set[str]]:
        """By the forwards and by the backwards of those that have both."""
        passes = (
            [emulator.plans(*of, h, backward, card) for backward in (False, True)] for h in sizes
        )
        first = [[found[0].skeleton for found in both] for both in passes if all(both)]
        return [set(of_pass) for of_pass in zip(*first)]

    assert taken(HIDDEN) == [{"block", "cluster", "grid"}] * 2
    assert taken(SIZES[mode][products]) == [{"cluster", "grid"}] * 2


def test_the_order_of_the_skeletons():
    card = (SHARED["sm_90a"], *CARD["sm_90a"])

    def tried(hidden: int) -> list[str]:
        plans = emulator.plans("LSTM", torch.bfloat16, hidden, False, card)
        return list(dict.fromkeys(plan.skeleton for plan in plans))

    assert tried(128) == ["block", "cluster", "grid"]
    assert tried(512) == ["cluster", "grid"]
    assert tried(1024) == ["grid"]
    assert tried(4096) == []


@needs_nvcc
def test_the_benchmark_of_the_exchanges_compiles(tmp_path):
    """For both kinds of cards, and with their own instructions; it measures where there is a GPU,
    and elsewhere says what is missing."""
    source, program = assembled.ROOT / "benchmarks/exchange.cu", tmp_path / "exchange"
    cards = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in ("80", "90a")]
    flags = ["-O3", "-std=c++17", f"-I{assembled.ROOT / 'csrc'}", *cards]
    said = output([f"{CUDA_HOME}/bin/nvcc", *flags, str(source), "-o", str(program)])
    assert "warning" not in said, said
    for card, wanted in (("sm_80", set()), ("sm_90a", {"STAS.128"})):
        code = output([f"{binaries.TOOLS}/cuobjdump", "-sass", "-arch", card, str(program)])
        found = set(re.findall(r"\b(?:STAS\.128|\w+\.E\.64\.STRONG\.GPU)", code))
        assert found == {"LDG.E.64.STRONG.GPU", "STG.E.64.STRONG.GPU", *wanted}, card
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False, timeout=60)
    if not torch.cuda.is_available():
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("exchange: no CUDA device: ")
        return
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert {line["exchange"] for line in lines} == {"block", "cluster", "grid"}
    assert all(line.get("ns_per_step", 1) > 0 for line in lines)
