"""Checks of the attention ops: each raises with the argument's name and its value."""

from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch._C import _get_tracing_state
from torch._C._functorch import get_unwrapped, is_batchedtensor, is_functorch_wrapped_tensor
from torch._guards import detect_fake_mode

from seqkern.ops._checks import check_device, check_tensor
from seqkern.ops._derivatives import takes_graph
from seqkern.reference.attention import FAR

CAUSAL = None, "top_left", "bottom_right"
FLOATING = torch.float16, torch.bfloat16, torch.float32, torch.float64
INT = (torch.int32, torch.int64)


def check_attention(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    q_lens: Tensor | None,
    k_lens: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    causal: str | None,
    window_left: int,
    window_right: int,
    softcap: float,
    dropout_p: float,
    scale: float,
    max_q: int,
    max_k: int,
    deterministic: bool,
) -> None:
    """The arguments of seqkern::attention: all but the values of lengths and bounds.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: a size, dtype, device or value does not fit.
    """
    packed = cu_q is not None or cu_k is not None
    check_qkv(op, q, k, v, packed)
    if packed:
        if cu_q is None or cu_k is None:
            missing = "cu_q" if cu_q is None else "cu_k"
            raise ValueError(f"{op}: {missing} must be given where the other one is")
        if q_lens is not None or k_lens is not None:
            raise ValueError(f"{op}: lengths and cu_q, cu_k say the same: give one of them")
        check_vector(op, "cu_q", cu_q, q, None, INT)
        check_vector(op, "cu_k", cu_k, q, cu_q.size(0), INT)
        if cu_q.size(0) == 0:
            raise ValueError(f"{op}: cu_q must hold the B + 1 bounds of B sequences, got none")
        if max_q < 0 or max_k < 0:
            raise ValueError(f"{op}: max_q and max_k must not be negative, got {max_q}, {max_k}")
        B, H = cu_q.size(0) - 1, q.size(1)
    else:
        B, H = q.size(0), q.size(1)
        if (max_q, max_k) != (q.size(2), k.size(2)):
            raise ValueError(
                f"{op}: max_q, max_k must be Tq, Tk = {q.size(2)}, {k.size(2)}, "
                f"got {max_q}, {max_k}"
            )
        for name, lens in (("q_lens", q_lens), ("k_lens", k_lens)):
            if lens is not None:
                check_vector(op, name, lens, q, B, INT)
    _check_extras(op, q, (B, H, max_q, max_k), mask, bias, alibi_slopes, sinks)
    if (seed is None) != (dropout_p == 0):
        raise ValueError(f"{op}: a seed goes with a dropout_p over 0, got {dropout_p}")
    if seed is not None:
        check_vector(op, "seed", seed, q, 1, (torch.int64,))
    check_rule(op, causal, window_left, window_right, softcap, dropout_p, scale)


def check_qkv(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packed: bool,
    names: tuple[str, str, str] = ("q", "k", "v"),
) -> None:
    form = "(N, H, D)" if packed else "(B, H, T, D)"
    Q, K, V = names
    for name, t in zip(names, (q, k, v), strict=True):
        check_tensor(op, name, t)
        if t.is_nested:
            raise ValueError(
                f"{op}: {Q}, {K} and {V} must be nested all three, for attention_varlen, or none, "
                f"got a nested {name}"
            )
        if t.dim() != (3 if packed else 4):
            raise ValueError(f"{op}: {name} must be {form}, got {tuple(t.shape)}")
        if t.dtype not in FLOATING or t.dtype != q.dtype:
            raise ValueError(
                f"{op}: {Q}, {K} and {V} must be of one floating-point dtype of 16, 32 or 64 bits, "
                f"got {q.dtype} for {Q} and {t.dtype} for {name}"
            )
        check_device(op, name, t, q, Q)
    T = 0 if packed else 2
    if not packed and (k.size(0) != q.size(0) or v.size(0) != q.size(0)):
        raise ValueError(
            f"{op}: {Q}, {K} and {V} must have one batch size, got {q.size(0)}, {k.size(0)}, "
            f"{v.size(0)}"
        )
    if k.size(-1) != q.size(-1):
        raise ValueError(
            f"{op}: {K} must have the head size {q.size(-1)} of {Q}, got {tuple(k.shape)}"
        )
    if v.size(1) != k.size(1) or v.size(T) != k.size(T):
        raise ValueError(
            f"{op}: {V} must have the heads and the length of {K}, {tuple(k.shape)}, got "
            f"{tuple(v.shape)}"
        )
    H, Hkv = q.size(1), k.size(1)
    if (H % Hkv if Hkv else H) != 0:
        raise ValueError(
            f"{op}: the {H} heads of {Q} must be a multiple of the {Hkv} of {K} and {V}"
        )


