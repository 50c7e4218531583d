"""The additive attentions that are timed, and everyone who computes them."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

import seqkern
from benchmarks import memory
from benchmarks.device import clock
from benchmarks.paired import seconds_of_one_call

OURS, EAGER = "seqkern", "eager"
COMPILED = "compiled", "compiled sum"
# On a GPU, where a formula takes longer to compile than all cases to time, the B and Tq that are.
COMPILED_SIZES = (64, 128), (64, 1)
# Of one multiprocessor and clock: the special function unit's tanh.
_HARDWARE_TANH = 16


@dataclass(frozen=True)
class Case:
    """One additive attention of Tq queries over Tk keys, with values as wide as the keys.

    backward: time forward and backward together, else the forward alone.
    """

    B: int
    Tq: int
    Tk: int
    D: int
    backward: bool = False
    dtype: str = "float32"

    def __str__(self) -> str:
        parts = ["step" if self.Tq == 1 else "whole", f"B{self.B}", f"Tq{self.Tq}", f"Tk{self.Tk}"]
        parts += [f"D{self.D}", self.dtype, "fwd+bwd" if self.backward else "fwd"]
        return "-".join(parts)

    @property
    def tanhs(self) -> int:
        """Of one forward."""
        return self.B * self.Tq * self.Tk * self.D


def cpu_cases() -> list[Case]:
    """What the goals are about: whole sequences, and a decoder's step over many sources."""
    whole = [(64, 32), (32, 64), (16, 128)]
    passes = False, True
    cases = [Case(B, T, T, D, b) for b in passes for D in (256, 512) for B, T in whole]
    return cases + [Case(64, 1, T, D, b) for b in passes for D in (256, 512) for _, T in whole]


def tiny_cases() -> list[Case]:
    """One of each kind, which show that the suite works and nothing about the kernels."""
    return [Case(2, 5, 7, 20), Case(2, 5, 7, 20, True), Case(2, 1, 7, 20)]


def gpu_cases() -> list[Case]:
    """Whole sequences and decoder steps, in bf16 and, should time run out, then in fp32."""
    cases = []
    for dtype in ("bfloat16", "float32"):
        for backward in (False, True):
            cases += [Case(64, T, T, D, backward, dtype) for D in (256, 512) for T in (32, 64, 128)]
            cases += [Case(B, 1, 64, D, backward, dtype) for D in (256, 512) for B in (64, 1024)]
    return cases


@dataclass
class Problem:
    """The inputs of a case, on a device."""

    case: Case
    query: Tensor
    key: Tensor
    value: Tensor
    v: Tensor
    do: Tensor

    @property
    def inputs(self) -> list[Tensor]:
        return [self.query, self.key, self.value, self.v]


def make_problem(case: Case, device: str) -> Problem:
    """Normal queries and keys, and scores of about one."""
    torch.manual_seed(0)
    dtype = getattr(torch, case.dtype)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        t = (scale * torch.randn(shape)).to(device, dtype)
        return t.requires_grad_(case.backward)

    query, key = draw(case.B, case.Tq, case.D), draw(case.B, case.Tk, case.D)
    value, v = draw(case.B, case.Tk, case.D), draw(case.D, scale=case.D**-0.5)
    return Problem(case, query, key, value, v, torch.randn_like(query))


def by_product(query: Tensor, key: Tensor, value: Tensor, v: Tensor) -> Tensor:
    """The formula in PyTorch, the scores as a product."""
    s = torch.tanh(query[:, :, None] + key[:, None]) @ v
    return s.softmax(-1) @ value


def by_sum(query: Tensor, key: Tensor, value: Tensor, v: Tensor) -> Tensor:
    """The formula in PyTorch, the scores as a sum, which a compiler can fuse."""
    s = (torch.tanh(query[:, :, None] + key[:, None]) * v).sum(-1)
    return s.softmax(-1) @ value


