"""Batches of symbols for the recurrent models: their check, packing and first vectors."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence


def check_sequences(x: Tensor, lengths: Tensor, what: str = "lengths") -> None:
    """Raises ValueError unless every row of a batch holds a sequence.

    Args:
        x: (B, T) symbols; what stands past a row's length is not read.
        lengths: (B,) integers.
        what: the name of `lengths` in the message.
    """
    if x.dim() != 2 or not x.size(0) or lengths.shape != x.shape[:1]:
        raise ValueError(
            f"expected symbols (B, T) and {what} (B,), B >= 1, "
            f"got {tuple(x.shape)} and {tuple(lengths.shape)}"
        )
    shortest, longest = int(lengths.min()), int(lengths.max())
    if shortest < 1 or longest > x.size(1):
        raise ValueError(f"{what} must be in 1 .. {x.size(1)}, got {shortest} .. {longest}")


def pack_symbols(x: Tensor, lengths: Tensor, what: str = "lengths") -> PackedSequence:
    """The real symbols of a batch (B, T) alone, so that nothing is computed of padding.

    Raises:
        ValueError: as `check_sequences`.
    """
    check_sequences(x, lengths, what)
    return pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)


def padding_of(lengths: Tensor, T: int) -> Tensor:
    """(B, T), True past the end of a row."""
    return torch.arange(T, device=lengths.device) >= lengths[:, None]


def small_embedding(symbols: int, size: int, pad: int) -> nn.Embedding:
    """An embedding that starts normal with a deviation of 0.1, and zero for `pad`.

    At nn.Embedding's own deviation of 1 the vector of a word that is seen once or twice stays what
    was drawn for it, and a classifier learns that draw by heart.
    """
    embedding = nn.Embedding(symbols, size, padding_idx=pad)
    with torch.no_grad():
        embedding.weight.mul_(0.1)
    return embedding
