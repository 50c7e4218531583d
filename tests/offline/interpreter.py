"""Runs Triton kernels on CPU tensors, in a process that compiles other kernels too.

    with interpreted(module):
        module.kernel[grid](tensor, ...)

Within the context a launch of a kernel is computed by `builder.Builder`, one program after the
other in a shuffled order. The kernel's source runs as Python with the meaning that Triton's
compiler gives it (`source`). triton.language is patched while a launch runs and restored after
it. Written for Triton 3.6, of whose interpreter it uses private parts.
"""

import contextlib
import functools
import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from triton._utils import validate_block_shape
from triton.backends.amd.compiler import HIPOptions
from triton.backends.nvidia.compiler import CUDAOptions
from triton.language.extra import libdevice
from triton.runtime import interpreter as stock
from triton.runtime.jit import JITFunction

from tests.offline import source
from tests.offline.builder import BUILDER, Handle, numpy_dtype, stored, values
from tests.offline.folds import fold, scan
from tests.offline.memory import KernelFault, Memory, poisoned_memory
from tests.offline.targets import full_grid

__all__ = ["KernelFault", "interpreted", "poisoned_memory"]

OPTIONS = CUDAOptions.__dataclass_fields__.keys() | HIPOptions.__dataclass_fields__.keys()
DTYPES = {
    torch.bool: tl.int1,
    torch.uint8: tl.uint8,
    torch.int8: tl.int8,
    torch.int16: tl.int16,
    torch.int32: tl.int32,
    torch.int64: tl.int64,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}
LIBDEVICE = {"tanh": np.tanh, "expm1": np.expm1, "log1p": np.log1p}


@dataclass(frozen=True)
class Settings:
    """What `interpreted` was asked for."""

    modules: tuple[str, ...]
    seed: int
    bounds: bool
    races: bool


@contextlib.contextmanager
def interpreted(
    *modules: ModuleType, seed: int = 0, bounds: bool = True, races: bool = True
) -> Iterator[None]:
    """Kernels of the modules (all kernels where none is named) run on CPU tensors.

    `seed` fixes the order of the programs of a launch. `bounds` checks that every access falls
    within the argument that its pointer came from; `races` that no element is stored by one
    program and touched by another. Either raises KernelFault. Masked-off lanes of a load without
    `other` hold NaN, or a large integer.
    """
    settings = Settings(tuple(module.__name__ for module in modules), seed, bounds, races)
    run = JITFunction.run

    @functools.wraps(run)
    def run_or_interpret(kernel, *args, grid, warmup, **kwargs):
        if settings.modules and kernel.__module__ not in settings.modules:
            return run(kernel, *args, grid=grid, warmup=warmup, **kwargs)
        return None if warmup else launch(kernel, settings, grid, args, kwargs)

    JITFunction.run = run_or_interpret
    try:
        yield
    finally:
        JITFunction.run = run


# ---- one launch


def launch(
    kernel: JITFunction, settings: Settings, grid: Any, args: tuple, kwargs: dict[str, Any]
) -> None:
    """Runs every program of a launch, in the order that the seed gives."""
    for hook in kernel.pre_run_hooks:
        hook(*args, **kwargs)
    bound = bind(kernel, args, kwargs)
    grid = full_grid(grid(bound) if callable(grid) else grid)
    memory = Memory(kernel.__name__, settings.bounds, settings.races)
    positions = list(enumerate(itertools.product(*map(range, grid))))
    random.Random(settings.seed).shuffle(positions)
    BUILDER.memory, BUILDER.grid_dim = memory, grid
    constant = {p.name for p in kernel.params if p.is_constexpr}
    arguments = {
        name: source.raw(value) if name in constant else converted(name, value, memory)
        for name, value in bound.items()
    }
    # Overflows and NaN are values like others on a GPU; numpy would warn of them.
    with language_patches().applied(), np.errstate(all="ignore"):
        for memory.program, memory.position in positions:
            BUILDER.grid_idx = memory.position
            try:
                source.rewritten(kernel)(**arguments)
            except Exception as error:
                error.add_note(f"in {kernel.__name__}, program {memory.position} of {grid}")
                raise


