"""What the decode launchers do before a launch: launch choices, the checks of the arguments, and
the form in which the kernels take them."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .attention_arguments import DTYPES, MAX_HEAD_DIM, MAX_LENGTH, check_one_of, refuse
from .tile import View

MAX_SPLITS = 128


# ---- launch choices -----------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Rows and keys of a tile, and how it is run."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Level:
    """Keys of a tile, warps and stages for rows of keys up to `row_bytes` long."""

    row_bytes: int
    block_n: int
    num_warps: int
    num_stages: int


# A tile of keys and one of values are 16 KB each, two pairs of them under way: more than a
# multiprocessor's share of the bandwidth times the latency of memory (4.8 TB/s * 0.7 us / 132 =
# 25 KB), and within the 99 KB of shared memory that a block may have on every device from sm_80.
# Eight warps, or one pair less under way, where four or two would leave registers spilled.
LEVELS = (
    Level(128, 128, 4, 3),
    Level(256, 64, 4, 3),
    Level(512, 32, 8, 3),
    Level(1024, 16, 8, 2),
)
# Products of fp32 are sums of single multiplications, which want more registers.
LEVELS_FP32 = (
    Level(128, 128, 8, 3),
    Level(256, 64, 8, 3),
    Level(512, 32, 8, 3),
    Level(1024, 16, 4, 2),
    # 32 KB a tile, for a product takes no fewer than 16 keys; 64 bytes of registers spill.
    Level(2048, 16, 8, 2),
)
# Blocks whose shared memory fits a multiprocessor side by side.
RESIDENT = 2


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least n > 0."""
    return 1 << (n - 1).bit_length()


def choose(
    row_bytes: int, rows: int, *, fp32: bool, paged: bool, aligned: bool, amd: bool
) -> Config:
    """How a call is run.

    Args:
        row_bytes: of the wider of a key and a value, each padded to its block.
        rows: queries times the heads that share a key head.
        fp32: the dtype. paged: whether the cache is. amd: for a GPU of AMD.
        aligned: whether keys and values start at multiples of 16 bytes.
    """
    levels = LEVELS_FP32 if fp32 else LEVELS
    level = next(level for level in levels if row_bytes <= level.row_bytes)
    block_n, stages = level.block_n, level.num_stages
    # A tile of all rows reads the cache once; 64 rows spill registers on sm_80 and sm_100.
    most_rows = 16 if fp32 else 32
    if not aligned:
        # Elements are loaded one by one, each with an address of its own in registers.
        block_n, most_rows = min(block_n, 32), 16
    if amd:
        # 64 KB of shared memory a block.
        stages = 1 if row_bytes > 1024 else 2
    elif paged:
        # Page numbers are loaded ahead of what lies in the pages, which takes as many stages. Of
        # 128 keys they are not, and everything else is ahead by more than fits.
        block_n, stages = min(block_n, 64), 2 * stages - 1
    block_m = min(max(16, power_of_2(rows)), most_rows)
    return Config(block_m, block_n, level.num_warps, stages)


# Costs in units of the time that a program needs for one tile of keys: to start, to write the
# result of a part, to launch the second kernel, to combine one more part there. Estimates, not
# measured. What gains less than GAIN is not worth the memory of more parts.
START, WRITE, LAUNCH, COMBINE = 2, 0.5, 4, 1 / 16
GAIN = 1.05


