"""The Transformer (Vaswani et al., Attention Is All You Need, 2017), an encoder-decoder.

Source x_1 .. x_Tx, target y_1 .. y_Ty. In the paper's letters and with its numbers:

    Attention(Q, K, V) = softmax(Q K^T / sqrt(d_k)) V                                      (1)
    MultiHead(Q, K, V) = Concat(head_1 .. head_h) W^O,  head_i = Attention(Q W_i^Q, ...)  (3.2.2)
    FFN(x) = max(0, x W_1 + b_1) W_2 + b_2                                                 (2)
    PE(pos, 2i) = sin(pos / 10000^(2i/d)),  PE(pos, 2i+1) = cos(the same)                  (3.5)
    encoder layer:  m = LN(x + self_attn(x)),  m = LN(m + FFN(m))                          (3.1)
    decoder layer:  s = LN(y + self_attn(y)),  s = LN(s + cross_attn(s, m)),  s = LN(s + FFN(s))
    p(y_i | y_<i, x) = softmax(E_y s_i)                      output tied to E_y            (3.4)

Its three attentions do three things, and have the names of what they do:

    encoder.self_attn    each source position looks at all real source positions
    decoder.self_attn    each target position looks at itself and those before it: causal, so that
                         all steps are trained at once and written one after another
    decoder.cross_attn   each target position looks at the source, as RNNSearch's alignment does

Embeddings are multiplied by sqrt(d). Deliberate differences: `shared` ties E_x to E_y too (the
paper does), which needs one vocabulary for both sides; `norm_first` puts LN before the parts, as
in later models (Xiong et al., 2020), with one more at the end of either stack. As in most later
models W^Q, W^K, W^V and W^O have biases, and dropout is on the attention's weights and between W_1
and W_2 too; the paper has neither (3.2.2, 5.4).

In decoding the keys and values of what was written are kept, and those of the source are computed
once; the hypotheses of a beam read the same source together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqkern.models.common import check_sizes, layers_named
from seqkern.models.sequences import check_sequences, padding_of
from seqkern.ops.attention import attention
from seqkern.ops.attention_weights import attention_with_weights


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of the model: `width` is d, `ffn` the width of W_1, `depth` layers on either side."""

    source_symbols: int
    target_symbols: int
    width: int = 256
    heads: int = 8
    ffn: int = 512
    depth: int = 3
    dropout: float = 0.1
    shared: bool = False
    norm_first: bool = False
    pad: int = 0

    def __post_init__(self) -> None:
        check_sizes(self, shares=("dropout",))
        if self.width % self.heads or self.width % 2:
            raise ValueError(
                f"width must be even and a multiple of heads, got {self.width} and {self.heads}"
            )
        if self.shared and self.source_symbols != self.target_symbols:
            raise ValueError(
                "shared needs one vocabulary for both sides, "
                f"got {self.source_symbols} and {self.target_symbols} symbols"
            )


class Memory(NamedTuple):
    """What the decoder reads of a source: keys and values (B, h, Tx, d_k) for each of its layers,
    and lengths (B,) int32."""

    keys: list[Tensor]
    values: list[Tensor]
    lengths: Tensor
    Tx: int


class Step(NamedTuple):
    """One decoder step: log p(y_i) (B, K, V), the state, and the last layer's cross-attention
    (B, K, Tx), the mean over its heads."""

    log_p: Tensor
    s: tuple[tuple[Tensor, Tensor], ...]
    alignment: Tensor


