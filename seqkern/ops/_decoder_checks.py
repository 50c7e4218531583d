"""Argument checks of the decoder ops: each raises with the argument's name and its value."""

from typing import Any

import torch
from torch import Tensor

from seqkern.ops._checks import check_device, check_mode, check_rank, check_shape, check_tensor
from seqkern.reference.cells import GATES
from seqkern.reference.decoder import Arguments, Saved
from seqkern.reference.recurrent import accumulation_dtype


def _check(
    op: str, name: str, symbols: str, t: Any, shape: tuple, like: Tensor, dtype: torch.dtype
) -> None:
    check_tensor(op, name, t)
    if t.dtype != dtype:
        raise ValueError(
            f"{op}: {name} must be {dtype} beside a key of {like.dtype}, got {t.dtype}"
        )
    check_device(op, name, t, like, "key")
    check_shape(op, name, symbols, t, shape)


def check_decoder(op: str, *arguments: Any) -> None:
    """Ranks, sizes, dtypes and devices of the arguments of seqkern::attention_decoder.

    Raises:
        TypeError: an argument is of the wrong type, or c0 does not suit the mode.
        ValueError: a size, dtype or device does not match.
    """
    a = Arguments(*arguments)
    check_mode(op, a.mode)
    for name, symbols in (("gates_x", "N, T, G*H"), ("key", "B, Tk, A"), ("value", "B, Tk, C")):
        check_rank(op, name, symbols, getattr(a, name), 3)
    check_rank(op, "h0", "N, H", a.h0, 2)
    if not a.key.dtype.is_floating_point:
        raise ValueError(f"{op}: key must be of a floating-point dtype, got {a.key.dtype}")
    (N, H), (B, Tk, A), C = a.h0.shape, a.key.shape, a.value.size(2)
    if not (H and A and C):
        raise ValueError(f"{op}: H, A and C must be at least 1, got {H}, {A} and {C}")
    check_rows(op, "h0", N, B)
    steps, n = a.gates_x.size(1), GATES[a.mode] * H
    if not steps:
        raise ValueError(f"{op}: gates_x must hold at least one step, got {tuple(a.gates_x.shape)}")
    acc, G = accumulation_dtype(a.key.dtype), GATES[a.mode]
    _check(op, "gates_x", f"N, T, {G}H", a.gates_x, (N, steps, n), a.key, acc)
    expected = {
        "value": ("B, Tk, C", (B, Tk, C)),
        "h0": ("N, H", (N, H)),
        "w_q": ("A, H", (A, H)),
        "b_q": ("A", (A,)),
        "v": ("A", (A,)),
        "w_c": (f"{G}H, C", (n, C)),
        "w_hh": (f"{G}H, H", (n, H)),
        "b_hh": (f"{G}H", (n,)),
    }
    for name, (symbols, shape) in expected.items():
        t = getattr(a, name)
        if t is not None or not name.startswith("b_"):
            _check(op, name, symbols, t, shape, a.key, a.key.dtype)
    if a.k_lens is not None:
        _check(op, "k_lens", "B", a.k_lens, (B,), a.key, torch.int32)
    if a.mode == "LSTM":
        _check(op, "c0", "N, H", a.c0, (N, H), a.key, a.key.dtype)
    elif a.c0 is not None:
        raise TypeError(f"{op}: c0 must be None for {a.mode}")


def check_rows(op: str, name: str, rows: int, sources: int) -> None:
    """N rows must be K for each of B sources."""
    if rows % sources if sources else rows:
        raise ValueError(
            f"{op}: {name} must have a multiple of B = {sources} rows, K for each source of key, "
            f"got {rows}"
        )


