"""What the tests of cuDNN's path share, with a GPU and without: rows for every layer, results by
autograd, and cuDNN's two ops on CPU tensors, by torch.nn."""

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils._python_dispatch import TorchDispatchMode

from seqkern.ops import _recurrent_cudnn as cudnn
from seqkern.ops.recurrent import recurrent
from seqkern.testing import assert_within_budget, neighbours
from tests.recurrent_layers import torch_layer
from tests.test_cuda_kernels import Problem, Results

NUMBERS = ("float32", "tf32", "bfloat16", "float16")


def rows(card: str, H: int, B: tuple[int, int], T: int = 1) -> tuple[cudnn.Row, ...]:
    """One for every kind of layer of a size, of a measurement that nobody made."""
    kinds = itertools.product(cudnn.MODES, NUMBERS, (1, 2), (False, True), (False, True))
    return tuple(cudnn.Row(card, *kind, H, B, T, 1.5, "a test") for kind in kinds)


def use_table(monkeypatch: pytest.MonkeyPatch, table: tuple[cudnn.Row, ...]) -> None:
    """Puts a table in the place of the committed one."""
    cudnn._rows.cache_clear()
    monkeypatch.setattr(cudnn, "table", lambda: table)


def results(problem: Problem) -> Results:
    """Of a forward and a backward through autograd, named as those of the problem."""
    leaves = [t.clone().requires_grad_() for t in (problem.x, *problem.weights)]
    x, *weights = leaves
    states = [None if t is None else t.clone().requires_grad_() for t in (problem.h0, problem.c0)]
    h0, c0 = states
    assert h0 is not None
    y, *last = recurrent(problem.mode, x, h0, c0, weights, batch_sizes=problem.batch_sizes)
    outputs = dict(zip(("y", "h_n", "c_n"), (y, *last), strict=True))
    inputs = {"dx": x, "dh0": h0, "dc0": c0} | {f"dweights[{i}]": w for i, w in enumerate(weights)}
    inputs = {name: t for name, t in inputs.items() if t is not None}
    given = [(t, g) for t, g in zip(outputs.values(), problem.grads, strict=True) if t is not None]
    grads = torch.autograd.grad([t for t, _ in given], list(inputs.values()), [g for _, g in given])
    found = outputs | dict(zip(inputs, grads, strict=True))
    return {name: t.detach() for name, t in found.items() if t is not None}


def assert_right(problem: Problem, got: Results, device: str = "cpu") -> None:
    """Against the float64 reference, within the budget of the dtype; TF32's is float16's."""
    dtype = torch.float16 if problem.kind == "tf32" else problem.x.dtype

    def reference(tensors: Any) -> Results:
        found = problem.replaced(t.to(device) for t in tensors).reference()
        return {name: t for name, t in found.items() if name not in ("gates", "cells")}

    assert {t.dtype for t in got.values()} == {problem.x.dtype}
    exact = reference(t.double() for t in problem.tensors())
    same = list(map(reference, neighbours([t.to(dtype) for t in problem.tensors()])))
    assert_within_budget({n: t.to(dtype) for n, t in got.items()}, exact, same, dtype)


class EmulatedCudnn(TorchDispatchMode):
    """Stands behind PyTorch's dispatcher, which checks each call against the ops' schemas."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._cudnn_rnn.default:
            return afresh(lambda: self.forward(*args))
        if func is torch.ops.aten._cudnn_rnn_backward.default:
            return afresh(lambda: self.backward(*args))
        return func(*args, **(kwargs or {}))

    def forward(self, x, weight, stride, buffer, hx, cx, *layer) -> tuple[Tensor, ...]:
        """aten::_cudnn_rnn"""
        self.calls.append("training" if layer[6] else "inference")
        call = Call(x, weight, stride, buffer, hx, cx, *layer)
        with torch.no_grad():
            y, h_n, c_n = call.outputs()
        reserve = torch.ones(13 if layer[6] else 0, dtype=torch.uint8)
        return y, h_n, torch.empty(0) if c_n is None else c_n, reserve, buffer

    def backward(self, x, weight, stride, buffer, hx, cx, y, dy, dh_n, dc_n, *rest) -> tuple:
        """aten::_cudnn_rnn_backward, which spends the reserve space"""
        *layer, reserve, (_, _, need_dc, need_dw) = rest
        self.calls.append("backward")
        assert layer[6], "cudnn RNN backward can only be called in training mode"
        assert reserve.numel() == 13, "not what the forward returned"
        assert reserve.all(), "spent"
        assert y.is_contiguous()
        reserve.zero_()
        call = Call(x, weight, stride, buffer, hx, cx, *layer)
        pairs = zip(call.outputs(), (dy, dh_n, dc_n), strict=True)
        given = [(t, g) for t, g in pairs if t is not None and g is not None]
        inputs = [t for t in (call.x, *call.states, *call.layer.parameters()) if t is not None]
        outputs, grads = zip(*given, strict=True)
        dx, dh, *others = torch.autograd.grad(outputs, inputs, grads, materialize_grads=True)
        assert dc_n is None or cx is not None
        assert need_dc == (cx is not None), "illegally required grad of cx for non-LSTM RNN"
        dc = None if cx is None else others.pop(0)
        # Those of biases that the caller does not have are left out.
        names = [name for name, _ in call.layer.named_parameters()]
        dw = [g for n, g in zip(names, others, strict=True) if stride == 4 or "weight" in n]
        return dx, dh, dc, dw if need_dw else []


class Call:
    """One call as torch.nn's layer: the weights are read from cuDNN's buffer alone."""

    def __init__(self, x, weight, stride, buffer, hx, cx, *layer) -> None:
        mode, hidden, proj, layers, batch_first, dropout, _, both, sizes, dropout_state = layer
        assert (proj, layers, batch_first, dropout, dropout_state) == (0, 1, False, 0.0, None)
        assert hx.is_contiguous()
        assert cx is None or cx.is_contiguous()
        assert len(weight) == stride * (1 + both)
        name = {number: name for name, number in cudnn.MODES.items()}[mode]
        self.layer = torch_layer(name, x.size(-1), hidden, bidirectional=both).to(x.dtype)
        parameters = [p for dim in (2, 1) for p in self.layer.parameters() if p.dim() == dim]
        parts = buffer.split([p.numel() for p in parameters])
        for p, part in zip(parameters, parts, strict=True):
            p.data = part.detach().clone().view_as(p)
        self.x = x.detach().clone().requires_grad_()
        self.states = [None if t is None else t.detach().clone().requires_grad_() for t in (hx, cx)]
        self.sizes = sizes

    def outputs(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """y, h_n, c_n"""
        h, c = self.states
        given = PackedSequence(self.x, torch.tensor(self.sizes)) if self.sizes else self.x
        y, last = self.layer(given, h if c is None else (h, c))
        y = y.data if isinstance(y, PackedSequence) else y
        return (y, last, None) if c is None else (y, *last)


def afresh(call: Callable[[], Any]) -> Any:
    """In a thread of its own, where autograd and no mode is on."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()
