"""Ahead-of-time compilation: what a compiled kernel takes, and gates that hold it to a budget."""

import functools
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import triton
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime.jit import JITFunction

from tests.offline import binaries
from tests.offline.driver import Launch
from tests.offline.targets import MATRIX, SHARED_BYTES, TENSOR_COLUMNS, Arch, target_of

ATOMICS = r"^\s*(?:@%\w+ )?(?:atom|red|global_atomic|buffer_atomic|flat_atomic)[._]"


@dataclass(frozen=True)
class Report:
    """What one compiled kernel takes, and how often `products` and `atomics` stand in its code.

    `products` counts the matrix instructions by their names in the assembler's input.
    """

    kernel: CompiledKernel
    arch: Arch
    registers: int
    spill_bytes: int
    stack_bytes: int
    tensor_columns: int
    serialised: bool
    products: Counter[str]
    atomics: int

    @property
    def shared_bytes(self) -> int:
        return self.kernel.metadata.shared

    @functools.cached_property
    def instructions(self) -> Counter[str]:
        """How often each SASS instruction stands in the binary; takes a second to find out."""
        if isinstance(self.arch, str):
            raise NotImplementedError(f"a disassembly for {self.arch}")
        return binaries.opcodes(self.kernel.asm["cubin"])

    def __str__(self) -> str:
        products = " ".join(f"{n} {name}" for name, n in self.products.items()) or "no products"
        return (
            f"{self.kernel.name} for {self.arch}, {self.kernel.metadata.num_warps} warps: "
            f"{self.registers} registers, {self.spill_bytes} B spilled, "
            f"{self.shared_bytes} B shared, {self.tensor_columns} columns, {products}"
        )


@dataclass(frozen=True)
class Budget:
    """What a kernel may take and what must stand in its code.

    `matrix` is the instruction that its products must use: "native" for that of the target's
    matrix unit, "any" for an older one too, None for a kernel that may do without. `serialised`
    allows products of which one waits for the other. `required` names SASS instructions.
    """

    spill_bytes: int = 0
    registers: int = 512
    matrix: str | None = "native"
    serialised: bool = False
    atomics: int = 0
    required: tuple[str, ...] = ()


def compile_for(
    arch: Arch,
    kernel: JITFunction,
    signature: dict[str, str],
    constants: dict[str, Any],
    **options: Any,
) -> CompiledKernel:
    """Compiles a kernel for types such as "i32" and "*bf16:16", of which :16 means a multiple."""
    kinds = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    aligned = [i for i, kind in enumerate(kinds.values()) if kind.endswith(":16")]
    source = ASTSource(
        kernel,
        {name: kind.removesuffix(":16") for name, kind in kinds.items()},
        constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    return triton.compile(source, target=target_of(arch), options=options)


def report(of: Launch | CompiledKernel) -> Report:
    """What the kernel of a launch takes on the target that it was compiled for."""
    kernel = of.compiled if isinstance(of, Launch) else of
    nvidia = kernel.metadata.target.backend == "cuda"
    return _nvidia_report(kernel) if nvidia else _amd_report(kernel)


def _nvidia_report(kernel: CompiledKernel) -> Report:
    usage = binaries.resource_usage(kernel.asm["cubin"])
    log = binaries.assembler_log(kernel)
    (registers,) = map(int, re.findall(r"Used (\d+) registers", log))
    # A difference would mean that the log tells of another binary than the one that is launched.
    assert registers == usage["REG"], f"{kernel.name}: {registers} registers, not {usage['REG']}"
    return Report(
        kernel=kernel,
        arch=kernel.metadata.target.arch,
        registers=registers,
        spill_bytes=sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", log))),
        stack_bytes=usage["STACK"],
        tensor_columns=getattr(kernel.metadata, "tmem_size", None) or 0,
        serialised=re.search(r"wgmma.*serializ", log, re.I | re.S) is not None,
        products=_products(kernel.asm["ptx"]),
        atomics=len(re.findall(ATOMICS, kernel.asm["ptx"], re.M)),
    )


def _amd_report(kernel: CompiledKernel) -> Report:
    text = kernel.asm["amdgcn"]

    def largest(key: str) -> int:
        return max(map(int, re.findall(rf"\.{key}:\s+(\d+)", text)), default=0)

    return Report(
        kernel=kernel,
        arch=kernel.metadata.target.arch,
        registers=largest("vgpr_count"),
        # Scalar registers are spilled to lanes of vector registers, not to memory.
        spill_bytes=4 * largest("vgpr_spill_count"),
        stack_bytes=largest("private_segment_fixed_size"),
        tensor_columns=0,
        serialised=False,
        products=_products(text),
        atomics=len(re.findall(ATOMICS, text, re.M)),
    )


def _products(text: str) -> Counter[str]:
    """The lines of an assembler's input that start a product of matrices, by instruction."""
    lines = re.findall(r"^\s*(?:@%\w+ )?(mma\.sync|wgmma\.mma|tcgen05\.mma|v_mfma)", text, re.M)
    return Counter(name.removesuffix(".mma") if name[0] == "w" else name for name in lines)


def gate(report: Report, budget: Budget | None = None) -> None:
    """Raises AssertionError, in one line, where a kernel takes more than its budget."""
    budget = budget or Budget()
    matrix = MATRIX[report.arch] if budget.matrix == "native" else budget.matrix
    limit = SHARED_BYTES[report.arch]
    missing = [name for name in budget.required if not report.instructions[name]]
    checks = [
        ("bytes spilled", report.spill_bytes, budget.spill_bytes),
        ("bytes of stack", report.stack_bytes, budget.spill_bytes),
        ("registers", report.registers, budget.registers),
        ("bytes of shared memory", report.shared_bytes, limit),
        ("columns of tensor memory", report.tensor_columns, TENSOR_COLUMNS),
        ("atomics", report.atomics, budget.atomics),
        ("wgmma serialised", int(report.serialised), int(budget.serialised)),
    ]
    failed = [f"{what}: {n}, at most {most} allowed" for what, n, most in checks if n > most]
    if matrix and not (report.products.total() if matrix == "any" else report.products[matrix]):
        failed.append(f"no {matrix} product" if matrix == "any" else f"no {matrix}")
    failed += [f"no {name}" for name in missing]
    assert not failed, f"{report}; {'; '.join(failed)}"
