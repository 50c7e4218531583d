"""Encoder-decoder with a fixed vector (Sutskever, Vinyals and Le, 2014; Cho et al., 2014).

Source x_1 .. x_Tx, target y_1 .. y_Ty. All that the decoder knows of the source is the encoder's
last state, whatever the length of the source:

    h_j = f(E x_j, h_{j-1})                                    the encoder
    v   = h_Tx                                                 a vector of fixed size
    s_0 = v,   s_i = f([E y_{i-1} ; c], s_{i-1})               the decoder
    p(y_i | y_<i, x) = softmax(W_o [s_i ; E y_{i-1} ; c])

Two settings are in the literature. Sutskever et al.: f an LSTM of several layers, no c: the vector
is only the decoder's first state (their section 2), and the source is fed backwards, which is the
task's option `reverse`. Cho et al., with `context`: f a GRU, and c = v goes into every step of the
decoder and into its read-out (their equations 3 to 6).

Deliberate differences: with `context` the read-out is linear, where Cho et al. have a maxout
layer; the GRU is PyTorch's reset-after form.

In training all steps of the decoder are one call of the recurrent layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from seqkern.models.common import check_sizes, layers_named
from seqkern.models.sequences import pack_symbols

CELLS = ("lstm", "gru")


@dataclass(frozen=True)
class Seq2SeqConfig:
    """Sizes of the model; `source_symbols` and `target_symbols` count the special symbols too."""

    source_symbols: int
    target_symbols: int
    cell: str = "lstm"
    embedding: int = 256
    hidden: int = 512
    depth: int = 2
    context: bool = False
    dropout: float = 0.0
    pad: int = 0

    def __post_init__(self) -> None:
        if self.cell not in CELLS:
            raise ValueError(f"cell must be one of {CELLS}, got {self.cell!r}")
        check_sizes(self, shares=("dropout",))


class Vector(NamedTuple):
    """What the decoder knows of a source: v (B, H), and the source's padded length Tx."""

    v: Tensor
    Tx: int


class Step(NamedTuple):
    """One decoder step: log p(y_i) (B, K, V), the state, and no alignment: zeros (B, K, Tx)."""

    log_p: Tensor
    s: tuple[Tensor, ...]
    alignment: Tensor


class Seq2Seq(nn.Module):
    """The model of the module docstring.

    Args:
        config: sizes.
        layers: "seqkern" or "torch", where encoder and decoder come from. Parameters have the
            same names and, under the same seed, the same values in both.
    """

    aligns = False  # a vector of fixed size has no places to look at

    def __init__(self, config: Seq2SeqConfig, layers: str = "seqkern") -> None:
        super().__init__()
        self.config, self.layers = config, layers
        rnn = getattr(layers_named(layers), config.cell.upper())
        D, H, c = config.embedding, config.hidden, config.hidden if config.context else 0
        between = config.dropout if config.depth > 1 else 0.0
        self.embed_x = nn.Embedding(config.source_symbols, D, padding_idx=config.pad)
        self.embed_y = nn.Embedding(config.target_symbols, D, padding_idx=config.pad)
        self.encoder = rnn(D, H, config.depth, dropout=between)
        self.decoder = rnn(D + c, H, config.depth, dropout=between, batch_first=True)
        self.output = nn.Linear(H + D + c if config.context else H, config.target_symbols)
        self.dropout = nn.Dropout(config.dropout)

    def encode(self, x: Tensor, lengths: Tensor) -> tuple[Vector, tuple[Tensor, ...]]:
        """x (B, Tx) symbols, lengths (B,) in 1 .. Tx.

        Returns the vector and s_0: (B, depth, H), of an LSTM with its c.

        Raises:
            ValueError: a length is outside 1 .. Tx.
        """
        symbols = pack_symbols(x, lengths)
        _, last = self.encoder(symbols._replace(data=self.dropout(self.embed_x(symbols.data))))
        last = last if isinstance(last, tuple) else (last,)
        return Vector(last[0][-1], x.size(1)), tuple(state.transpose(0, 1) for state in last)

    def forward(self, x: Tensor, lengths: Tensor, y_previous: Tensor) -> Tensor:
        """Teacher forcing. x (B, Tx), lengths (B,), y_previous (B, Ty) = y_0 .. y_{Ty-1}.

        Returns the unnormalised scores of y_1 .. y_Ty, (B, Ty, V).
        """
        vector, s_0 = self.encode(x, lengths)
        return self._decode(self.dropout(self.embed_y(y_previous)), vector.v, s_0)[0]

    def step(self, y: Tensor, s: tuple[Tensor, ...], memory: Vector) -> Step:
        """One step of decoding: y (B, K) = y_{i-1}, s of (B, K, depth, H), K hypotheses each."""
        B, K = y.shape
        v = memory.v.repeat_interleave(K, 0)
        flat = tuple(state.flatten(0, 1) for state in s)
        scores, after = self._decode(self.embed_y(y.reshape(B * K, 1)), v, flat)
        log_p = scores.view(B, K, -1).log_softmax(-1)
        s = tuple(state.unflatten(0, (B, K)) for state in after)
        return Step(log_p, s, log_p.new_zeros(B, K, memory.Tx))

    def _decode(
        self, e_y: Tensor, v: Tensor, s: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """e_y (N, T, D), v (N, H), s of (N, depth, H): scores (N, T, V) and the last state."""
        c = [v.unsqueeze(1).expand(-1, e_y.size(1), -1)] if self.config.context else []
        first = tuple(state.transpose(0, 1).contiguous() for state in s)
        states, last = self.decoder(
            torch.cat([e_y, *c], -1), first if self.config.cell == "lstm" else first[0]
        )
        last = last if isinstance(last, tuple) else (last,)
        read = [states, e_y, *c] if self.config.context else [states]
        scores = self.output(self.dropout(torch.cat(read, -1)))
        return scores, tuple(state.transpose(0, 1) for state in last)