def check_sdpa(
    op: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
) -> None:
    """What PyTorch's function does not check, or says in other words."""
    for name, t in (("query", query), ("key", key), ("value", value)):
        check_tensor(op, name, t)
        if t.dim() < 2:
            raise ValueError(f"{op}: {name} must be (..., T, D), got {tuple(t.shape)}")
        if t.is_nested != query.is_nested:
            raise ValueError(f"{op}: query, key and value must be nested all three, or none")
    # PyTorch's kernel for the CPU takes the length of value for key's, and reads beyond it. Sizes
    # of nested tensors, and those that torch.jit.trace follows, cannot be compared.
    comparable = not query.is_nested and _get_tracing_state() is None
    if comparable and key.size(-2) != value.size(-2):
        raise ValueError(
            f"{op}: value must have the length of key, {key.size(-2)}, got {tuple(value.shape)}"
        )
    if attn_mask is not None:
        check_tensor(op, "attn_mask", attn_mask)
        check_device(op, "attn_mask", attn_mask, query, "query")
        if is_causal:
            raise RuntimeError(f"{op}: attn_mask and is_causal must not both be given")
    if not 0 <= number(op, "dropout_p", dropout_p) <= 1:
        raise ValueError(f"{op}: dropout_p must be in [0, 1], got {dropout_p}")
    if scale is not None:
        check_scale(op, number(op, "scale", scale))


def _check_extras(
    op: str,
    q: Tensor,
    full: tuple[int, int, int, int],
    mask: Tensor | None,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
) -> None:
    for name, t in (("mask", mask), ("bias", bias)):
        if t is None:
            continue
        check_tensor(op, name, t)
        check_device(op, name, t, q, "q")
        if t.dim() != 4 or any(n not in (1, m) for n, m in zip(t.shape, full, strict=True)):
            raise ValueError(
                f"{op}: {name} must broadcast to (B, H, Tq, Tk) = {full}, got {tuple(t.shape)}"
            )
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"{op}: mask must be boolean, got {mask.dtype}; a floating one is a bias")
    if bias is not None:
        check_kind(op, "bias", bias, q, (q.dtype, torch.float32))
    B, H = full[:2]
    if alibi_slopes is not None:
        check_slopes(op, alibi_slopes, q, B, H)
        if alibi_slopes.requires_grad:
            raise ValueError(
                f"{op}: alibi_slopes have no gradient; slopes that are learnt go through bias"
            )
    if sinks is not None:
        check_vector(op, "sinks", sinks, q, H, (q.dtype, torch.float32))


def check_vector(
    op: str,
    name: str,
    t: Any,
    q: Tensor,
    size: int | None,
    dtypes: tuple[torch.dtype, ...],
    of: str = "q",
) -> None:
    """A one-dimensional tensor of that size and of one of those dtypes, on the device of q, the
    argument that `of` names."""
    check_tensor(op, name, t)
    if t.dim() != 1 or (size is not None and t.size(0) != size):
        expected = "(B + 1,)" if size is None else f"({size},)"
        raise ValueError(f"{op}: {name} must be {expected}, got {tuple(t.shape)}")
    check_kind(op, name, t, q, dtypes, of)


