"""Self-attention over the states of a BiLSTM, in two forms.

`kind="structured"`, a sentence as a matrix (Lin et al., 2017). In the paper's letters, with n
words, H = (h_1, .., h_n) of 2u columns, d_a and r:

    →h_t = LSTM(w_t, →h_t-1),  ←h_t = LSTM(w_t, ←h_t+1),  h_t = [→h_t ; ←h_t]   (2) to (4)
    A = softmax(W_s2 tanh(W_s1 H^T))         r rows of weights over the n words       (6)
    M = A H                                  r vectors of the sentence                (7)
    P = ||A A^T - I||_F^2                    the more, the more alike the rows are    (8)

    p(label | w) = softmax(W_o M + b_o), M as one row; trained on -log p + C P (section 2.2)

`kind="heads"`, multi-head attention (Vaswani et al., 2017, section 3.2) of every word to all, as
Cheng et al. (2016) first let the states of an LSTM attend to one another:

    Z = H + MultiHead(H, H, H)               n vectors, each aware of the others
    p(label | w) = softmax(W_o max_t z_t + b_o)

Deliberate differences: the classifier is one linear layer, where Lin et al. put a wide hidden one
between; P is the mean over the sentences of a batch.

The BiLSTM is the layers' LSTM, and MultiHead their MultiheadAttention. (6) and (7) are two small
products of r rows on either: seqkern has no kernel for r vectors that share one tanh.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_packed_sequence

from seqkern.models.common import check_sizes, layers_named
from seqkern.models.sequences import pack_symbols, padding_of, small_embedding

KINDS = ("structured", "heads")


@dataclass(frozen=True)
class SelfAttentiveConfig:
    """Sizes of the model.

    Attributes:
        symbols: of the vocabulary, the special ones too.
        labels: classes.
        kind: "structured" or "heads".
        embedding: features of a word.
        hidden: 2u, features of h_t, half of them from each direction.
        attention: d_a, of "structured".
        rows: r, of "structured".
        penalty: C, of "structured"; 0 for none.
        heads: of "heads", a divisor of hidden.
        dropout: probability of dropping a feature of a word, and of what is classified.
        pad: the symbol of padding.
    """

    symbols: int
    labels: int
    kind: str = "structured"
    embedding: int = 200
    hidden: int = 200
    attention: int = 100
    rows: int = 8
    penalty: float = 0.1
    heads: int = 4
    dropout: float = 0.5
    pad: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {KINDS}, got {self.kind!r}")
        check_sizes(self, shares=("dropout",), free=("penalty",))
        if not self.penalty >= 0:
            raise ValueError(f"penalty must not be negative, got {self.penalty}")
        if self.hidden % 2:
            raise ValueError(f"hidden must be even, half for each direction, got {self.hidden}")
        if self.kind == "heads" and self.hidden % self.heads:
            raise ValueError(
                f"hidden must be a multiple of heads = {self.heads}, got {self.hidden}"
            )


class Attended(NamedTuple):
    """What is classified, and how it came about.

    m: (B, r * 2u), the rows of M one after another, or (B, 2u) of "heads"; weights: A (B, r, T),
    or (B, heads, T, T), of which row t tells where word t attends. Both are zero past the end of
    a sentence, where they are queries too.
    """

    m: Tensor
    weights: Tensor | None


def penalty(a: Tensor) -> Tensor:
    """Equation (8), P of each sentence (B,), for its weights A (B, r, T)."""
    identity = torch.eye(a.size(1), dtype=a.dtype, device=a.device)
    return (a @ a.mT - identity).square().sum((1, 2))


class SelfAttentive(nn.Module):
    """The models of the module docstring.

    Args:
        config: sizes and kind.
        layers: "seqkern" or "torch", where LSTM and MultiheadAttention come from. Parameters have
            the same names and, under one seed, the same first values in both.
    """

    def __init__(self, config: SelfAttentiveConfig, layers: str = "seqkern") -> None:
        super().__init__()
        nn_of = layers_named(layers)
        self.config, self.layers = config, layers
        H = config.hidden
        self.embed = small_embedding(config.symbols, config.embedding, config.pad)
        self.lstm = nn_of.LSTM(config.embedding, H // 2, bidirectional=True)
        if config.kind == "structured":
            self.w_s1 = nn.Linear(H, config.attention, bias=False)
            self.w_s2 = nn.Linear(config.attention, config.rows, bias=False)
        else:
            self.heads = nn_of.MultiheadAttention(H, config.heads, batch_first=True)
        width = config.rows * H if config.kind == "structured" else H
        self.output = nn.Linear(width, config.labels)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """x (B, T) symbols, lengths (B,) in 1 .. T. Returns scores (B, labels), not normalised.

        Raises:
            ValueError: a sequence is empty or longer than T, or the sizes do not fit.
        """
        return self.output(self.dropout(self.attend(x, lengths).m))

    def attend(self, x: Tensor, lengths: Tensor, need_weights: bool = False) -> Attended:
        """M or max_t z_t, with the weights where asked for; "structured" always has them."""
        words = pack_symbols(x, lengths)
        states, _ = self.lstm(words._replace(data=self.dropout(self.embed(words.data))))
        h, _ = pad_packed_sequence(states, batch_first=True, total_length=x.size(1))
        past = padding_of(lengths.to(x.device), x.size(1))  # (B, T)
        if self.config.kind == "structured":
            scores = self.w_s2(torch.tanh(self.w_s1(h))).mT  # (B, r, T)
            a = scores.masked_fill(past.unsqueeze(1), float("-inf")).softmax(-1)
            return Attended((a @ h).flatten(1), a)
        z, a = self.heads(
            h, h, h, key_padding_mask=past, need_weights=need_weights, average_attn_weights=False
        )
        z = (h + z).masked_fill(past.unsqueeze(-1), float("-inf"))
        if a is not None:
            a = a.masked_fill(past[:, None, :, None], 0)
        return Attended(z.max(1).values, a)

    def alignment(self, x: Tensor, lengths: Tensor) -> Tensor:
        """What a sentence's rows give each word: A (B, r, T), or (B, T, T), the mean over heads."""
        weights = cast(Tensor, self.attend(x, lengths, need_weights=True).weights)
        return weights if self.config.kind == "structured" else weights.mean(1)

    def loss(self, x: Tensor, lengths: Tensor, labels: Tensor) -> Tensor:
        """Mean over the sentences of -log p(label) + C P, labels (B,) int64; 0-d, in nats."""
        m, a = self.attend(x, lengths)
        loss = F.cross_entropy(self.output(self.dropout(m)), labels)
        if self.config.kind == "structured" and self.config.penalty and a is not None:
            loss = loss + self.config.penalty * penalty(a).mean()
        return loss