def check_decoder_backward(op: str, grads: tuple, saved: Saved, *arguments: Any) -> None:
    """What the backward takes besides the forward's arguments, which are right already.

    Args:
        grads: ds, dcontexts, dweights, dc_n.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: a size, dtype or device does not match.
    """
    a = Arguments(*arguments)
    (N, H), (_, Tk, A), C, T = a.h0.shape, a.key.shape, a.value.size(2), a.gates_x.size(1)
    dtype, lstm = a.key.dtype, a.mode == "LSTM"
    expected = {
        "ds": (grads[0], (N, T, H)),
        "dcontexts": (grads[1], (N, T, C)),
        "dweights": (grads[2], (N, T, Tk)),
        "dc_n": (grads[3] if lstm else None, (N, H)),
        "s": (saved.s, (N, T, H)),
        "contexts": (saved.contexts, (N, T, C)),
        "weights": (saved.weights, (N, T, Tk)),
        "gates": (saved.gates if a.mode in ("LSTM", "GRU") else None, (N, T, 4 * H)),
        "cells": (saved.cells if lstm else None, (N, T, H)),
    }
    for name, (t, shape) in expected.items():
        if t is not None:
            _check(op, name, "of the forward", t, shape, a.key, dtype)
    acc = accumulation_dtype(dtype)
    _check(op, "queries", "of the forward", saved.queries, (N, T, A), a.key, acc)


def check_sequences(
    op: str, x: Any, state: Any, key: Any, value: Any, mode: str
) -> tuple[Tensor, Any]:
    """The ranks of what a decoder reads, and the rows that they share. Returns s_0 and c_0.

    Raises:
        TypeError: an argument is of the wrong type, or `state` does not suit the mode.
        ValueError: a size does not match.
    """
    s_0, c_0 = _unpacked(op, "state", state, "s_0, c_0") if mode == "LSTM" else (state, None)
    for name, symbols, t, rank in (
        ("x", "N, T, I", x, 3),
        ("state", "N, H", s_0, 2),
        ("key", "B, Tk, A", key, 3),
        ("value", "B, Tk, C", value, 3),
    ):
        check_rank(op, name, symbols, t, rank)
    check_rows(op, "state", s_0.size(0), key.size(0))
    if x.size(0) != s_0.size(0) or not x.size(1):
        raise ValueError(
            f"{op}: x must be (N, T, I) with N = {s_0.size(0)} and T >= 1, got {tuple(x.shape)}"
        )
    return s_0, c_0


def check_public(
    x: Any, state: Any, key: Any, value: Any, attention: Any, cell: Any, mode: Any, k_lens: Any
) -> None:
    """The arguments of seqkern.attention_decoder, by the names that it gives them.

    Raises:
        TypeError: an argument is of the wrong type, or `state` does not suit the mode.
        ValueError: a size, dtype or device does not match.
    """
    op = "attention_decoder"
    check_mode(op, mode)
    w_q, b_q, v = _unpacked(op, "attention", attention, "w_q, b_q, v")
    w_ih, w_hh, b_ih, b_hh = _unpacked(op, "cell", cell, "w_ih, w_hh, b_ih, b_hh")
    s_0, c_0 = check_sequences(op, x, state, key, value, mode)
    G, steps = GATES[mode], x.size(1)
    n, features = G * s_0.size(1), x.size(2) + value.size(2)
    _check(op, "x", "N, T, I", x, tuple(x.shape), key, key.dtype)
    _check(op, "w_ih", f"{G}H, I + C", w_ih, (n, features), key, key.dtype)
    if b_ih is not None:
        _check(op, "b_ih", f"{G}H", b_ih, (n,), key, key.dtype)
    if isinstance(k_lens, Tensor) and k_lens.dtype == torch.int64:
        # A length beyond 32 bits must not wrap into a valid one.
        k_lens = k_lens.clamp(0, key.size(1)).int()
    gates_x = x.new_empty(x.size(0), steps, n, dtype=accumulation_dtype(key.dtype))
    w_c = w_ih[:, x.size(2) :]
    for name, t in (("s_0 of state", s_0), ("c_0 of state", c_0 if mode == "LSTM" else s_0)):
        _check(op, name, "N, H", t, tuple(s_0.shape), key, key.dtype)
    check_decoder(op, gates_x, s_0, c_0, key, value, k_lens, w_q, b_q, v, w_c, w_hh, b_hh, mode)


def _unpacked(op: str, name: str, t: Any, names: str) -> Any:
    if not isinstance(t, tuple | list) or len(t) != names.count(",") + 1:
        kind = f"{len(t)} values" if isinstance(t, tuple | list) else type(t).__name__
        raise TypeError(f"{op}: {name} must be ({names}), got {kind}")
    return t