def choose_splits(programs: int, tiles: int, slots: int) -> int:
    """Into how many parts the keys are split: the fewest that take little more than least time.

    Args:
        programs: that the grid has without splitting.
        tiles: of keys that a program runs over when the cache is full.
        slots: programs that the device runs at a time.
    """

    def cost(splits: int) -> float:
        waves = -(-programs * splits // slots)
        each = START + -(-tiles // splits)
        if splits == 1:
            return waves * each
        return waves * (each + WRITE) + LAUNCH + COMBINE * splits

    costs = {splits: cost(splits) for splits in range(1, min(max(tiles, 1), MAX_SPLITS) + 1)}
    least = min(costs.values())
    return next(splits for splits, time in costs.items() if time <= GAIN * least)


def slots(t: Tensor) -> int:
    """Programs that the tensor's device runs at a time."""
    # The interpreter runs one program after the other, so that parts gain nothing.
    if t.device.type != "cuda":
        return 1
    return RESIDENT * torch.cuda.get_device_properties(t.device).multi_processor_count


# ---- what the kernels take ------------------------------------------------------------------


def cache_arguments(k_cache: Tensor, v_cache: Tensor, block_table: Tensor | None) -> dict[str, Any]:
    """A cache as the kernels take it."""
    table_b, table_t = (0, 0) if block_table is None else block_table.stride()
    return {
        "k": view(k_cache),
        "v": view(v_cache),
        "table": block_table,
        "table_b": table_b,
        "table_t": table_t,
        "pages": k_cache.size(0),
        "PAGE": 0 if block_table is None else k_cache.size(2),
    }


def view(t: Tensor) -> View:
    return View(t, *t.stride())


def common_width(*caches: Tensor) -> int:
    """Elements in 16 bytes where all keys and values start at multiples of that, else 1."""
    wide = 16 // caches[0].element_size()
    strides = [stride for t in caches for stride in t.stride()[:3]]
    return wide if all(stride % wide == 0 for stride in strides) else 1


def needs_int64(*caches: Tensor) -> bool:
    """Whether an offset within one head of one sequence can pass 31 bits."""
    far = [(t.size(2) + 128) * t.stride(2) + MAX_HEAD_DIM * t.stride(3) for t in caches]
    return max(far) >= 2**31


# ---- checks -------------------------------------------------------------------------------


def check_tensor(op: str, name: str, t: Tensor, like: Tensor) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{op}: {name} must be a Tensor, got {type(t).__name__}")
    if t.dim() != 4:
        refuse(op, name, "of 4 dimensions", tuple(t.shape))
    if t.dtype not in DTYPES:
        refuse(op, name, "fp16, bf16 or fp32 (the reference serves fp64)", t.dtype)
    if t.dtype != like.dtype or t.device != like.device:
        refuse(op, name, f"{like.dtype} on {like.device}", f"{t.dtype} on {t.device}")


def check_cache(op, k_cache, v_cache, k_lens, block_table) -> tuple[int, int]:
    """Returns the batch size and the number of places of each sequence."""
    for name, t in (("k_cache", k_cache), ("v_cache", v_cache)):
        check_tensor(op, name, t, k_cache)
        if tuple(t.shape[:3]) != tuple(k_cache.shape[:3]):
            refuse(op, name, f"of the sizes {tuple(k_cache.shape[:3])} of k_cache", tuple(t.shape))
        if not 1 <= t.size(3) <= MAX_HEAD_DIM or not t.size(1):
            refuse(op, name, f"of heads of 1 to {MAX_HEAD_DIM} elements", tuple(t.shape))
    B, _, page, _ = k_cache.shape
    places = page
    if block_table is not None:
        if not isinstance(block_table, Tensor):
            raise TypeError(f"{op}: block_table must be a Tensor, got {type(block_table).__name__}")
        if block_table.dim() != 2 or not page:
            refuse(
                op, "block_table", "(B, N), for pages that hold a place", tuple(block_table.shape)
            )
        if not k_cache.size(0) and block_table.size(1):
            refuse(op, "k_cache", "a pool that has the pages of block_table", tuple(k_cache.shape))
        shape = tuple(block_table.shape)
        check_one_of(op, "block_table", block_table, k_cache, [shape], [torch.int32])
        B, places = block_table.size(0), block_table.size(1) * page
    if places >= MAX_LENGTH:
        refuse(op, "k_cache", f"of fewer than {MAX_LENGTH} places", places)
    check_one_of(op, "k_lens", k_lens, k_cache, [(B,)], [torch.int32])
    return B, places


def check_queries(op, q, k_cache, B, alibi_slopes, sinks) -> None:
    check_tensor(op, "q", q, k_cache)
    Hkv, D, H = k_cache.size(1), k_cache.size(3), q.size(1)
    if q.size(0) != B or q.size(3) != D or H % Hkv or not H:
        refuse(op, "q", f"({B}, a multiple of {Hkv}, Tq, {D}) by the cache", tuple(q.shape))
    if H // Hkv * q.size(2) >= MAX_LENGTH:
        refuse(op, "q", f"of fewer than {MAX_LENGTH} rows for a key head", tuple(q.shape))
    if alibi_slopes is not None:
        shapes = [(H,), (B, H)]
        check_one_of(op, "alibi_slopes", alibi_slopes, q, shapes, [torch.float32])
    if sinks is not None:
        check_one_of(op, "sinks", sinks, q, [(H,)], [q.dtype, torch.float32])


def check_rule(op, causal, window_left, window_right, softcap, scale, splits):
    """Returns the window with causal folded in, None where unbounded."""
    if causal not in (None, "top_left", "bottom_right"):
        refuse(op, "causal", "None, 'top_left' or 'bottom_right'", repr(causal))
    if not 0 <= softcap < math.inf:
        refuse(op, "softcap", "a finite number, positive or 0 for none", softcap)
    if not math.isfinite(scale):
        refuse(op, "scale", "finite", scale)
    if not 0 <= splits <= MAX_SPLITS:
        refuse(op, "splits", f"from 1 to {MAX_SPLITS}, or 0 for a choice", splits)
    if causal is not None:
        window_right = 0
    # A bound that no cache reaches is none, and does not overflow when a position is added.
    left, right = (None if not 0 <= w < MAX_LENGTH else w for w in (window_left, window_right))
    return left, right
