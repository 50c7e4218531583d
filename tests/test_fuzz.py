"""Wrong arguments into the raw ops: they raise an ordinary exception, whatever comes.

Each example starts from a correct call and spoils it in one or two places. A spoilt call that
is accepted must still be computed without touching memory it does not own; `make asan` runs
this file under AddressSanitizer. Every example goes to the kernel that the dispatcher picks and
to the reference behind it, which must refuse the same calls.
"""

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from seqkern.ops import _additive_ops as additive
from seqkern.ops import recurrent as module
from seqkern.reference import additive as additive_reference
from seqkern.reference import recurrent as reference
from seqkern.reference.cells import GATES
from tests.fuzzing import outcome, spoilt_tensor

Arguments = dict[str, Any]
EXAMPLES = 250
FORWARD = ("x", "batch_sizes", "h0", "c0", "weights", "mode")
BACKWARD = (
    *("dy", "dh_n", "dc_n", "x", "batch_sizes", "h0", "c0", "weights"),
    *("y", "gates", "cells", "mode", "need_dx", "need_dw"),
)
NAMES = {
    "recurrent": FORWARD,
    "recurrent_inference": (*FORWARD[:5], "packed", "mode"),
    "recurrent_backward": BACKWARD,
    "recurrent_prepacked": ("x", "h0", "c0", "snapshot"),
    "recurrent_pack": ("weights", "mode", "directions"),
}


def correct_call(r: random.Random) -> Arguments:
    """Arguments for all ops that belong together."""
    mode = r.choice(list(GATES))
    T, B, I, H, D = r.choice([1, 2, 5]), r.choice([0, 1, 3, 7]), r.choice([1, 3, 8]), 0, 0
    H, D, bias = r.choice([1, 5, 16, 33]), r.choice([1, 2]), r.random() < 0.5
    P = r.choice([1, 3]) if mode == "LSTM" and r.random() < 0.3 else 0
    dtype = r.choice([torch.float32, torch.float64, torch.bfloat16, torch.float16])
    sizes = sorted((r.randint(1, max(B, 1)) for _ in range(T)), reverse=True)
    ragged = B > 0 and r.random() < 0.4
    if ragged:
        B = sizes[0]
    n = GATES[mode] * H
    shapes = [(n, I), (n, P or H)] + ([(n,), (n,)] if bias else []) + ([(P, H)] if P else [])
    weights = [torch.randn(s).to(dtype) for _ in range(D) for s in shapes]
    x = torch.randn((sum(sizes), I) if ragged else (T, B, I)).to(dtype)
    h0 = torch.randn(D, B, P or H).to(dtype)
    c0 = torch.randn(D, B, H).to(dtype) if mode == "LSTM" else None
    batch_sizes = torch.tensor(sizes) if ragged else None
    y, h_n, c_n, gates, cells = reference.recurrent(x, batch_sizes, h0, c0, weights, mode)
    call = {"x": x, "batch_sizes": batch_sizes, "h0": h0, "c0": c0, "weights": weights}
    call |= {"mode": mode, "packed": [], "directions": D, "y": y, "gates": gates, "cells": cells}
    call |= {"dy": torch.randn_like(y), "dh_n": torch.randn_like(h_n)}
    call["snapshot"] = torch.ops.seqkern.recurrent_pack(weights, mode, D)[0]
    return call | {
        "dc_n": None if c0 is None else torch.randn_like(c_n),
        "need_dx": r.random() < 0.7,
        "need_dw": r.random() < 0.7,
    }


def spoilt_sizes(r: random.Random, sizes: Tensor | None) -> Tensor | None:
    values = sizes.flatten().tolist() if sizes is not None and sizes.numel() else [3, 2, 1]
    kind = r.randrange(8)
    if kind == 0:
        return None if sizes is not None else torch.tensor(values)
    if kind == 1:
        return torch.tensor(values).int()
    if kind == 2:
        return torch.tensor([*values[::-1], values[0] + 1])
    if kind == 3:
        return torch.tensor([]).long()
    if kind == 4:
        return torch.tensor(values).unsqueeze(0)
    if kind == 5:
        return torch.tensor(values).double()
    values, at = [int(v) for v in values], r.randrange(len(values))
    values[at] = r.choice([0, -1, -(2**62), 2**62, 2**31, values[at] + 1])
    return torch.tensor(values)


def spoil(r: random.Random, call: Arguments, names: tuple[str, ...]) -> None:
    name = r.choice([n for n in names if n not in ("need_dx", "need_dw")])
    value = call[name]
    if name == "mode":
        call[name] = r.choice([*GATES, "LSTM\0", "", "lstm", "x" * 5000])
    elif name == "directions":
        call[name] = r.choice([-1, 0, 1, 2, 3, 2**62])
    elif name == "batch_sizes":
        call[name] = spoilt_sizes(r, value)
    elif name in ("weights", "packed"):
        call[name] = spoilt_list(r, value, call)
    elif name == "snapshot" and r.random() < 0.8:
        call[name] = spoilt_snapshot(r, value)
    elif value is None:
        call[name] = r.choice([call["h0"], call["x"]])
    else:
        call[name] = spoilt_tensor(r, value)