def forwards(p: Problem) -> dict[str, Callable[[], Tensor]]:
    """Everyone's forward, ours first; what is compiled is compiled for this shape, if at all."""
    functions: dict[str, Callable[..., Tensor]] = {
        OURS: seqkern.additive_attention,
        EAGER: by_product,
    }
    if not p.query.is_cuda or (p.case.B, p.case.Tq) in COMPILED_SIZES:
        for name, formula in zip(COMPILED, (by_product, by_sum), strict=True):
            functions[name] = torch.compile(formula, fullgraph=True, dynamic=False)

    def bound(function: Callable[..., Tensor]) -> Callable[[], Tensor]:
        return lambda: function(*p.inputs)

    calls = {name: bound(function) for name, function in functions.items()}
    return calls | by_tanh(p) if p.query.is_cuda else calls


def by_tanh(p: Problem) -> dict[str, Callable[[], Tensor]]:
    """Our forward for each way of the Triton kernel to take tanh, straight by its launcher: what
    kernels/additive_table.py chose, and what it did not. A step has one way alone."""
    from seqkern.kernels.additive_attention import additive_attention
    from seqkern.kernels.additive_rows import MOST_QUERIES
    from seqkern.kernels.additive_table import choose

    if p.case.backward or p.case.Tq <= MOST_QUERIES:
        return {}
    args: tuple[Any, ...] = (*p.inputs, None, None, None, 1.0, False)

    def bound(config: Any) -> Callable[[], Tensor]:
        return lambda: additive_attention(*args, config=config)[0]

    chosen = choose("forward", p.query.dtype)
    ways = "shared", "single", "hardware"
    return {f"{OURS} {tanh}": bound(replace(chosen, tanh=tanh)) for tanh in ways}


def step(p: Problem, forward: Callable[[], Tensor]) -> Callable[[], Any]:
    """What is timed."""
    if not p.case.backward:
        return forward
    return lambda: torch.autograd.grad(forward(), p.inputs, p.do)


def outputs(p: Problem, forward: Callable[[], Tensor]) -> dict[str, Tensor]:
    """What a run computes, by name."""
    o = forward()
    if not p.case.backward:
        return {"o": o}
    grads = torch.autograd.grad(o, p.inputs, p.do)
    return {"o": o.detach()} | dict(zip(("dquery", "dkey", "dvalue", "dv"), grads, strict=True))


def exact(p: Problem) -> dict[str, Tensor]:
    """The same in float64, one row of the batch at a time, since it takes so much memory."""
    leaves = [t.detach().double().requires_grad_(p.case.backward) for t in p.inputs]
    query, key, value, v = leaves
    rows = []
    for b in range(p.case.B):
        row = slice(b, b + 1)
        o = by_product(query[row], key[row], value[row], v)
        if p.case.backward:
            o.backward(p.do[row].double())
        rows.append(o.detach())
    results = {"o": torch.cat(rows)}
    if p.case.backward:
        grads = {f"d{n}": t.grad for n, t in zip(("query", "key", "value", "v"), leaves)}
        results |= {name: t for name, t in grads.items() if t is not None}
    return results


def peak_on_cpu(name: str, case: Case) -> int:
    """Bytes that one run of ours or of eager's adds at its peak, measured in a fresh process."""
    return memory.in_fresh_process("benchmarks.additive_memory", name, asdict(case))


def peak_on_gpu(p: Problem, forward: Callable[[], Tensor]) -> int:
    """The same of this process's device."""
    run = step(p, forward)
    run()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = run()
    peak = torch.cuda.max_memory_allocated() - before
    del result
    return peak


def tanh_rate(device: str) -> float:
    """tanh a second: on a GPU what its units can do, on a CPU what torch.tanh does in the cache."""
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        return _HARDWARE_TANH * properties.multi_processor_count * clock()
    x = torch.randn(4096)
    out = torch.empty_like(x)
    return x.numel() / seconds_of_one_call(lambda: torch.tanh(x, out=out))
