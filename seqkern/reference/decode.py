"""Attention over a key-value cache in plain PyTorch: appending to the cache, then attending.

A cache holds T places for each sequence, either in one piece, (B, Hkv, T, D), or in pages
(Kwon et al. 2023, "Efficient Memory Management for Large Language Model Serving with
PagedAttention"): a pool (P, Hkv, page, D) and a table (B, N) of page numbers, where place t of
sequence b is place t % page of page table[b, t // page], and T = N page.

The attention is that of `seqkern.reference.attention` with the lengths of the cache as k_lens.
What lies at and beyond a sequence's length is never read, nor are the pages that hold it.
"""

import torch
from torch import Tensor

from seqkern.reference.attention import attention


def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_lens: Tensor,
    block_table: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    causal: str | None,
    window_left: int,
    window_right: int,
    softcap: float,
    scale: float,
    splits: int,
) -> tuple[Tensor, Tensor]:
    """Attention of q (B, H, Tq, D) over the first k_lens[b] places of a cache.

    Args:
        k_cache, v_cache: (B, Hkv, T, D) and (B, Hkv, T, Dv); with block_table
            (P, Hkv, page, D) and (P, Hkv, page, Dv).
        k_lens: (B,), clamped to [0, T].
        block_table: (B, N) page numbers; a page that is not in the pool reads as NaN.
        alibi_slopes, sinks, causal, window_left, window_right, softcap, scale: see
            `seqkern.reference.attention.attention`.
        splits: without meaning here: the keys are taken in one piece.

    Returns:
        o (B, H, Tq, Dv) in q's dtype, lse (B, H, Tq) in fp32 (fp64 for fp64).
    """
    if block_table is not None:
        k_cache, v_cache = gather_pages(k_cache, block_table), gather_pages(v_cache, block_table)
    rule = causal, window_left, window_right, softcap, 0.0, scale, q.size(2), k_cache.size(2), True
    absent = None, None, None
    return attention(
        q, k_cache, v_cache, *absent, k_lens, alibi_slopes, sinks, *absent, *rule
    )  # fmt: skip


def gather_pages(cache: Tensor, block_table: Tensor) -> Tensor:
    """The pool (P, Hkv, page, D) as the table (B, N) orders it, (B, Hkv, N page, D)."""
    pages, heads, page, width = cache.shape
    B, N = block_table.shape
    if pages == 0:
        return cache.new_full((B, heads, N * page, width), torch.nan)
    absent = (block_table < 0) | (block_table >= pages)
    found = cache[block_table.clamp(0, pages - 1).long()]
    found = found.masked_fill(absent[:, :, None, None, None], torch.nan)
    return found.transpose(1, 2).reshape(B, heads, N * page, width)


def cache_append(
    k_cache: Tensor,
    v_cache: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    k_lens: Tensor,
    block_table: Tensor | None,
) -> None:
    """Writes k_new (B, Hkv, Tn, D) and v_new (B, Hkv, Tn, Dv) into the cache, in place.

    Entry t of sequence b goes to place k_lens[b] + t. What falls outside the cache, or into a
    page that is not in the pool, is dropped.
    """
    place = k_lens[:, None].long() + torch.arange(k_new.size(2), device=k_lens.device)
    if block_table is None:
        inside = (place >= 0) & (place < k_cache.size(2))
        b, t = inside.nonzero(as_tuple=True)
        row, slot = b, place[b, t]
    else:
        page = k_cache.size(2)
        inside = (place >= 0) & (place < block_table.size(1) * page)
        b, t = inside.nonzero(as_tuple=True)
        row, slot = block_table[b, place[b, t] // page].long(), place[b, t] % page
        known = (row >= 0) & (row < k_cache.size(0))
        b, t, row, slot = b[known], t[known], row[known], slot[known]
    for cache, new in ((k_cache, k_new), (v_cache, v_new)):
        cache[row, :, slot] = new[b, :, t]
