"""Argument checks shared by the ops: each raises with the argument's name and its value."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from seqkern.reference.cells import GATES
from seqkern.reference.recurrent import autocast_enabled


def check_mode(op: str, mode: str) -> None:
    if not isinstance(mode, str) or mode not in GATES:
        raise ValueError(f"{op}: mode must be one of {', '.join(GATES)}, got {mode!r}")


def check_tensor(op: str, name: str, t: object) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{op}: {name} must be a Tensor, got {type(t).__name__}")


def autocast_dtype(t: Tensor) -> torch.dtype | None:
    """What autocast makes of tensors on the device of `t`; None where it is off."""
    return torch.get_autocast_dtype(t.device.type) if autocast_enabled(t.device) else None


def compute_dtype(t: Tensor) -> torch.dtype:
    """The dtype that `autocast` gives a tensor: its own without it."""
    if t.dtype == torch.float64 or not t.dtype.is_floating_point:
        return t.dtype
    return autocast_dtype(t) or t.dtype


def autocast(given: Any, like: Tensor) -> Any:
    """The same tuples, lists and tensors, the floating tensors but those of float64 in autocast's
    dtype on the device of `like`."""
    dtype = autocast_dtype(like)
    if dtype is None:
        return given

    def cast(t: Any) -> Any:
        if isinstance(t, tuple | list):
            return (tuple if isinstance(t, tuple) else list)(map(cast, t))
        floating = isinstance(t, Tensor) and t.dtype.is_floating_point
        return t.to(dtype) if floating and t.dtype != torch.float64 else t

    return cast(given)


def autocast_added(t: Tensor, q: Tensor) -> Tensor:
    """What is added to the scores of q, as PyTorch's function casts it, but for float32, which the
    ops take as it is."""
    return t if t.dtype == torch.float32 else autocast(t, q)


def check_shape(op: str, name: str, symbols: str, t: Tensor, shape: tuple) -> None:
    if t.shape != shape:
        raise ValueError(f"{op}: {name} must be ({symbols}) = {tuple(shape)}, got {tuple(t.shape)}")


def check_rank(op: str, name: str, symbols: str, t: Any, rank: int) -> None:
    check_tensor(op, name, t)
    if t.dim() != rank:
        raise ValueError(f"{op}: {name} must be ({symbols}), got {tuple(t.shape)}")


def check_device(op: str, name: str, t: Tensor, x: Tensor, of: str = "x") -> None:
    """t is where x is, the argument that `of` names."""
    if t.device != x.device:
        raise ValueError(f"{op}: {name} must be on the device of {of}, {x.device}, got {t.device}")


def check_like(op: str, name: str, t: Tensor, x: Tensor, of: str = "x") -> None:
    """t has the dtype and the device of x, the argument that `of` names."""
    if t.dtype != x.dtype:
        raise ValueError(f"{op}: {name} must have the dtype of {of}, {x.dtype}, got {t.dtype}")
    check_device(op, name, t, x, of)


def check_alike(op: str, tensors: dict[str, Tensor], x: Tensor, of: str) -> None:
    """`check_like` for each of them by its name, after what autocast makes of the dtypes."""
    for name, t in tensors.items():
        check_device(op, name, t, x, of)
        if compute_dtype(t) != compute_dtype(x):
            check_like(op, name, t, x, of)


def check_batch_sizes(op: str, batch_sizes: Tensor, rows: int, batch: int) -> None:
    """The values of batch_sizes; reads them, so not for fake tensors."""
    sizes = batch_sizes.tolist()
    if not sizes:
        raise ValueError(f"{op}: batch_sizes must hold at least one step, got none")
    if any(b < 1 for b in sizes) or any(a < b for a, b in pairwise(sizes)):
        raise ValueError(f"{op}: batch_sizes must be positive and must not increase, got {sizes}")
    if sizes[0] != batch or sum(sizes) != rows:
        raise ValueError(
            f"{op}: batch_sizes must start at the batch size {batch} of h0 and add up to the "
            f"{rows} rows of x, got {sizes}"
        )


def check_recurrent(
    op: str,
    mode: str,
    x: Tensor,
    batch_sizes: Tensor | None,
    h0: Tensor,
    c0: Tensor | None,
    weights: list[Tensor],
) -> None:
    """Ranks, sizes, dtypes and devices of one recurrent layer's arguments, but not the values of
    batch_sizes.

    Raises:
        TypeError: an argument is of the wrong type, or c0 does not suit the mode.
        ValueError: a size, dtype or device does not match.
    """
    check_mode(op, mode)
    check_tensor(op, "x", x)
    check_tensor(op, "h0", h0)
    if not x.dtype.is_floating_point:
        raise ValueError(f"{op}: x must be of a floating-point dtype, got {x.dtype}")
    if batch_sizes is None:
        if x.dim() != 3:
            raise ValueError(f"{op}: x must be (T, B, I), got {tuple(x.shape)}")
        if x.size(0) == 0:
            raise ValueError(f"{op}: x must hold at least one step, got {tuple(x.shape)}")
    else:
        check_tensor(op, "batch_sizes", batch_sizes)
        if x.dim() != 2:
            raise ValueError(f"{op}: x must be (N, I) with batch_sizes, got {tuple(x.shape)}")
        if batch_sizes.dim() != 1 or batch_sizes.dtype != torch.int64:
            raise ValueError(
                f"{op}: batch_sizes must be (T,) of torch.int64, got "
                f"{tuple(batch_sizes.shape)} of {batch_sizes.dtype}"
            )
        if batch_sizes.device.type not in ("cpu", "meta"):
            raise ValueError(f"{op}: batch_sizes must be on the CPU, got {batch_sizes.device}")
    if h0.dim() != 3 or h0.size(0) not in (1, 2):
        raise ValueError(f"{op}: h0 must be (D, B, P) with D = 1 or 2, got {tuple(h0.shape)}")
    if batch_sizes is None and h0.size(1) != x.size(1):
        raise ValueError(
            f"{op}: h0 must have the batch size {x.size(1)} of x, got {tuple(h0.shape)}"
        )
    check_like(op, "h0", h0, x)
    if not isinstance(weights, list | tuple):
        raise TypeError(f"{op}: weights must be a list of Tensors, got {type(weights).__name__}")
    check_weights(op, mode, x, h0, weights)
    if mode != "LSTM":
        if c0 is not None:
            raise TypeError(f"{op}: c0 must be None for {mode}")
        return
    if not isinstance(c0, Tensor):
        raise TypeError(f"{op}: c0 must be a Tensor for LSTM, got {type(c0).__name__}")
    check_like(op, "c0", c0, x)
    check_shape(op, "c0", "D, B, H", c0, (h0.size(0), h0.size(1), weights[0].size(0) // 4))


def check_weights(op: str, mode: str, x: Tensor, h0: Tensor, weights: list[Tensor]) -> None:
    """The flat list of one layer: names, sizes, dtypes and devices of its tensors."""
    directions, gates = h0.size(0), GATES[mode]
    names = weight_names(op, mode, directions, len(weights))
    first = weights[0]
    check_tensor(op, "w_ih", first)
    if first.dim() != 2 or first.size(0) % gates or not first.size(0):
        raise ValueError(f"{op}: w_ih must be ({gates}*H, I) with H > 0, got {tuple(first.shape)}")
    n, inputs, outputs = first.size(0), x.size(-1), h0.size(2)
    hidden = n // gates
    if "w_hr" not in names and outputs != hidden:
        raise ValueError(
            f"{op}: h0 must be (D, B, H) = (..., {hidden}) by w_ih, got {tuple(h0.shape)}"
        )
    shapes = {
        "w_ih": (n, inputs),
        "w_hh": (n, outputs),
        "b_ih": (n,),
        "b_hh": (n,),
        "w_hr": (outputs, hidden),
    }
    symbols = {
        "w_ih": f"{gates}H, I",
        "w_hh": f"{gates}H, P",
        "b_ih": f"{gates}H",
        "b_hh": f"{gates}H",
        "w_hr": "P, H",
    }
    for name, w in zip(names * directions, weights, strict=True):
        check_tensor(op, name, w)
        check_like(op, name, w, x)
        check_shape(op, name, symbols[name], w, shapes[name])


def weight_names(op: str, mode: str, directions: int, count: int) -> list[str]:
    """The names of one direction's weights in a flat list of `count`, by torch.nn's order."""
    per_direction = count // directions if directions in (1, 2) else 0
    if (
        per_direction * directions != count
        or per_direction not in (2, 3, 4, 5)
        or (per_direction % 2 and mode != "LSTM")
    ):
        raise ValueError(
            f"{op}: weights must hold w_ih, w_hh[, b_ih, b_hh][, w_hr for LSTM] for each of the "
            f"{directions} direction(s) of h0, got {count} tensors for {mode}"
        )
    bias = ["b_ih", "b_hh"] if per_direction >= 4 else []
    return ["w_ih", "w_hh", *bias, *(["w_hr"] if per_direction % 2 else [])]


def check_recurrent_backward(
    op: str,
    mode: str,
    x: Tensor,
    h0: Tensor,
    weights: list[Tensor],
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
    saved: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> None:
    """What the backward takes besides the forward's arguments: gradients and saved tensors.

    Only those that are given and that the mode has: for the others, placeholders, anything will do.

    Raises:
        ValueError: a size, dtype or device does not match.
    """
    directions, batch, outputs = h0.shape
    hidden = weights[0].size(0) // GATES[mode]
    rows = x.shape[:-1].numel()
    y_shape = (*x.shape[:-1], directions * outputs)
    expected = {
        "dy": (grads[0], y_shape),
        "dh_n": (grads[1], tuple(h0.shape)),
        "y": (saved[0], y_shape),
    }
    if mode in ("LSTM", "GRU"):
        expected["gates"] = (saved[1], (directions, rows, 4 * hidden))
    if mode == "LSTM":
        expected["cells"] = (saved[2], (directions, rows, hidden))
        expected["dc_n"] = (grads[2], (directions, batch, hidden))
    for name, (t, shape) in expected.items():
        if t is not None:
            check_like(op, name, t, x)
            check_shape(op, name, "of the forward", t, shape)
