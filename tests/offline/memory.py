"""What a launch may touch: the extent of each tensor argument, and who touched each element.

A pointer that a kernel receives carries the number of its argument in the bits above the address.
Pointer arithmetic keeps them, so an access is held against the argument that it came from, even
where it happens to land in another one.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

ADDRESS_BITS = 48
ADDRESS = np.uint64((1 << ADDRESS_BITS) - 1)
NOBODY, SEVERAL = -1, -2
# Which earlier touches of an element, by another program, an access of each kind must not meet.
CLASHES = {
    "store": ("store", "load", "atomic"),
    "load": ("store", "atomic"),
    "atomic": ("store", "load"),
}
DEEDS = {"store": "stored", "load": "read", "atomic": "updated atomically"}


class KernelFault(Exception):
    """A kernel touched memory that it must not touch, or that another program touches."""


class Shadow:
    """For every element of one storage: the program that loaded, stored or updated it."""

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self.start, self._bytes = storage.data_ptr(), storage.nbytes()
        self.unit = self._bytes + 1
        self._programs: dict[str, np.ndarray] = {}

    def touch(self, kind: str, addresses: np.ndarray, program: int) -> str | None:
        """Notes an access; returns what it clashes with, in words."""
        elements = (addresses - np.uint64(self.start)) // np.uint64(self.unit)
        for earlier in CLASHES[kind]:
            if earlier not in self._programs:
                continue
            seen = self._programs[earlier][elements]
            clash = (seen != NOBODY) & (seen != program)
            if clash.any():
                other = int(seen[clash][0])
                who = "several programs" if other == SEVERAL else f"program number {other}"
                return f"{int(clash.sum())} element(s) that {who} {DEEDS[earlier]}"
        self._note(kind, elements, program)
        return None

    def _note(self, kind: str, elements: np.ndarray, program: int) -> None:
        if kind not in self._programs:
            length = self._bytes // self.unit + 1
            self._programs[kind] = np.full(length, NOBODY, dtype=np.int32)
        programs = self._programs[kind]
        seen = programs[elements]
        alone = (seen == NOBODY) | (seen == program)
        programs[elements] = np.where(alone, program, SEVERAL)


@dataclass
class Argument:
    """A tensor argument: its name, the addresses it spans, and the shadow of its storage."""

    name: str
    start: int
    stop: int
    itemsize: int
    shadow: Shadow


@dataclass
class Memory:
    """The tensor arguments of one launch, and the checks of every access to them."""

    kernel: str
    bounds: bool = True
    races: bool = True
    program: int = 0
    position: tuple[int, int, int] = (0, 0, 0)
    arguments: list[Argument] = field(default_factory=list)
    _shadows: dict[int, Shadow] = field(default_factory=dict)

    def add(self, name: str, tensor: Tensor) -> int:
        """Admits a tensor and returns the pointer that the kernel gets for it."""
        last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride()))
        length = (last + 1) * tensor.element_size() if tensor.numel() else 0
        start = tensor.data_ptr()
        shadow = self._shadow(tensor)
        self.arguments.append(Argument(name, start, start + length, tensor.element_size(), shadow))
        return start | len(self.arguments) << ADDRESS_BITS

    def _shadow(self, tensor: Tensor) -> Shadow:
        # Arguments that share a storage share its shadow, in units of the smallest element.
        storage = tensor.untyped_storage()
        shadow = self._shadows.setdefault(storage.data_ptr(), Shadow(storage))
        shadow.unit = min(shadow.unit, tensor.element_size())
        return shadow

    def access(
        self, kind: str, pointers: np.ndarray, mask: np.ndarray, itemsize: int
    ) -> np.ndarray:
        """Checks the active lanes of an access and returns all lanes' plain addresses."""
        active = pointers[mask]
        owners = active >> np.uint64(ADDRESS_BITS)
        alone = owners.size and (owners == owners[0]).all()
        for owner in owners[:1] if alone else np.unique(owners):
            addresses = active[owners == owner] & ADDRESS
            if not 1 <= owner <= len(self.arguments):
                raise self._fault(f"{kind} through a pointer that comes from no argument")
            argument = self.arguments[int(owner) - 1]
            if self.bounds:
                self._check_bounds(kind, argument, addresses, itemsize)
            if self.races:
                clash = argument.shadow.touch(kind, addresses, self.program)
                if clash:
                    raise self._fault(f"race: {kind} to `{argument.name}` of {clash}")
        return pointers & ADDRESS

    def _check_bounds(
        self, kind: str, argument: Argument, addresses: np.ndarray, itemsize: int
    ) -> None:
        start, stop = np.uint64(argument.start), np.uint64(argument.stop)
        inside = (addresses >= start) & (addresses + np.uint64(itemsize) <= stop)
        if inside.all():
            return
        first = int(addresses[~inside][0]) - argument.start
        raise self._fault(
            f"{kind} of {int((~inside).sum())} element(s) outside `{argument.name}`: "
            f"the first is number {first // argument.itemsize}, and its extent holds "
            f"{(argument.stop - argument.start) // argument.itemsize}"
        )

    def _fault(self, what: str) -> KernelFault:
        return KernelFault(
            f"{self.kernel}, program {self.position} (number {self.program}): {what}"
        )


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fresh tensors (torch.empty and its kin) hold NaN, integers their largest value."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )
    # torch.use_deterministic_algorithms would import the compiler, which takes seconds.
    torch._C._set_deterministic_algorithms(True, warn_only=False)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch._C._set_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = before[2]