def check_slopes(op: str, t: Tensor, q: Tensor, B: int, H: int) -> None:
    check_tensor(op, "alibi_slopes", t)
    if tuple(t.shape) not in ((H,), (B, H)):
        raise ValueError(
            f"{op}: alibi_slopes must be (H,) = ({H},) or (B, H) = ({B}, {H}), got {tuple(t.shape)}"
        )
    dtypes = torch.float32, torch.promote_types(q.dtype, torch.float32)
    check_kind(op, "alibi_slopes", t, q, dtypes)


def check_kind(
    op: str, name: str, t: Tensor, q: Tensor, dtypes: tuple[torch.dtype, ...], of: str = "q"
) -> None:
    """One of those dtypes, and the device of q, the argument that `of` names."""
    if t.dtype not in dtypes:
        names = " or ".join(map(str, dict.fromkeys(dtypes)))
        raise ValueError(f"{op}: {name} must be {names}, got {t.dtype}")
    check_device(op, name, t, q, of)


def check_rule(
    op: str,
    causal: str | None,
    window_left: int,
    window_right: int,
    softcap: float,
    dropout_p: float,
    scale: float,
) -> None:
    """What is no tensor."""
    if causal not in CAUSAL:
        raise ValueError(
            f'{op}: causal must be None, "top_left" or "bottom_right", got {causal!r}: with '
            f"Tq != Tk the two differ"
        )
    if window_left < -1 or window_right < -1:
        raise ValueError(
            f"{op}: window must hold numbers of keys, got ({window_left}, {window_right})"
        )
    if not 0 <= softcap < float("inf"):
        raise ValueError(f"{op}: softcap must be positive and finite, got {softcap}")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"{op}: dropout_p must be in [0, 1), got {dropout_p}")
    check_scale(op, scale)


def check_scale(op: str, scale: float | torch.SymFloat) -> None:
    # Not math.isfinite, which cannot be traced.
    if not -float("inf") < scale < float("inf"):
        raise ValueError(f"{op}: scale must be finite, got {scale}")


def number(op: str, name: str, value: Any) -> float:
    """An argument that is a number; or a tensor of one, as PyTorch takes it, without a gradient."""
    if isinstance(value, Tensor) and value.dim() == 0:
        if value.requires_grad:
            raise TypeError(f"{op}: {name} must be a number, or require no gradient: it has none")
        value = value.item()
    if not isinstance(value, Real | torch.SymFloat):  # a bool is 0 or 1, as for PyTorch
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")
    return float(value)


def whole(op: str, name: str, value: Any) -> int | torch.SymInt:
    """An argument that is a whole number; or a tensor of one, as PyTorch takes it."""
    if isinstance(value, Tensor) and value.dim() == 0:
        value = value.item()
    if not isinstance(value, int | torch.SymInt) or isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be a whole number, got {value!r}")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError(f"{op}: {name} must fit 64 bits, got {value}")
    return value


def positive(op: str, name: str, value: Any) -> float:
    """A positive number, 0 for None."""
    if value is None:
        return 0.0
    value = number(op, name, value)
    if not value > 0:
        raise ValueError(f"{op}: {name} must be positive or None, got {value}")
    return value


def sides(op: str, window: Any) -> tuple[int, int]:
    """window_left and window_right as the ops take them, -1 for None."""
    if window is None:
        return -1, -1
    if not isinstance(window, tuple | list) or len(window) != 2:
        raise TypeError(f"{op}: window must be None or (left, right), got {window!r}")
    for side in window:
        if side is not None and (not isinstance(side, int) or isinstance(side, bool)):
            raise TypeError(f"{op}: window must hold whole numbers or None, got {window!r}")
        if side is not None and side < 0:
            raise ValueError(f"{op}: window must hold no negative number, got {window!r}")
    # The ops take 64 bits, and Python's numbers have no end.
    left, right = (-1 if side is None else min(side, FAR) for side in window)
    return left, right


