"""The calls that are timed: seqkern's layer and its peers, on the same weights and inputs."""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import seqkern
import seqkern.nn
from benchmarks import onnx_graph
from benchmarks.cells import PREPACKED, Cell

Outputs = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Contestant:
    """One implementation of a cell: `run` is timed, `outputs` is what a call computes.

    Inference is timed inside one `torch.no_grad()`, as a server runs it: entering it takes a fifth
    of a short call.

    dtype: that it computes in, where it is not the cell's.
    """

    name: str
    run: Callable[[], object]
    outputs: Callable[[], Outputs]
    dtype: str | None = None


@dataclass(frozen=True)
class Problem:
    """The inputs of a cell in float64: everyone is given these values, rounded to its dtype."""

    module: torch.nn.RNNBase
    x: torch.Tensor
    dy: torch.Tensor
    batch_sizes: torch.Tensor | None


def make_problem(cell: Cell, seed: int = 0, device: str = "cpu") -> Problem:
    """Weights and inputs of a cell, rounded to its dtype so that no contestant gains by it."""
    generator = torch.Generator(device).manual_seed(seed)
    dtype = getattr(torch, cell.dtype)
    module = torch_module(cell, device=device)
    for weight in module.parameters():
        bound = cell.H**-0.5
        weight.data.uniform_(-bound, bound, generator=generator)
    module.to(dtype).double()
    x = torch.randn(cell.T, cell.B, cell.H, generator=generator, device=device)
    x = x.to(dtype).double()
    batch_sizes = None
    if cell.ragged:
        packed = pack_padded_sequence(x, torch.tensor(cell.lengths))
        x, batch_sizes = packed.data, packed.batch_sizes
    out = cell.directions * (cell.P or cell.H)
    dy = torch.randn(*x.shape[:-1], out, generator=generator, device=device)
    return Problem(module, x, dy.to(dtype).double(), batch_sizes)


def torch_module(
    cell: Cell, namespace: ModuleType = torch.nn, device: str | torch.device = "cpu"
) -> torch.nn.RNNBase:
    """The module of a cell from torch.nn or from another namespace with the same classes."""
    options: dict[str, Any] = {"bidirectional": cell.directions == 2, "device": device}
    if cell.layers > 1:
        options["num_layers"] = cell.layers
    if cell.mode.startswith("RNN"):
        options["nonlinearity"] = cell.mode[4:].lower()
        return namespace.RNN(cell.H, cell.H, **options)
    if cell.P:
        options["proj_size"] = cell.P
    return getattr(namespace, cell.mode)(cell.H, cell.H, **options)


def module_contestant(
    name: str, cell: Cell, problem: Problem, namespace: ModuleType, dtype: torch.dtype
) -> Contestant:
    """The cell through a module of `namespace`: inference, training, or one step with state."""
    module = torch_module(cell, namespace, problem.x.device)
    module.load_state_dict(problem.module.state_dict())
    module.to(dtype)
    if name == PREPACKED:
        module.prepack()
    return contestant_of(name, cell, problem, module, dtype)


def contestant_of(
    name: str, cell: Cell, problem: Problem, module: torch.nn.Module, dtype: torch.dtype
) -> Contestant:
    """The cell through a module that has the problem's weights, in `dtype`."""
    x, dy = problem.x.to(dtype), problem.dy.to(dtype)
    if cell.kind == "training":
        return _training(name, module, x, dy, problem.batch_sizes)
    if cell.kind == "step":
        return _step(name, module, x)

    call_input = x if problem.batch_sizes is None else PackedSequence(x, problem.batch_sizes)

    def run() -> Any:
        return module(call_input)

    def outputs() -> Outputs:
        with torch.no_grad():
            y, state = run()
        return _named(y, state)

    return Contestant(name, run, outputs)


def _named(y: torch.Tensor | PackedSequence, state: Any) -> Outputs:
    states = state if isinstance(state, tuple) else (state,)
    named = {"y": y.data if isinstance(y, PackedSequence) else y}
    return named | dict(zip(("h_n", "c_n"), states, strict=False))


def _training(
    name: str,
    module: torch.nn.Module,
    x: torch.Tensor,
    dy: torch.Tensor,
    batch_sizes: torch.Tensor | None,
) -> Contestant:
    # torch.autograd.grad returns the gradients without adding them to .grad, so a step needs no
    # zeroing pass that would dilute the ratio.
    x = x.clone().requires_grad_()
    leaves = {"dx": x} | {f"d{n}": p for n, p in module.named_parameters()}

    def forward() -> torch.Tensor:
        if batch_sizes is None:
            return module(x)[0]
        return module(PackedSequence(x, batch_sizes))[0].data

    def run() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(forward(), list(leaves.values()), dy)

    def outputs() -> Outputs:
        y = forward()
        grads = torch.autograd.grad(y, list(leaves.values()), dy)
        return {"y": y.detach()} | dict(zip(leaves, grads, strict=True))

    return Contestant(name, run, outputs)