def spoilt_snapshot(r: random.Random, snapshot: Tensor) -> Tensor:
    """Another length, or another value where the first bytes tell the sizes."""
    if r.random() < 0.3:
        return torch.cat([snapshot, snapshot[: r.choice([1, 64])]])[r.choice([0, 1, 64]) :]
    words = snapshot.clone()
    field = words[8 * r.randrange(10) :][:8].view(torch.int64)
    field.fill_(r.choice([-1, 0, 1, 2, 3, 33, 2**31, 2**62, -(2**63), int(field) + 1]))
    return words


def spoilt_list(r: random.Random, value: list[Tensor], call: Arguments) -> list[Tensor]:
    value, kind = list(value), r.randrange(5)
    if kind == 0 and value:
        value.pop(r.randrange(len(value)))
    elif kind == 1:
        value.append(r.choice([call["x"], call["h0"], torch.empty(0)]))
    elif kind == 2:
        r.shuffle(value)
    elif kind == 3 and value:
        value = []
    elif value:
        at = r.randrange(len(value))
        value[at] = spoilt_tensor(r, value[at])
    else:
        value = [torch.zeros(8, dtype=torch.uint8)] * 4
    return value


@pytest.mark.parametrize("op", NAMES)
@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1))
def test_raw_ops_refuse_and_never_crash(op: str, seed: int) -> None:
    r = random.Random(seed)
    torch.manual_seed(seed)
    call = correct_call(r)
    for _ in range(r.choice([0, 1, 1, 1, 2])):
        spoil(r, call, NAMES[op])
    arguments = [call[name] for name in NAMES[op]]
    outcome(getattr(torch.ops.seqkern, op).default, arguments)


@pytest.mark.parametrize("op", ["recurrent", "recurrent_backward"])
@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1))
def test_kernel_and_reference_refuse_the_same_calls(op: str, seed: int) -> None:
    """All tensors on the CPU, so that both are asked."""
    r = random.Random(seed)
    torch.manual_seed(seed)
    call = correct_call(r)
    for _ in range(r.choice([0, 1, 2])):
        spoil(r, call, NAMES[op])
    arguments = [call[name] for name in NAMES[op]]
    flat = [t for a in arguments for t in (a if isinstance(a, list) else [a])]
    if any(isinstance(t, Tensor) and t.device.type == "meta" for t in flat):
        return
    kernel = outcome(getattr(torch.ops.seqkern, op).default, arguments)
    assert kernel == outcome(getattr(module, f"_{op}"), arguments)


# ---- additive attention -------------------------------------------------------------------

ADDITIVE = "additive_attention", "additive_attention_backward"


def additive_call(r: random.Random) -> list[Any]:
    """What the backward takes, but for the flags: gradients, results, the forward's arguments."""
    dtype = r.choice([torch.float32, torch.float64, torch.bfloat16, torch.float16])
    B, Tq, Tk, D, Dv = (r.choice(n) for n in ([0, 1, 3], [0, 1, 4], [0, 1, 6], [1, 9, 70], [1, 5]))
    shapes = (B, Tq, D), (B, Tk, D), (B, Tk, Dv), (D,)
    inputs = [torch.randn(shape).to(dtype) for shape in shapes]
    shape = [r.choice([1, n]) for n in (B, Tq, Tk)]
    mask = torch.rand(shape) > 0.3 if r.random() < 0.5 else None
    bias = torch.randn(shape).to(r.choice([dtype, torch.float32])) if r.random() < 0.5 else None
    k_lens = torch.randint(-2, Tk + 3, (B,), dtype=torch.int32) if r.random() < 0.5 else None
    args = [*inputs, mask, bias, k_lens, r.choice([1.0, -0.3, 0.0])]
    o, weights, lse = additive_reference.additive_attention(*args, True)
    grads = [torch.ones_like(t) if r.random() < 0.7 else None for t in (weights, lse)]
    return [torch.ones_like(o), *grads, o, lse, *args]


@pytest.mark.parametrize("op", ADDITIVE)
@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1))
def test_additive_ops_refuse_what_the_reference_refuses(op: str, seed: int) -> None:
    r = random.Random(seed)
    torch.manual_seed(seed)
    call, spoilt = additive_call(r), r.choice([0, 1, 1, 2])
    for _ in range(spoilt):
        at = r.randrange(len(call) - 1)
        call[at] = r.choice([call[0], call[5]]) if call[at] is None else spoilt_tensor(r, call[at])
    forward = op == ADDITIVE[0]
    arguments = [*call[5:], True] if forward else [*call, *(r.random() < 0.7 for _ in range(5))]
    kernel = outcome(getattr(torch.ops.seqkern, op).default, arguments)
    assert spoilt or kernel == "computed"
    if not any(isinstance(t, Tensor) and t.device.type == "meta" for t in arguments):
        behind = additive._reference if forward else additive._reference_backward
        assert kernel == outcome(behind, arguments)
