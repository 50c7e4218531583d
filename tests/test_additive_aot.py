"""The additive attention kernels as they ship: launched by the real launchers, compiled for every
target, and held to what their loops may cost.

Nothing runs: the tensors are on the meta device, so that they may be of any size.
"""

import dataclasses
import re
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels are Triton's")

from seqkern.kernels import additive_rows
from seqkern.kernels.additive_attention import additive_attention, additive_attention_backward
from seqkern.kernels.additive_table import Config, choose

from tests.offline import binaries
from tests.offline.aot import Budget, gate, report
from tests.offline.driver import Launch, pretend_gpu
from tests.offline.targets import Arch, target_of

bf16, fp32 = torch.bfloat16, torch.float32
KERNELS = {"forward": "forward_kernel", "queries": "gradient_kernel", "keys": "gradient_kernel"}


def empty(*shape: int, dtype: torch.dtype = bf16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def operands(
    dtype: torch.dtype = bf16, Tq: int = 100, Tk: int = 500, D: int = 256, Dv: int = 256
) -> list[Tensor]:
    """query, key, value and v."""
    shapes = (8, Tq, D), (8, Tk, D), (8, Tk, Dv), (D,)
    return [empty(*shape, dtype=dtype) for shape in shapes]


def forward(arch: Arch, inputs: list[Tensor], **options: Any) -> list[Launch]:
    """What the forward launches, with lengths of the keys."""
    given = {"mask": None, "bias": None, "k_lens": empty(inputs[0].size(0), dtype=torch.int32)}
    given |= {"scale": 0.5, "need_weights": False} | options
    with pretend_gpu(arch) as launches:
        additive_attention(*inputs, **given)
    return launches


def backward(arch: Arch, inputs: list[Tensor], kernel: str, **options: Any) -> list[Launch]:
    """What the backward launches for one side: "queries", "keys" or "bias"."""
    query, _, value, _ = inputs
    o = empty(*query.shape[:2], value.size(2), dtype=query.dtype)
    lse = empty(*query.shape[:2], dtype=fp32)
    given = {"mask": None, "bias": None, "k_lens": empty(query.size(0), dtype=torch.int32)}
    given |= {"scale": 0.5, "dweights": None, "dlse": None} | options
    needs = {"need_dq": "queries", "need_dv": "queries", "need_dk": "keys", "need_dvalue": "keys"}
    needs |= {"need_dbias": "bias"}
    with pretend_gpu(arch) as launches:
        additive_attention_backward(
            o,
            given.pop("dweights"),
            given.pop("dlse"),
            o,
            lse,
            *inputs,
            **given,
            **{name: side == kernel for name, side in needs.items()},
        )
    return launches


def launched(arch: Arch, kernel: str, inputs: list[Tensor], **options: Any) -> Launch:
    """The launch of a row's own kernel."""
    launches = (
        forward(arch, inputs, **options)
        if kernel == "forward"
        else backward(arch, inputs, kernel, **options)
    )
    assert launches[-1].kernel == KERNELS[kernel]
    return launches[-1]


# ---- the rows of the table ----------------------------------------------------------------

TARGETS: tuple[Arch, ...] = (80, 89, 90, 100, "gfx942")
# Bytes that a thread of a row stores and loads for lack of registers, where there are any.
SPILLS = {
    "80-keys-bfloat16": 8,
    "80-queries-float32": 160,
    "89-forward-float32": 52,
    "90-forward-float32": 52,
    "90-keys-float32": 24,
}
FREQUENT = {
    *("80-keys-bfloat16", "89-forward-bfloat16", "90-forward-bfloat16", "90-queries-bfloat16"),
    *("90-keys-bfloat16", "90-forward-float32", "100-forward-bfloat16", "gfx942-forward-bfloat16"),
}


def shipped() -> list[Any]:
    """Every row of the table on every target; not all are compiled in every run of the tests."""
    rows = []
    for arch in TARGETS:
        for kernel in KERNELS:
            for dtype in (bf16, fp32):
                name = f"{arch}-{kernel}-{str(dtype)[6:]}"
                marks = () if name in FREQUENT else pytest.mark.sweep
                rows.append(pytest.param(arch, kernel, dtype, id=name, marks=marks))
    return rows


@pytest.mark.parametrize(("arch", "kernel", "dtype"), shipped())
def test_shipped_rows_stay_within_their_budgets(arch, kernel, dtype, request) -> None:
    launch = launched(arch, kernel, operands(dtype))
    spilled = SPILLS.get(request.node.callspec.id, 0)
    # Tiles of 16 rows are too few for the larger instructions.
    gate(report(launch), Budget(spill_bytes=spilled, matrix=None if dtype == fp32 else "any"))
    target = target_of(arch)
    config = choose(kernel, dtype, (target.backend, target.arch))
    assert launch.warps == config.num_warps
    tokens = 500 if kernel == "keys" else 100
    assert launch.grid == (8 * -(-tokens // config.block_m), 1, 1)


# ---- the loops ----------------------------------------------------------------------------


def loops_of(launch: Launch) -> list[Counter[str]]:
    """The instructions of every innermost loop, by their names without modifiers."""
    command = [str(binaries.TOOLS / "nvdisasm"), "-c"]
    text = binaries._output(command, launch.compiled.asm["cubin"])
    start: dict[str, int] = {}
    loops, opcodes = [], []
    for line in text.splitlines():
        if label := re.match(r"^(\.L_\w+):", line):
            start[label[1]] = len(opcodes)
        elif found := binaries.OPCODE.match(line):
            opcodes.append(found[1].partition(".")[0])
            jump = re.search(r"BRA.*`\((\.L_\w+)\)", line)
            if jump and jump[1] in start:
                loops.append((start[jump[1]], len(opcodes)))
    inner = [
        (a, b) for a, b in loops if not any(a <= c and d <= b for c, d in loops if (a, b) != (c, d))
    ]
    return [Counter(opcodes[a:b]) for a, b in inner]


def costs(launch: Launch, reciprocals: int) -> Counter[str]:
    """The instructions of the loop over exponentials that has so many reciprocals: the other way,
    by tanh itself, compares."""
    return next(l for l in loops_of(launch) if l["MUFU"] == reciprocals and not l["FSETP"])


# Elements that a thread takes in an iteration: 16 rows of 4 elements of a row.
SUMS = 64
# And 16 rows by 64 elements by 4 tokens, of 128 threads.
SLOPES = 32


@pytest.mark.parametrize(("tanh", "mufu"), [("shared", 0.5), ("single", 1), ("hardware", 1)])
def test_a_score_costs_half_a_special_function_an_element(tanh: str, mufu: float) -> None:
    """MUFU has an eighth of the multiply-adds' rate, so a reciprocal that serves two elements is
    worth the two multiplications more that it costs."""
    config = dataclasses.replace(choose("forward", bf16, ("cuda", 90)), tanh=tanh)
    launch = launched(90, "forward", operands(), config=config)
    loop = costs(launch, int(SUMS * mufu))
    arithmetic = loop["FFMA"] + loop["FMUL"] + loop["FADD"]
    assert arithmetic <= SUMS * {"shared": 3.9, "single": 3.2, "hardware": 2.2}[tanh]
    # Exponentials of rows come four at a time, and nothing goes through shared memory.
    assert loop["LDG"] <= SUMS * 0.4
    assert not {"BAR", "SHFL", "LDS", "STS", "LDL", "STL"} & loop.keys()
    assert loop.total() <= SUMS * 6


@pytest.mark.parametrize(("kernel", "most"), [("queries", 10.5), ("keys", 8.5)])
def test_a_gradient_costs_half_a_special_function_an_element(kernel: str, most: float) -> None:
    launch = launched(90, kernel, operands())
    slopes = costs(launch, SLOPES // 2)
    assert not {"BAR", "SHFL", "LDS", "STS", "LDL", "STL"} & slopes.keys()
    assert slopes.total() <= SLOPES * most
    assert costs(launch, SUMS // 2).total() <= SUMS * 6


def test_exponentials_of_tokens_lose_nothing_to_contraction() -> None:
    """x times 2 log2 e is fused with the half that finds the integer and with the integer, and is
    nowhere else: what corrects a product's rounding is wrong where the product was fused."""
    tokens = forward(90, operands(fp32))[0]
    assert tokens.kernel == "tokens_kernel"
    lines = re.findall(r"^\t([a-z][a-z0-9.]*) \t(%r\d+), (.*);$", tokens.compiled.asm["ptx"], re.M)
    floors = {target for name, target, _ in lines if name.startswith("cvt.rmi")}
    # Triton negates by taking from zero.
    negated = ((name, target, of.split(", ")[-1]) for name, target, of in lines)
    integers = {target for name, target, n in negated if name[:3] in ("sub", "neg") and n in floors}
    products = [of for _, _, of in lines if re.search("0f[4C]038AA3B", of)]
    addends = Counter(of.rpartition(", ")[2] for of in products)
    assert addends == dict.fromkeys(integers, 1) | {"0f3F000000": len(floors)}
    assert floors


# ---- features -----------------------------------------------------------------------------


def plane(*shape: int, dtype: torch.dtype = bf16) -> Tensor:
    return empty(*shape, dtype=dtype)


def test_features_stay_within_their_budgets() -> None:
    masked = {"mask": plane(8, 1, 500, dtype=torch.bool), "bias": plane(1, 100, 500)}
    launches = forward(90, operands(), need_weights=True, **masked)
    assert [launch.kernel for launch in launches][2:] == ["forward_kernel", "weights_kernel"]
    gate(report(launches[2]), Budget(spill_bytes=64, matrix="any"))
    gate(report(launches[3]), Budget(matrix=None))


def test_the_gradient_of_a_bias_stays_within_its_budget() -> None:
    launches = backward(90, operands(), "bias", bias=plane(1, 1, 500))
    names = ["tokens_kernel", "tokens_kernel", "delta_kernel", "dbias_kernel"]
    assert [launch.kernel for launch in launches] == names
    for launch in launches[:3]:
        gate(report(launch), Budget(matrix=None))
    gate(report(launches[-1]), Budget(matrix="any"))
    # A program for each tile of the bias, whatever it was broadcast over.
    assert launches[-1].grid == (4, 1, 1)


@pytest.mark.parametrize(
    "arch", [90, *(pytest.param(a, marks=pytest.mark.sweep) for a in (80, 100))]
)
@pytest.mark.parametrize("Dv", [100, pytest.param(1024, marks=pytest.mark.sweep)])
def test_few_queries_read_their_keys_as_they_are(arch: Arch, Dv: int) -> None:
    row, combine = forward(arch, operands(Tq=1, Dv=Dv), splits=4)
    assert (row.kernel, combine.kernel) == ("row_kernel", "combine_kernel")
    assert row.grid == (8, 4, 1)
    assert combine.grid == (8, 1, 1)
    gate(report(row), Budget(matrix=None))
    # Three special functions for two elements: two exponentials and a reciprocal.
    block_n = row.constants["BLOCK_N"]
    tile = block_n * 2 * row.constants["BLOCK_C"] // 128
    assert min(tile * 1.5 - l["MUFU"] for l in loops_of(row)) == 0


def test_the_gradients_of_one_query_read_its_keys_as_they_are() -> None:
    delta, gradients = backward(90, operands(Tq=1), "keys")
    assert (delta.kernel, gradients.kernel) == ("delta_kernel", "row_gradient_kernel")
    gate(report(gradients), Budget(matrix=None))
    assert gradients.grid == (8 * -(-500 // gradients.constants["BLOCK_N"]), 1, 1)


# ---- the launchers ------------------------------------------------------------------------


def test_one_compiled_kernel_serves_all_sizes() -> None:
    def compiled(Tq: int, Tk: int, D: int, Dv: int) -> Any:
        return forward(90, operands(Tq=Tq, Tk=Tk, D=D, Dv=Dv))[-1].compiled

    assert compiled(100, 500, 256, 256) is compiled(17, 50, 128, 1024)


def test_few_queries_of_wide_values_take_tiles() -> None:
    names = [l.kernel for l in forward(90, operands(Tq=1, Dv=2048))]
    assert names[-1] == "forward_kernel"
    assert additive_rows.MOST_VALUES < 2048


def test_memory_is_linear_in_the_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither pass makes anything of the size of all scores."""
    made: list[int] = []
    plain = torch.empty

    def counted(*size: Any, **options: Any) -> Tensor:
        made.append(plain(*size, **options).numel())
        return plain(*size, **options)

    inputs = operands(Tq=4096, Tk=4096, D=64, Dv=64)
    monkeypatch.setattr(torch, "empty", counted)
    forward(90, inputs, config=Config(block_c=32))
    backward(90, inputs, "keys", config=Config(block_c=16))
    backward(90, inputs, "queries", config=Config(block_c=32))
    # A tile of score gradients for each 16 rows is the largest: 128 numbers a row.
    assert max(made) <= 8 * 4096 * 128
