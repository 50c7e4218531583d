"""Attention over a key-value cache: schemas, kernels, checks, and the public function.

The definition, `seqkern.reference.decode`, serves every device; Triton kernels override it for
CUDA. On the CPU PyTorch's own kernel takes what it can express, on the keys that are there.
"""

import math
from importlib import import_module

import torch
from torch import Tensor

from seqkern.ops._attention_checks import as_slopes, int32, number, positive, sides
from seqkern.ops._attention_ops import MAX_HEAD, refusal
from seqkern.ops._checks import autocast_dtype, check_tensor
from seqkern.ops._decode_checks import (
    MAX_SPLITS,
    check_append,
    check_decode,
    check_no_gradient,
    check_places,
    checked_lens,
)
from seqkern.ops.choice import HAS_TRITON, Choice
from seqkern.reference import decode as reference
from seqkern.reference.attention import within

_LIB = torch.library.Library("seqkern", "FRAGMENT")
_LIB.define(
    "attention_decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor k_lens,"
    " Tensor? block_table, Tensor? alibi_slopes, Tensor? sinks, str? causal, int window_left,"
    " int window_right, float softcap, float scale, int splits)"
    " -> (Tensor o, Tensor lse)"
)
_LIB.define(
    "cache_append(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k_new, Tensor v_new,"
    " Tensor k_lens, Tensor? block_table) -> ()"
)


def choose(args: tuple) -> Choice:
    """The kernel that computes a call of seqkern::attention_decode.

    Args:
        args: of the op, in order; no value of a tensor is looked at.

    Returns:
        "triton", "torch" (PyTorch's own kernel for the CPU) or "reference", and why.
    """
    q, k_cache, v_cache, _, _, _, sinks, _, _, _, softcap, *_ = args
    if q.device.type == "cpu":
        if sinks is not None:
            return Choice("reference", "PyTorch's kernel has no sinks")
        if softcap > 0:
            return Choice("reference", "PyTorch's kernel has no softcap")
        if k_cache.size(3) != v_cache.size(3):
            return Choice("reference", "PyTorch's kernel wants one head size for q, k and v")
        return Choice("torch", "PyTorch's own kernel means the same on the keys that are there")
    return _choose_by_cache(k_cache, v_cache)


def _choose_by_cache(k_cache: Tensor, v_cache: Tensor) -> Choice:
    if reason := refusal(k_cache):
        return Choice("reference", reason)
    if max(k_cache.size(3), v_cache.size(3)) > MAX_HEAD:
        return Choice("reference", f"a head over {MAX_HEAD} does not fit a block's memory")
    return Choice("triton", "seqkern's own kernels serve every feature on this device")


# ---- kernels for every device -------------------------------------------------------------


def _attention_decode(*args):
    _check_all(*args)
    return reference.attention_decode(*args)


def _check_all(q, k_cache, v_cache, k_lens, block_table, alibi_slopes, sinks, *rule) -> None:
    op = "attention_decode"
    inputs = {"q": q, "k_cache": k_cache, "v_cache": v_cache}
    check_decode(op, q, k_cache, v_cache, k_lens, block_table, alibi_slopes, sinks, *rule)
    check_no_gradient(op, inputs | {"alibi_slopes": alibi_slopes, "sinks": sinks})


def _cache_append(*args):
    _check_append(*args)
    reference.cache_append(*args)


def _check_append(k_cache, v_cache, k_new, v_new, k_lens, block_table) -> None:
    op = "cache_append"
    inputs = {"k_cache": k_cache, "v_cache": v_cache, "k_new": k_new, "v_new": v_new}
    check_no_gradient(op, inputs)
    check_append(op, k_cache, v_cache, k_new, v_new, k_lens, block_table)
    if k_cache.device.type == "cpu":
        check_places(op, k_cache, k_lens, block_table, k_new.size(2))