class MultiHead(nn.Module):
    """MultiHead(Q, K, V); all three attentions are this, on other keys and with other masks."""

    def __init__(self, config: TransformerConfig, layers: str) -> None:
        super().__init__()
        d = config.width
        self.heads, self.p, self.layers = config.heads, config.dropout, layers
        self.w_q, self.w_k, self.w_v, self.w_o = (nn.Linear(d, d) for _ in range(4))
        for w in (self.w_q, self.w_k, self.w_v, self.w_o):
            nn.init.xavier_uniform_(w.weight)
            nn.init.zeros_(w.bias)

    def split(self, x: Tensor) -> Tensor:
        """(B, T, d) to (B, h, T, d_k)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What `forward` reads of x (B, T, d): (B, h, T, d_k) each."""
        return self.split(self.w_k(x)), self.split(self.w_v(x))

    def forward(
        self, x: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        """x (B, Tq, d) attends to k and v, of which `lengths` (B,) are real; returns (B, Tq, d)."""
        q, p = self.split(self.w_q(x)), self.p if self.training else 0.0
        if self.layers == "seqkern":
            o = attention(
                q, k, v, k_lens=lengths, causal="top_left" if causal else None, dropout_p=p
            )
        else:
            seen = None if lengths is None else ~padding_of(lengths, k.size(2))[:, None, None]
            o = F.scaled_dot_product_attention(q, k, v, seen, dropout_p=p, is_causal=causal)
        return self.w_o(o.transpose(1, 2).flatten(2))

    def with_weights(
        self, x: Tensor, k: Tensor, v: Tensor, lengths: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`forward` in eval mode, and the mean of the heads' weights (B, Tq, Tk)."""
        q, seen = self.split(self.w_q(x)), ~padding_of(lengths, k.size(2))[:, None, None]
        if self.layers == "seqkern":
            o, weights = attention_with_weights(q, k, v, mask=seen)
        else:
            scores = q @ k.mT / math.sqrt(q.size(-1))
            weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
            o = weights @ v
        return self.w_o(o.transpose(1, 2).flatten(2)), weights.mean(1)


class Residual(nn.Module):
    """LN(x + dropout(part)), or with `norm_first` x + dropout(part of LN(x))."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.norm, self.dropout = nn.LayerNorm(config.width), nn.Dropout(config.dropout)
        self.first = config.norm_first

    def enter(self, x: Tensor) -> Tensor:
        """What the part reads."""
        return self.norm(x) if self.first else x

    def leave(self, x: Tensor, part: Tensor) -> Tensor:
        """What follows the part."""
        x = x + self.dropout(part)
        return x if self.first else self.norm(x)


class FFN(nn.Module):
    """Equation (2)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.w_1 = nn.Linear(config.width, config.ffn)
        self.w_2 = nn.Linear(config.ffn, config.width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.w_2(self.dropout(torch.relu(self.w_1(x))))


class EncoderLayer(nn.Module):
    """Self-attention over the real source positions, and FFN."""

    def __init__(self, config: TransformerConfig, layers: str) -> None:
        super().__init__()
        self.self_attn, self.ffn = MultiHead(config, layers), FFN(config)
        self.after_self, self.after_ffn = Residual(config), Residual(config)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """x (B, Tx, d), lengths (B,)."""
        seen = self.after_self.enter(x)
        x = self.after_self.leave(
            x, self.self_attn(seen, *self.self_attn.keys_values(seen), lengths)
        )
        return self.after_ffn.leave(x, self.ffn(self.after_ffn.enter(x)))


class DecoderLayer(nn.Module):
    """Causal self-attention over the target, cross-attention to the source, and FFN."""

    def __init__(self, config: TransformerConfig, layers: str) -> None:
        super().__init__()
        self.self_attn, self.cross_attn = (MultiHead(config, layers) for _ in range(2))
        self.ffn = FFN(config)
        self.after_self, self.after_cross = Residual(config), Residual(config)
        self.after_ffn = Residual(config)

    def forward(self, y: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
        """All steps at once: y (B, Ty, d), the source's k and v (B, h, Tx, d_k)."""
        seen = self.after_self.enter(y)
        own = self.self_attn(seen, *self.self_attn.keys_values(seen), causal=True)
        y = self.after_self.leave(y, own)
        crossed = self.cross_attn(self.after_cross.enter(y), k, v, lengths)
        y = self.after_cross.leave(y, crossed)
        return self.after_ffn.leave(y, self.ffn(self.after_ffn.enter(y)))

    def step(
        self, y: Tensor, past: tuple[Tensor, Tensor], k: Tensor, v: Tensor, lengths: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
        """One step of K hypotheses: y (B, K, d), own keys and values so far (B, K, h, t, d_k).

        Returns the layer's output, all keys and values, and the alignment (B, K, Tx).
        """
        B, K, _ = y.shape
        seen = self.after_self.enter(y).reshape(B * K, 1, -1)
        new = (t.unflatten(0, (B, K)) for t in self.self_attn.keys_values(seen))
        own_k, own_v = (torch.cat(pair, 3) for pair in zip(past, new, strict=True))
        own = self.self_attn(seen, own_k.flatten(0, 1), own_v.flatten(0, 1))
        y = self.after_self.leave(y, own.view(B, K, -1))
        crossed, alignment = self.cross_attn.with_weights(self.after_cross.enter(y), k, v, lengths)
        y = self.after_cross.leave(y, crossed)
        y = self.after_ffn.leave(y, self.ffn(self.after_ffn.enter(y)))
        return y, (own_k, own_v), alignment


class Transformer(nn.Module):
    """The model of the module docstring.

    Args:
        config: sizes.
        layers: "seqkern" or "torch", whose attention is called. Parameters have the same names
            and, under the same seed, the same values in both.
    """

    def __init__(self, config: TransformerConfig, layers: str = "seqkern") -> None:
        super().__init__()
        layers_named(layers)
        self.config, self.layers = config, layers
        d = config.width
        self.embed_x = nn.Embedding(config.source_symbols, d, padding_idx=config.pad)
        self.embed_y = nn.Embedding(config.target_symbols, d, padding_idx=config.pad)
        if config.shared:
            self.embed_x = self.embed_y
        for embed in (self.embed_x, self.embed_y):
            nn.init.normal_(embed.weight, std=d**-0.5)
        self.encoder = nn.ModuleList(EncoderLayer(config, layers) for _ in range(config.depth))
        self.decoder = nn.ModuleList(DecoderLayer(config, layers) for _ in range(config.depth))
        ends = nn.LayerNorm if config.norm_first else nn.Identity
        self.norm_x, self.norm_y = ends(d), ends(d)
        self.dropout = nn.Dropout(config.dropout)

    def embed(self, symbols: Tensor, embedding: nn.Embedding, first: int = 0) -> Tensor:
        """sqrt(d) E w_t + PE(t) of symbols (..., T), the first of them at position `first`."""
        d = self.config.width
        positions = positions_of(first, symbols.size(-1), d, embedding.weight)
        return self.dropout(math.sqrt(d) * embedding(symbols) + positions)

    def encode(self, x: Tensor, lengths: Tensor) -> tuple[Memory, tuple]:
        """x (B, Tx) symbols, lengths (B,) in 1 .. Tx. Returns the memory and an empty state.

        Raises:
            ValueError: a length is outside 1 .. Tx.
        """
        check_sequences(x, lengths)
        lengths = lengths.to(x.device, torch.int32)
        m = self.embed(x, self.embed_x)
        for layer in self.encoder:
            m = layer(m, lengths)
        m = self.norm_x(m)
        keys, values = zip(*(layer.cross_attn.keys_values(m) for layer in self._decoder_layers()))
        # K hypotheses are one as long as nothing is written: (B, h, 0, d_k) each.
        empty = tuple((k[:, :, :0], v[:, :, :0]) for k, v in zip(keys, values, strict=True))
        return Memory(list(keys), list(values), lengths, x.size(1)), empty

    def forward(self, x: Tensor, lengths: Tensor, y_previous: Tensor) -> Tensor:
        """Teacher forcing. x (B, Tx), lengths (B,), y_previous (B, Ty) = y_0 .. y_{Ty-1}.

        Returns the unnormalised scores of y_1 .. y_Ty, (B, Ty, V).
        """
        memory, _ = self.encode(x, lengths)
        s = self.embed(y_previous, self.embed_y)
        for layer, k, v in zip(self.decoder, memory.keys, memory.values, strict=True):
            s = layer(s, k, v, memory.lengths)
        return self._scores(s)

    def step(self, y: Tensor, s: tuple[tuple[Tensor, Tensor], ...], memory: Memory) -> Step:
        """One step of decoding: y (B, K) = y_{i-1}, K hypotheses of each source, and the keys and
        values of what they wrote before."""
        first = s[0][0].size(3)
        e = self.embed(y.unsqueeze(-1), self.embed_y, first).squeeze(2)
        after, alignment = [], e
        for layer, past, k, v in zip(
            self._decoder_layers(), s, memory.keys, memory.values, strict=True
        ):
            e, kept, alignment = layer.step(e, past, k, v, memory.lengths)
            after.append(kept)
        return Step(self._scores(e).log_softmax(-1), tuple(after), alignment)

    def _decoder_layers(self) -> list[DecoderLayer]:
        return cast("list[DecoderLayer]", list(self.decoder))

    def _scores(self, s: Tensor) -> Tensor:
        return F.linear(self.norm_y(s), self.embed_y.weight)


def positions_of(first: int, T: int, d: int, like: Tensor) -> Tensor:
    """PE(first) .. PE(first + T - 1), (T, d), on the device and in the dtype of `like`."""
    pos = torch.arange(first, first + T, device=like.device, dtype=torch.float64)
    i = torch.arange(0, d, 2, device=like.device, dtype=torch.float64)
    angle = pos[:, None] / 10000 ** (i / d)
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1).to(like.dtype)
