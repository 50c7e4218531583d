"""The device that a suite runs on, a GPU where there is one, and how its work is timed."""

from collections.abc import Callable

import torch

from benchmarks import paired

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
# What one sample is to last, so that a wait for the device is a small part of it.
SAMPLE_SECONDS = 4e-3 if GPU else 1e-4


def name() -> str:
    """Of the device, for the results."""
    return torch.cuda.get_device_name() if GPU else "cpu"


def clock() -> float:
    """Hz of the GPU's multiprocessors. Builds of PyTorch for CUDA 13 may not say it."""
    kilohertz = getattr(torch.cuda.get_device_properties(0), "clock_rate", None)
    if kilohertz is None:
        from triton.runtime import driver

        utils = driver.active.utils  # pyright: ignore
        kilohertz = utils.get_device_properties(0)["sm_clock_rate"]
    return 1e3 * kilohertz


def l2_bytes() -> int:
    """Of the GPU's L2 cache; 0 on a CPU, which nobody asks for a decoder's bandwidth."""
    return torch.cuda.get_device_properties(0).L2_cache_size if GPU else 0


def wait() -> None:
    """Until everything queued on the device is done."""
    if GPU:
        torch.cuda.synchronize()


def seconds_of(run: Callable[[], object]) -> float:
    """Wall seconds of one call with a wait for the device, rough."""
    wait()
    return paired.seconds_of_one_call(lambda: (run(), wait()))


def repeated(run: Callable[[], object]) -> tuple[Callable[[], None], int]:
    """So many calls, and a wait for the device, that they make a sample; and how many."""
    times = max(1, round(SAMPLE_SECONDS / seconds_of(run)))

    def repeat() -> None:
        for _ in range(times):
            run()
        wait()

    return repeat, times


def seconds_each(run: Callable[[], object]) -> float:
    """Wall seconds of one call among many that the device has in its queue."""
    repeat, times = repeated(run)
    return paired.seconds_of_one_call(repeat) / times


def copy_rate(size: int) -> float:
    """Bytes a second, read and written, of copies of `size` bytes."""
    x = torch.ones(size, dtype=torch.uint8, device=DEVICE)
    y = torch.empty_like(x)
    return 2 * size / seconds_each(lambda: y.copy_(x))
