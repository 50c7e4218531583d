"""A BiLSTM that classifies sentences, with four ways to pool its states (Conneau et al., 2017).

A sentence of words x_1 .. x_T:

    →h_t = LSTM(x_1 .. x_t),  ←h_t = LSTM(x_T .. x_t)                          (section 3.2.2)
    h_t  = [→h_t ; ←h_t]                                                       (section 3.2.2)

and one vector u of however many states:

    last       u = [→h_T ; ←h_1], what each direction ends with                (section 3.2.1)
    mean       u = sum_t h_t / T                                               (section 3.2.2)
    max        u_d = max_t h_t,d, each unit where it is largest                (section 3.2.2)
    attention  u_t = tanh(W h_t + b),  a_t = exp(u_t . v) / sum_s exp(u_s . v),
               u = sum_t a_t h_t                                 (Yang et al., 2016, (5) to (7))

    p(label | x) = softmax(W_o u + b_o)

With one direction and "last" the representation is h_T alone, which a word at the start of a long
sentence reaches through all steps between; "max" takes h_1 itself.

Deliberate differences: the classifier is one linear layer on u, where Conneau et al. train u on
pairs of sentences and put one hidden layer between; and u has `hidden` units, of which each
direction gives its part.

On seqkern's layers the LSTM and the attention (seqkern.additive_attention, with b in the place of
the query) are seqkern's; in the twin they are torch.nn.LSTM and the equations in plain PyTorch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_packed_sequence

from seqkern.models.common import check_sizes, layers_named
from seqkern.models.sequences import pack_symbols, padding_of, small_embedding
from seqkern.ops.additive import additive_attention

POOLS = ("last", "mean", "max", "attention")


@dataclass(frozen=True)
class BiLSTMConfig:
    """Sizes of the model.

    Attributes:
        symbols: of the vocabulary, the special ones too.
        labels: classes.
        embedding: features of a word.
        hidden: features of h_t, all directions together.
        depth: LSTM layers, one over the other.
        directions: 2, or 1 for the forward one alone.
        pool: "last", "mean", "max" or "attention".
        attention: features of u_t, where pool is "attention".
        dropout: probability of dropping a feature of a word, and of u.
        pad: the symbol of padding.
    """

    symbols: int
    labels: int
    embedding: int = 200
    hidden: int = 200
    depth: int = 1
    directions: int = 2
    pool: str = "max"
    attention: int = 100
    dropout: float = 0.5
    pad: int = 0

    def __post_init__(self) -> None:
        if self.pool not in POOLS:
            raise ValueError(f"pool must be one of {POOLS}, got {self.pool!r}")
        check_sizes(self, shares=("dropout",))
        if self.directions not in (1, 2):
            raise ValueError(f"directions must be 1 or 2, got {self.directions}")
        if self.hidden % self.directions:
            raise ValueError(f"hidden must be even, half for each direction, got {self.hidden}")


class AttentionPool(nn.Module):
    """Equations (5) to (7) of Yang et al.; the same parameters on either set of layers."""

    def __init__(self, hidden: int, size: int, layers: str) -> None:
        super().__init__()
        self.layers = layers
        self.w = nn.Linear(hidden, size)
        self.v = nn.Parameter(torch.empty(size))
        nn.init.uniform_(self.v, -(size**-0.5), size**-0.5)

    def forward(self, h: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """h (B, T, H), lengths (B,) int32. Returns u (B, H) and a (B, T)."""
        if self.layers == "torch":
            scores = torch.tanh(self.w(h)) @ self.v
            a = scores.masked_fill(padding_of(lengths, h.size(1)), float("-inf")).softmax(-1)
            return (a.unsqueeze(1) @ h).squeeze(1), a
        bias = self.w.bias.expand(h.size(0), 1, -1)
        u, a = additive_attention(
            bias, F.linear(h, self.w.weight), h, self.v, k_lens=lengths, return_weights=True
        )
        return u.squeeze(1), a.squeeze(1)


class BiLSTMClassifier(nn.Module):
    """The model of the module docstring.

    Args:
        config: sizes and pool.
        layers: "seqkern" or "torch", where LSTM and attention come from. Parameters have the same
            names and, under one seed, the same first values in both.
    """

    def __init__(self, config: BiLSTMConfig, layers: str = "seqkern") -> None:
        super().__init__()
        lstm = layers_named(layers).LSTM
        self.config, self.layers = config, layers
        self.embed = small_embedding(config.symbols, config.embedding, config.pad)
        self.lstm = lstm(
            config.embedding,
            config.hidden // config.directions,
            config.depth,
            bidirectional=config.directions == 2,
            dropout=config.dropout if config.depth > 1 else 0.0,
        )
        if config.pool == "attention":
            self.pool = AttentionPool(config.hidden, config.attention, layers)
        self.output = nn.Linear(config.hidden, config.labels)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """x (B, T) symbols, lengths (B,) in 1 .. T. Returns scores (B, labels), not normalised.

        Raises:
            ValueError: a sequence is empty or longer than T, or the sizes do not fit.
        """
        return self.output(self.dropout(self.represent(x, lengths)[0]))

    def represent(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor | None]:
        """u (B, hidden), and a (B, T) where pool is "attention"; arguments of `forward`."""
        words = pack_symbols(x, lengths)
        states, (h_n, _) = self.lstm(words._replace(data=self.dropout(self.embed(words.data))))
        pool, directions = self.config.pool, self.config.directions
        if pool == "last":
            return h_n[-directions:].transpose(0, 1).flatten(1), None
        h, _ = pad_packed_sequence(states, batch_first=True, total_length=x.size(1))
        lengths = lengths.to(x.device, torch.int32)
        if pool == "attention":
            return self.pool(h, lengths)
        if pool == "mean":
            return h.sum(1) / lengths.unsqueeze(-1), None  # past the end h is zero
        past = padding_of(lengths, x.size(1)).unsqueeze(-1)
        return h.masked_fill(past, float("-inf")).max(1).values, None

    def alignment(self, x: Tensor, lengths: Tensor) -> Tensor | None:
        """What a sentence gives each word, a (B, 1, T), where pool is "attention"."""
        a = self.represent(x, lengths)[1]
        return None if a is None else a.unsqueeze(1)

    def loss(self, x: Tensor, lengths: Tensor, labels: Tensor) -> Tensor:
        """Mean of -log p(label) over the sentences, labels (B,) int64; 0-d, in nats."""
        return F.cross_entropy(self(x, lengths), labels)