def bind(kernel: JITFunction, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The kernel's parameters by name; a keyword that is neither one nor an option is refused."""
    unknown = kwargs.keys() - kernel.signature.parameters.keys() - OPTIONS
    if unknown:
        raise KeyError(f"{kernel.__name__} has no parameter and no option {sorted(unknown)}")
    named = {name: value for name, value in kwargs.items() if name in kernel.signature.parameters}
    bound = kernel.signature.bind(*args, **named)
    bound.apply_defaults()
    return dict(bound.arguments)


def converted(name: str, value: Any, memory: Memory) -> Any:
    """A launch argument as the kernel sees it, of the type that Triton's launcher gives it."""
    if isinstance(value, tuple):
        parts = [converted(f"{name}[{i}]", part, memory) for i, part in enumerate(value)]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if value is None or isinstance(value, tl.constexpr | tl.dtype):
        return source.raw(value)
    if isinstance(value, Tensor):
        return pointer(name, value, memory)
    if isinstance(value, bool):
        return source.scalar(value, tl.int1)
    if isinstance(value, int):
        small, signed = -(2**31) <= value < 2**31, value < 2**63
        return source.scalar(value, tl.int32 if small else tl.int64 if signed else tl.uint64)
    if isinstance(value, float):
        return source.scalar(value, tl.float32)
    raise TypeError(f"`{name}` is a {type(value).__name__}, which the interpreter does not take")


def pointer(name: str, tensor: Tensor, memory: Memory) -> tl.tensor:
    if tensor.device.type != "cpu" or tensor.dtype not in DTYPES:
        raise TypeError(
            f"`{name}` is {tensor.dtype} on {tensor.device}; the interpreter takes CPU tensors of "
            f"{', '.join(map(str, DTYPES))}"
        )
    dtype = tl.pointer_type(DTYPES[tensor.dtype])
    address = np.array([memory.add(name, tensor)], dtype=np.uint64)
    return tl.tensor(Handle(address, dtype), dtype)


# ---- triton.language while a program runs

ABSENT = object()


class Patches(list[tuple[Any, str, Any]]):
    """Attributes to set for a while; Triton's own patching functions add to it by `set_attr`."""

    def set_attr(self, owner: Any, name: str, value: Any) -> None:
        self.append((owner, name, value))

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        before = []
        try:
            for owner, name, value in self:
                before.append((owner, name, vars(owner).get(name, ABSENT)))
                setattr(owner, name, value)
            yield
        finally:
            for owner, name, value in reversed(before):
                if value is ABSENT:
                    delattr(owner, name)
                else:
                    setattr(owner, name, value)


@functools.cache
def language_patches() -> Patches:
    patches = Patches()
    owners = (tl, tl.core, tl.math, tl.tensor, tl.core.tensor_descriptor_base)
    for owner in owners:
        stock._patch_builtin(owner, BUILDER, patches)
    patches.set_attr(tl.tensor, "__index__", lambda self: int(self.handle.data.item()))
    patches.set_attr(tl.tensor, "T", property(lambda self: tl.trans(self)))
    for name, member in vars(tl.tensor).items():
        if isinstance(member, JITFunction):
            patches.set_attr(tl.tensor, name, as_method(member))
    for module in (tl, tl.core):
        stock._patch_lang_core(module, patches)
    for module in (tl, tl.core):
        patches.set_attr(module, "range", source.loop)
        patches.set_attr(module, "static_assert", source.static_assert)
        patches.set_attr(module, "reduce", fold)
        patches.set_attr(module, "associative_scan", scan)
    for name, function in LIBDEVICE.items():
        patches.set_attr(libdevice, name, elementwise(function))
    patches.set_attr(JITFunction, "__call__", source.call_helper)
    patches.set_attr(stock, "_get_np_dtype", numpy_dtype)
    patches.set_attr(tl.tensor, "__init__", quick_tensor)
    patches.set_attr(tl.block_type, "__init__", quick_block_type)
    return patches


def as_method(function: JITFunction) -> Callable:
    return lambda *args, **kwargs: function(*args, **kwargs)


def elementwise(function: Callable[[np.ndarray], np.ndarray]) -> Callable[[tl.tensor], tl.tensor]:
    return lambda x: tl.tensor(stored(function(values(x.handle)), x.dtype), x.type)


# Half of the time of a launch would go into the shapes of intermediate results, which repeat.


def quick_tensor(self: tl.tensor, handle: Any, type: tl.dtype) -> None:
    """`tl.tensor.__init__` with shapes that are made once."""
    self.handle, self.type, self.dtype = handle, type, type.scalar
    _, self.shape, self.numel = shape_of(tuple(type.shape) if type.is_block() else ())


def quick_block_type(self: tl.block_type, element_ty: tl.dtype, shape: Any) -> None:
    """`tl.block_type.__init__` with shapes that are made once."""
    sizes = tuple(map(source.raw, shape))
    if not sizes:
        raise TypeError("a block has at least one dimension")
    self.element_ty, self.name = element_ty, f"<{sizes}, {element_ty}>"
    self.shape, _, numel = shape_of(sizes)
    self.numel = numel.value


@functools.cache
def shape_of(sizes: tuple[int, ...]) -> tuple[tl.tuple, tl.tuple, tl.constexpr]:
    """A type's shape, a tensor's, and its number of elements; raises where the compiler would."""
    count = validate_block_shape(sizes) if sizes else 1
    return tl.tuple(sizes), tl.tuple([tl.constexpr(n) for n in sizes]), tl.constexpr(count)
