"""CUDA graphs, for the tests that need a GPU."""

import copy
import warnings
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

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


def check_captured_training(layer: torch.nn.Module, x: Tensor) -> None:
    """A forward, a backward and the optimizer's step, replayed on other inputs, do what the same
    calls do without a graph."""

    def trained(layer: torch.nn.Module) -> Callable[[], Tensor]:
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)

        def step() -> Tensor:
            optimizer.zero_grad()
            loss = layer(x)[0].square().mean()
            loss.backward()
            optimizer.step()
            return loss.detach()

        return step

    twin = copy.deepcopy(layer)
    plain = trained(twin)
    graph, loss = capture(trained(layer))
    for _ in range(2):  # as many as `capture` takes
        plain()
    for _ in range(3):
        x.copy_(torch.randn(x.shape))
        graph.replay()
        torch.testing.assert_close(loss, plain())
    torch.testing.assert_close(list(layer.parameters()), list(twin.parameters()))
