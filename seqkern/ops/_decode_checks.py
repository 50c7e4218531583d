"""Checks of the ops over a cache: each raises with the argument's name and its value."""

import torch
from torch import Tensor

from seqkern.ops._attention_checks import FLOATING, check_rule, check_slopes, check_vector
from seqkern.ops._checks import check_device, check_like, check_shape, check_tensor

MAX_SPLITS = 128


def check_no_gradient(op: str, tensors: dict[str, Tensor | None]) -> None:
    """A gradient that nobody computes must not be asked for, or it would be lost in silence."""
    if not torch.is_grad_enabled():
        return
    for name, t in tensors.items():
        if t is not None and t.requires_grad:
            raise ValueError(
                f"{op}: {name} must not require a gradient, for there is none through a cache; "
                f"call it under torch.no_grad(), or use seqkern.attention"
            )


def _check_cache(op, k_cache, v_cache, k_lens, block_table) -> tuple[int, int]:
    """Returns the batch size and the number of places of each sequence."""
    symbols = "B, Hkv, T" if block_table is None else "P, Hkv, page"
    for name, t, width in (("k_cache", k_cache, "D"), ("v_cache", v_cache, "Dv")):
        check_tensor(op, name, t)
        if t.dim() != 4:
            raise ValueError(f"{op}: {name} must be ({symbols}, {width}), got {tuple(t.shape)}")
    if k_cache.dtype not in FLOATING:
        raise ValueError(
            f"{op}: k_cache must be of a floating-point dtype of 16, 32 or 64 bits, got "
            f"{k_cache.dtype}"
        )
    check_like(op, "v_cache", v_cache, k_cache, "k_cache")
    expected = (*k_cache.shape[:3], v_cache.size(3))
    check_shape(op, "v_cache", f"{symbols}, Dv", v_cache, expected)
    if k_cache.size(1) == 0 or k_cache.size(3) == 0:
        raise ValueError(f"{op}: k_cache must have heads of D > 0, got {tuple(k_cache.shape)}")
    check_tensor(op, "k_lens", k_lens)
    if block_table is None:
        B, places = k_cache.size(0), k_cache.size(2)
    else:
        check_tensor(op, "block_table", block_table)
        if block_table.dim() != 2 or block_table.dtype != torch.int32:
            raise ValueError(
                f"{op}: block_table must be (B, N) of torch.int32, got "
                f"{tuple(block_table.shape)} of {block_table.dtype}"
            )
        check_device(op, "block_table", block_table, k_cache, "k_cache")
        if k_cache.size(2) == 0:
            raise ValueError(f"{op}: k_cache must have pages of at least one place, got 0")
        if k_cache.size(0) == 0 and block_table.size(1):
            raise ValueError(f"{op}: k_cache must hold pages for block_table to name, got none")
        B, places = block_table.size(0), block_table.size(1) * k_cache.size(2)
    if k_lens.dtype != torch.int32:
        raise ValueError(f"{op}: k_lens must be of torch.int32, got {k_lens.dtype}")
    check_shape(op, "k_lens", "B", k_lens, (B,))
    check_device(op, "k_lens", k_lens, k_cache, "k_cache")
    return B, places


def check_decode(
    op, q, k_cache, v_cache, k_lens, block_table, alibi_slopes, sinks,
    causal, window_left, window_right, softcap, scale, splits,
):  # fmt: skip
    """Everything but the values of k_lens and block_table."""
    check_tensor(op, "q", q)
    B, _ = _check_cache(op, k_cache, v_cache, k_lens, block_table)
    Hkv, D = k_cache.size(1), k_cache.size(3)
    if q.dim() != 4:
        raise ValueError(f"{op}: q must be (B, H, Tq, D), got {tuple(q.shape)}")
    H = q.size(1)
    if q.size(0) != B or q.size(3) != D or H % Hkv or not H:
        raise ValueError(
            f"{op}: q must be (B, H, Tq, D) = ({B}, a multiple of {Hkv}, Tq, {D}) by the cache, "
            f"got {tuple(q.shape)}"
        )
    check_like(op, "k_cache", k_cache, q, "q")
    if alibi_slopes is not None:
        check_slopes(op, alibi_slopes, q, B, H)
    if sinks is not None:
        check_vector(op, "sinks", sinks, q, H, (q.dtype, torch.float32))
    check_rule(op, causal, window_left, window_right, softcap, 0.0, scale)
    if not 0 <= splits <= MAX_SPLITS:
        raise ValueError(f"{op}: splits must be from 1 to {MAX_SPLITS}, got {splits}")