def _step(name: str, module: torch.nn.Module, x: torch.Tensor) -> Contestant:
    state: object = None

    def run() -> torch.Tensor:
        nonlocal state
        y, state = module(x, state)
        return y

    return Contestant(name, run, lambda: _steps(run))


def _steps(run: Callable[[], object], count: int = 4) -> Outputs:
    """The outputs of the first steps; called on a fresh contestant, whose state is zero."""
    with torch.no_grad():
        return {f"y{t}": torch.as_tensor(run()).clone().reshape(-1) for t in range(count)}


def stream_contestant(cell: Cell, problem: Problem) -> Contestant:
    """seqkern.Stream on the cell's module, fed with one NumPy time step after another."""
    layer = torch_module(cell, seqkern.nn)
    layer.load_state_dict(problem.module.state_dict())
    layer.to(getattr(torch, cell.dtype))
    stream = seqkern.Stream(layer)
    x = problem.x[0, 0].float().numpy()

    return Contestant("seqkern", lambda: stream.step(x), lambda: _steps(lambda: stream.step(x)))


def onnx_contestant(cell: Cell, problem: Problem) -> Contestant:
    """ONNX Runtime on the same weights, with inputs bound once: its lowest-overhead way."""
    module = torch_module(cell)
    module.load_state_dict(problem.module.state_dict())
    streaming = cell.kind == "step"
    model = onnx_graph.recurrent_model(module, with_state=streaming)
    session = onnx_graph.session(model, cell.threads)
    x = problem.x.float().numpy()
    if streaming:
        run = onnx_stepper(session, x, cell)
        return Contestant("onnxruntime", run, lambda: _steps(run))
    binding = session.io_binding()
    binding.bind_cpu_input("X", x)
    for output in session.get_outputs():
        binding.bind_output(output.name)

    def outputs() -> Outputs:
        session.run_with_iobinding(binding)
        Y, *states = (torch.from_numpy(a) for a in binding.copy_outputs_to_cpu())
        y = Y.transpose(1, 2).reshape(cell.T, cell.B, -1)
        return {"y": y} | dict(zip(("h_n", "c_n"), states, strict=False))

    return Contestant("onnxruntime", lambda: session.run_with_iobinding(binding), outputs)


def onnx_stepper(
    session: ort.InferenceSession, x: np.ndarray, cell: Cell
) -> Callable[[], np.ndarray]:
    """A step that writes x into a bound buffer and lets the state swap between two buffers."""
    states = [name.name for name in session.get_inputs() if name.name != "X"]
    shape = (cell.directions, cell.B, cell.H)
    buffers = [{s: np.zeros(shape, np.float32) for s in states} for _ in range(2)]
    x_buffer = np.zeros_like(x)
    y = np.zeros((1, cell.directions, cell.B, cell.H), np.float32)
    bindings = []
    for source, target in (buffers, buffers[::-1]):
        binding = session.io_binding()
        binding.bind_cpu_input("X", x_buffer)
        _bind_output(binding, "Y", y)
        for state in states:
            binding.bind_cpu_input(state, source[state])
            _bind_output(binding, state.replace("initial", "Y"), target[state])
        bindings.append(binding)

    def run() -> np.ndarray:
        x_buffer[...] = x
        session.run_with_iobinding(bindings[0])
        bindings.reverse()
        return y

    return run


def _bind_output(binding: ort.IOBinding, name: str, array: np.ndarray) -> None:
    binding.bind_output(name, "cpu", 0, np.float32, array.shape, array.ctypes.data)


def contestants(cell: Cell, problem: Problem, peers: tuple[str, ...]) -> list[Contestant]:
    """seqkern first, then the named peers ("torch", "onnxruntime") on the same problem."""
    dtype = getattr(torch, cell.dtype)
    if cell.kind == "step":
        entries = [stream_contestant(cell, problem)]
    else:
        entries = [module_contestant("seqkern", cell, problem, seqkern.nn, dtype)]
    for peer in peers:
        if peer == "torch":
            entries.append(module_contestant("torch", cell, problem, torch.nn, dtype))
        elif peer == "onnxruntime":
            entries.append(onnx_contestant(cell, problem))
            if cell.kind == "inference":
                entries.append(module_contestant(PREPACKED, cell, problem, seqkern.nn, dtype))
        else:
            raise ValueError(f"peers must be torch or onnxruntime, got {peer!r}")
    return entries