_LIB.impl("attention_decode", _attention_decode, "CompositeExplicitAutograd")
_LIB.impl("cache_append", _cache_append, "CompositeExplicitAutograd")


# ---- the CPU ------------------------------------------------------------------------------

_pytorch = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


def _cpu(q, k_cache, v_cache, k_lens, block_table, *extras):
    _check_all(q, k_cache, v_cache, k_lens, block_table, *extras)
    lens, page = checked_lens("attention_decode", k_cache, k_lens, block_table), k_cache.size(2)
    if choose((q, k_cache, v_cache, k_lens, block_table, *extras)).kernel == "torch":
        alibi_slopes, _, causal, left, right, _, scale, _ = extras
        rule = alibi_slopes, causal, left, right, scale
        return _by_pytorch(q, k_cache, v_cache, lens, block_table, *rule)
    # Places that no sequence has reached are left out; positions do not depend on them.
    top = max(lens, default=0)
    if block_table is None:
        k_cache, v_cache = k_cache[:, :, :top], v_cache[:, :, :top]
    else:
        block_table = block_table[:, : -(-top // page)]
    return reference.attention_decode(q, k_cache, v_cache, k_lens, block_table, *extras)


def _by_pytorch(
    q, k_cache, v_cache, lens, block_table, alibi_slopes, causal, window_left, window_right, scale
):
    """PyTorch's kernel on the keys that some query sees, sequence by sequence."""
    B, _, Tq, _ = q.shape
    o, lse = q.new_zeros(q.shape), _new_lse(q).fill_(-math.inf)
    alike = block_table is None and len(set(lens)) == 1
    for rows in [slice(B)] if alike else [slice(b, b + 1) for b in range(B)]:
        n = lens[rows.start or 0]
        first = 0 if causal == "top_left" else n - Tq
        begin = max(first - window_left, 0) if window_left >= 0 else 0
        end = n if causal is None else min(first + Tq, n)
        end = end if window_right < 0 else min(first + Tq + window_right, end)
        # The kernel divides by these sizes, which ends the process where one is 0.
        if begin >= end or not q.numel():
            continue
        if block_table is None:
            k, v = k_cache[rows, :, begin:end], v_cache[rows, :, begin:end]
        else:
            page = k_cache.size(2)
            table = block_table[rows, begin // page : -(-end // page)]
            within = slice(begin % page, end - begin // page * page)
            k, v = (reference.gather_pages(t, table)[:, :, within] for t in (k_cache, v_cache))
        p = torch.arange(first, first + Tq)[:, None]
        j = torch.arange(begin, end)
        live = _live(p, j, causal, window_left, window_right)
        bias = _bias(p, j, live, alibi_slopes, rows, lse.dtype)
        o[rows], found = _packed(q[rows], k, v, bias, scale)
        # The kernel gives 0 for a row from which everything is excluded.
        lse[rows] = found if live is None else found.masked_fill(~live.any(-1), -math.inf)
    return o, lse


def _live(p: Tensor, j: Tensor, causal, window_left: int, window_right: int) -> Tensor | None:
    """Which keys j a query at position p sees, (Tq, keys); None for all of them."""
    if p.size(0) == 1:
        return None
    parts = within(p, j, causal, window_left, window_right)
    return torch.stack(parts).all(0) if parts else None


def _bias(p, j, live, alibi_slopes, rows: slice, dtype: torch.dtype) -> Tensor | None:
    """ALiBi, and -inf for what is excluded: None, (1, 1, Tq, keys) or (B, H, Tq, keys)."""
    if live is None and alibi_slopes is None:
        return None
    bias = torch.zeros(1, 1, p.size(0), j.size(0), dtype=dtype)
    if alibi_slopes is not None:
        slopes = alibi_slopes[rows] if alibi_slopes.dim() == 2 else alibi_slopes[None]
        bias = -slopes.to(dtype)[:, :, None, None] * (p - j).abs()
    return bias if live is None else bias.masked_fill(~live, -math.inf)


def _packed(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float):
    """The query heads of one key head become rows of one product, which reads the keys once."""
    B, H, Tq, D = q.shape
    Hkv, groups = k.size(1), H // k.size(1)
    if bias is not None and bias.size(1) == H:
        bias = bias.reshape(bias.size(0), Hkv, groups * Tq, -1)
    elif bias is not None:
        bias = bias.repeat(1, 1, groups, 1)
    # The kernel takes the elements of a head to lie side by side, whatever the strides say.
    k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (k, v))
    rows = q.reshape(B, Hkv, groups * Tq, D).contiguous()
    o, lse = _pytorch(rows, k, v, 0.0, False, attn_mask=bias, scale=scale)
    return o.reshape(B, H, Tq, D), lse.reshape(B, H, Tq)


_LIB.impl("attention_decode", _cpu, "CPU")


# ---- CUDA ---------------------------------------------------------------------------------


def _cuda(*args):
    if choose(args).kernel == "reference":
        return _attention_decode(*args)
    _check_all(*args)
    # By its name, and only here: importing seqkern must not need Triton.
    return import_module("seqkern.kernels.attention_decode").attention_decode(*args)


def _cuda_append(*args):
    if _choose_by_cache(*args[:2]).kernel == "reference":
        return _cache_append(*args)
    _check_append(*args)
    return import_module("seqkern.kernels.attention_decode").cache_append(*args)


# Without Triton the reference stays.
if HAS_TRITON:
    _LIB.impl("attention_decode", _cuda, "CUDA")
    _LIB.impl("cache_append", _cuda_append, "CUDA")


# ---- shape functions ----------------------------------------------------------------------


def _new_lse(q: Tensor) -> Tensor:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape[:3], dtype=dtype)


@torch.library.register_fake("seqkern::attention_decode", lib=_LIB)
def _attention_decode_fake(q, k_cache, v_cache, k_lens, block_table, *extras):
    check_decode("attention_decode", q, k_cache, v_cache, k_lens, block_table, *extras)
    return q.new_empty(*q.shape[:3], v_cache.size(3)), _new_lse(q)


@torch.library.register_fake("seqkern::cache_append", lib=_LIB)
def _cache_append_fake(k_cache, v_cache, k_new, v_new, k_lens, block_table):
    check_append("cache_append", k_cache, v_cache, k_new, v_new, k_lens, block_table)


# ---- the public function ------------------------------------------------------------------

_decode_op = torch.ops.seqkern.attention_decode.default
_append_op = torch.ops.seqkern.cache_append.default


def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    k_lens: Tensor,
    k_new: Tensor | None = None,
    v_new: Tensor | None = None,
    block_table: Tensor | None = None,
    causal: str | None = "bottom_right",
    window: tuple[int | None, int | None] | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    splits: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of a few new queries over a cache of keys and values, as generation needs it.

    New keys and values, where given, are first written into the cache, in place, behind those
    that are there; then the queries attend to all of them. On a GPU the keys of each sequence
    are divided among blocks whose partial results are combined by their log-sum-exp, after
    Flash-Decoding (Dao, Haziza, Massa and Sizov 2023), and the cache may lie in pages, after
    PagedAttention (Kwon et al. 2023). Lengths and tables are read on the device: nothing waits
    for the GPU, and a CUDA graph may be captured once and replayed while the cache grows.

    Args:
        q: (B, H, Tq, D), fp32, fp16, bf16 or fp64, any strides.
        k_cache: (B, Hkv, T, D) in q's dtype, H a multiple of Hkv; query head h reads head
            h // (H // Hkv). With `block_table` (P, Hkv, page, D), a pool of P pages of any size.
        v_cache: (B, Hkv, T, Dv), or (P, Hkv, page, Dv).
        k_lens: (B,) int32 or int64, the keys in the cache before the call, from 0 to T - Tn.
            It is not changed: add Tn to it for the next call.
        k_new, v_new: (B, Hkv, Tn, D) and (B, Hkv, Tn, Dv), both or neither; entry t of
            sequence b is written to place k_lens[b] + t.
        block_table: (B, N) int32: place t of sequence b is place t % page of page
            block_table[b, t // page]; T = N page. Entries beyond the length are not read, and
            sequences may share pages that the call does not write to.
        causal: "bottom_right" puts the last query at the last key; "top_left" the first query
            at the first key; None lets every query see every key.
        window: (left, right), the number of keys seen on either side of a query's position,
            None for all.
        alibi_slopes: (H,) or (B, H); slope * distance is subtracted from the scores.
        softcap: scores become softcap * tanh(score / softcap).
        sinks: (H,) in q's dtype or fp32, a logit for each head that takes probability and gives
            no value.
        scale: of the scores; 1 / sqrt(D) where None.
        return_lse: return the log-sum-exp of the scores too.
        splits: into how many parts a GPU divides the keys, from 1 to 128; where None, chosen by
            the shapes. It changes the results by no more than their rounding. The CPU takes the
            keys in one part.

    Returns:
        o (B, H, Tq, Dv) in q's dtype; with return_lse also lse (B, H, Tq), fp32 (fp64 for fp64).
        A query that sees no key gives o = 0 and lse = -inf (the sink where there is one).

    Under torch.autocast q, k_new and v_new are cast to the dtype of the cache.

    On the CPU the values of k_lens and block_table are checked. On a GPU that would wait for it:
    there lengths are clamped to the cache, entries that do not fit into it are dropped, a page
    that is not in the pool reads as NaN, and of entries that go to one place any may stay;
    nothing outside of the cache is touched.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: a size, dtype, device or value does not fit, or a tensor requires a gradient,
            which there is none of through a cache.
    """
    op = "attention_decode"
    check_tensor(op, "q", q)
    check_tensor(op, "k_cache", k_cache)
    if (k_new is None) != (v_new is None):
        missing = "k_new" if k_new is None else "v_new"
        raise ValueError(f"{op}: k_new and v_new must be given together, got no {missing}")
    if k_new is not None:
        check_tensor(op, "k_new", k_new)
        check_tensor(op, "v_new", v_new)
    if autocast_dtype(q) is not None:
        q = _like(q, k_cache)
    lens, slopes = int32(op, "k_lens", k_lens), as_slopes(op, alibi_slopes, q)
    left, right = sides(op, window)
    rule = causal, left, right, positive(op, "softcap", softcap)
    if scale is not None:
        scale = number(op, "scale", scale)
    else:
        scale = q.size(-1) ** -0.5 if q.size(-1) else 1.0
    args = block_table, slopes, sinks, *rule, scale, _count(op, splits)
    _check_all(q, k_cache, v_cache, lens, *args)
    if k_new is not None and v_new is not None:
        if autocast_dtype(q) is not None:
            k_new, v_new = _like(k_new, k_cache), _like(v_new, v_cache)
        check_no_gradient(op, {"k_new": k_new, "v_new": v_new})
        check_append(op, k_cache, v_cache, k_new, v_new, lens, block_table)
        _append_op(k_cache, v_cache, k_new, v_new, lens, block_table)
        lens = lens + k_new.size(2)
    o, lse = _decode_op(q, k_cache, v_cache, lens, *args)
    return (o, lse) if return_lse else o


def _like(t: Tensor, cache: Tensor) -> Tensor:
    """t in the dtype of the cache, but whole numbers as they are, for the checks to refuse."""
    return t.to(cache.dtype) if t.is_floating_point() else t


def _count(op: str, splits: int | None) -> int:
    if splits is None:
        return 0
    if isinstance(splits, bool) or not isinstance(splits, int):
        raise TypeError(f"{op}: splits must be a whole number or None, got {splits!r}")
    if splits < 1:
        raise ValueError(f"{op}: splits must be from 1 to {MAX_SPLITS}, got {splits}")
    return splits