def check_append(op, k_cache, v_cache, k_new, v_new, k_lens, block_table) -> None:
    """Everything but the values of k_lens and block_table."""
    B, _ = _check_cache(op, k_cache, v_cache, k_lens, block_table)
    check_tensor(op, "k_new", k_new)
    check_tensor(op, "v_new", v_new)
    if k_new.dim() != 4:
        raise ValueError(f"{op}: k_new must be (B, Hkv, Tn, D), got {tuple(k_new.shape)}")
    Hkv, Tn = k_cache.size(1), k_new.size(2)
    check_shape(op, "k_new", "B, Hkv, Tn, D", k_new, (B, Hkv, Tn, k_cache.size(3)))
    check_shape(op, "v_new", "B, Hkv, Tn, Dv", v_new, (B, Hkv, Tn, v_cache.size(3)))
    check_like(op, "k_new", k_new, k_cache, "k_cache")
    check_like(op, "v_new", v_new, v_cache, "v_cache")
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if any(s == 0 and n > 1 for n, s in zip(cache.shape, cache.stride(), strict=True)):
            raise ValueError(
                f"{op}: {name} must not be expanded, for it is written to, got the strides "
                f"{tuple(cache.stride())} of {tuple(cache.shape)}"
            )


def _check_lens(op: str, lens: list[int], places: int, new: int = 0) -> None:
    for b, n in enumerate(lens):
        if n < 0 or n + new > places:
            more = f" + {new} new" if new else ""
            raise ValueError(
                f"{op}: k_lens[{b}]{more} must be within the {places} places of the cache, "
                f"got {n}{more and f' + {new}'}"
            )


def _check_pages(op: str, block_table: Tensor, pages: int, b: int, first: int, end: int) -> None:
    """The entries first to end of row b of the table."""
    for n, page in enumerate(block_table[b, first:end].tolist(), first):
        if not 0 <= page < pages:
            raise ValueError(
                f"{op}: block_table[{b}, {n}] must be one of the {pages} pages of the pool, "
                f"got {page}"
            )


def check_places(op: str, k_cache: Tensor, k_lens: Tensor, block_table, new: int) -> None:
    """The places to be written exist, and no page would be written for two sequences."""
    lens, page = k_lens.tolist(), k_cache.size(2)
    _check_lens(op, lens, page if block_table is None else page * block_table.size(1), new)
    if block_table is None or new == 0:
        return
    owner: dict[int, tuple[int, int]] = {}
    for b, n in enumerate(lens):
        first, end = n // page, -(-(n + new) // page)
        _check_pages(op, block_table, k_cache.size(0), b, first, end)
        for entry, number in enumerate(block_table[b, first:end].tolist(), first):
            if number in owner:
                other = ", ".join(map(str, owner[number]))
                raise ValueError(
                    f"{op}: block_table must not give one page to two places that are written, "
                    f"got page {number} at [{other}] and [{b}, {entry}]"
                )
            owner[number] = b, entry


def checked_lens(op: str, k_cache: Tensor, k_lens: Tensor, block_table: Tensor | None):
    lens, page = k_lens.tolist(), k_cache.size(2)
    _check_lens(op, lens, page if block_table is None else page * block_table.size(1))
    if block_table is not None:
        for b, n in enumerate(lens):
            _check_pages(op, block_table, k_cache.size(0), b, 0, -(-n // page))
    return lens
