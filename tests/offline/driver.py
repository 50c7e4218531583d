"""A stand-in for the driver of a GPU: real launch code runs on CPU tensors, up to the launch.

    with pretend_gpu(90) as launches:
        module.function(tensor)
    launches[0].grid

Everything before the launch is real: arguments are specialised, the kernel is compiled for the
target with the bundled assembler, and one that would not fit is refused as a driver refuses it.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.driver import DriverBase
from triton.compiler import CompiledKernel

from tests.offline import binaries
from tests.offline.targets import SHARED_BYTES, Arch, full_grid, most_threads, target_of


@dataclass(frozen=True)
class Launch:
    """A launch that was recorded: arguments and constants by the names of the parameters."""

    kernel: str
    grid: tuple[int, int, int]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    compiled: CompiledKernel

    @property
    def warps(self) -> int:
        return self.compiled.metadata.num_warps

    @property
    def stages(self) -> int:
        return self.compiled.metadata.num_stages


class Launcher:
    """What Triton calls to launch a compiled kernel: it records the launch in the driver."""

    def __init__(self, src: Any, metadata: Any) -> None:
        self.src, self.metadata = src, metadata

    def __call__(self, x: int, y: int, z: int, stream: int, *call: Any) -> None:
        _function, _packed, _launch_metadata, _enter, _leave, *values = call
        driver = triton.runtime.driver.active
        kernel = self.src.fn
        cache = kernel.device_caches[driver.get_current_device()][0]
        compiled = next(k for k in cache.values() if k.metadata is self.metadata)
        given = dict(zip(kernel.arg_names, values))
        fixed = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
        driver.launches.append(
            Launch(
                kernel.__name__,
                full_grid((x, y, z)),
                {name: value for name, value in given.items() if name not in fixed},
                {name: value for name, value in given.items() if name in fixed},
                compiled,
            )
        )


class Utilities:
    """The part of a driver that knows the device and loads binaries."""

    def __init__(self, arch: Arch) -> None:
        self.arch = arch

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_BYTES[self.arch], "multiprocessor_count": 132}

    def load_binary(
        self, name: str, binary: bytes, shared: int, device: int
    ) -> tuple[None, None, int, int, int]:
        """Module, function, registers, spilled words and the most threads of a block."""
        if isinstance(self.arch, str):
            return None, None, 0, 0, 1024
        usage = binaries.resource_usage(binary)
        return None, None, usage["REG"], usage["LOCAL"] // 4, most_threads(usage["REG"])


class Driver(DriverBase):
    """A device that Triton takes for the active one."""

    launcher_cls = Launcher

    def __init__(self, arch: Arch) -> None:
        self.target = target_of(arch)
        self.arch = arch
        self.launches: list[Launch] = []
        self.utils = Utilities(arch)

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        # Triton keeps compiled kernels and limits by device number: one that no GPU has.
        return 1000 + list(SHARED_BYTES).index(self.arch)

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Callable[..., Any]:
        raise NotImplementedError("no kernel runs here, so none is timed")


@contextlib.contextmanager
def pretend_gpu(arch: Arch) -> Iterator[list[Launch]]:
    """Kernels are compiled for `arch` (80, 89, 90, 100 or "gfx942") and their launches recorded.

    Raises triton's OutOfResources where a block would need more shared memory, tensor memory or
    threads than the device has.
    """
    config = triton.runtime.driver
    before, driver = config._active, Driver(arch)
    config.set_active(driver)
    try:
        yield driver.launches
    finally:
        config._active = before
