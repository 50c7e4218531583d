"""CUDA graphs, for the tests that need a GPU."""

import warnings
from collections.abc import Callable
from typing import TypeVar

import torch

Result = TypeVar("Result")


def capture(step: Callable[[], Result]) -> tuple[torch.cuda.CUDAGraph, Result]:
    """The graph of `step`, in which nothing may synchronise, and the tensors that a replay writes.

    Two calls before it, on another stream, compile kernels and fill what is kept.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with warnings.catch_warnings():
        # PyTorch says so at every change of the mode.
        warnings.filterwarnings("ignore", "Synchronization debug mode")
        try:
            torch.cuda.set_sync_debug_mode("error")
            with torch.cuda.graph(graph):
                result = step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return graph, result