def as_slopes(op: str, t: Any, q: Tensor) -> Tensor | None:
    """ALiBi's slopes as the ops take them."""
    if t is None:
        return None
    check_tensor(op, "alibi_slopes", t)
    if not t.dtype.is_floating_point:
        raise ValueError(f"{op}: alibi_slopes must be floating, got {t.dtype}")
    t = t.to(torch.promote_types(q.dtype, torch.float32))
    # They have no gradient, and without grad mode nobody asks for one.
    return t if torch.is_grad_enabled() else t.detach()


def int32(op: str, name: str, t: Any) -> Tensor:
    """Lengths or bounds as the ops take them."""
    check_tensor(op, name, t)
    if t.dtype not in INT:
        raise ValueError(f"{op}: {name} must be of torch.int32 or torch.int64, got {t.dtype}")
    # A length beyond any sequence must not wrap into a valid one.
    return t if t.dtype == torch.int32 else t.clamp(-1, FAR).to(torch.int32)


def readable(tensors: Sequence[Tensor]) -> bool:
    """Whether values can be read: on the CPU, in no graph, neither fake nor a batch of vmap's."""
    if takes_graph() or detect_fake_mode(tensors) is not None:
        return False
    for t in tensors:
        while is_functorch_wrapped_tensor(t):
            if is_batchedtensor(t):
                return False
            t = get_unwrapped(t)
        if t.device.type != "cpu":
            return False
    return True


def check_k_lens(op: str, k_lens: Any, q: Tensor, Tk: int, of: str = "q") -> None:
    """The lengths of B rows of Tk keys, their values where they can be read; B is that of q, the
    argument that `of` names."""
    check_vector(op, "k_lens", k_lens, q, q.size(0), INT, of)
    if readable([k_lens]):
        check_within(op, "k_lens", k_lens, Tk)


def check_within(op: str, name: str, lens: Tensor, T: int) -> None:
    """The values of lengths of sequences of T places; reads them."""
    if lens.numel() and not 0 <= lens.min() <= lens.max() <= T:
        raise ValueError(f"{op}: {name} must be within [0, {T}], got {lens.tolist()}")


def check_lengths(op: str, *args) -> None:
    """The values of lengths and bounds; reads them, so for tensors on the CPU alone.

    Args:
        args: of seqkern::attention, in order.

    Raises:
        ValueError: a length is outside its sequence, or the bounds do not fit the rows.
    """
    q, k, _, _, _, q_lens, k_lens, _, _, _, cu_q, cu_k, *_, max_q, max_k, _ = args
    for name, lens, T in (("q_lens", q_lens, max_q), ("k_lens", k_lens, max_k)):
        if lens is not None:
            check_within(op, name, lens, T)
    for name, cu, rows, T in (("cu_q", cu_q, q, max_q), ("cu_k", cu_k, k, max_k)):
        if cu is None:
            continue
        lens = cu.diff()
        if cu[0] != 0 or cu[-1] != rows.size(0) or (lens < 0).any():
            raise ValueError(
                f"{op}: {name} must rise from 0 to the {rows.size(0)} rows, got {cu.tolist()}"
            )
        if lens.numel() and lens.max() > T:
            raise ValueError(
                f"{op}: max_{name[-1]} must be at least the longest sequence, "
                f"{int(lens.max())}, got {T}"
            )


def check_attention_backward(
    op: str,
    do: Tensor,
    dlse: Tensor | None,
    o: Tensor,
    lse: Tensor,
    q: Tensor,
    v: Tensor,
    packed: bool,
) -> None:
    """What the backward takes besides the forward's arguments.

    Raises:
        ValueError: a size, dtype or device does not match.
    """
    rows = tuple(q.shape[:-1])
    like_o = (*rows, v.size(-1)), q.dtype
    like_lse = rows[::-1] if packed else rows, torch.promote_types(q.dtype, torch.float32)
    given = ("do", do, like_o), ("o", o, like_o), ("lse", lse, like_lse), ("dlse", dlse, like_lse)
    for name, t, (shape, dtype) in given:
        if t is None:
            continue
        if tuple(t.shape) != shape:
            raise ValueError(f"{op}: {name} must be {shape}, got {tuple(t.shape)}")
        check_kind(op, name, t, q, (dtype,))
