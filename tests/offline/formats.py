"""Number formats that numpy lacks: bfloat16 as its 16 bits, tf32 as rounded float32."""

import numpy as np

BF16_NAN = 0x7FC0


def _round_bits(bits: np.ndarray, dropped: int) -> np.ndarray:
    """Adds what makes cutting off the low `dropped` bits round to nearest, ties to even."""
    last_kept = (bits >> np.uint32(dropped)) & np.uint32(1)
    return bits + np.uint32((1 << (dropped - 1)) - 1) + last_kept


def bf16_to_float32(bits: np.ndarray) -> np.ndarray:
    """The values of bfloat16 numbers that are stored as uint16."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def float_to_bf16(values: np.ndarray) -> np.ndarray:
    """The bfloat16 bits nearest to the values, ties to even; every NaN becomes the quiet one."""
    single = np.ascontiguousarray(values, dtype=np.float32)
    bits = (_round_bits(single.view(np.uint32), 16) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(single), np.uint16(BF16_NAN), bits)


def round_to_tf32(values: np.ndarray) -> np.ndarray:
    """float32 values with the 10 bits of fraction that a tf32 product keeps."""
    single = np.ascontiguousarray(values, dtype=np.float32)
    rounded = (_round_bits(single.view(np.uint32), 13) & np.uint32(0xFFFFE000)).view(np.float32)
    return np.where(np.isfinite(single), rounded, single)
