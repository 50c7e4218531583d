"""RNNSearch: an encoder-decoder that aligns while it writes (Bahdanau, Cho and Bengio, 2015).

Source x_1 .. x_Tx, target y_1 .. y_Ty, both sequences of symbols. In the paper's letters:

    h_j  = [h_j forward ; h_j backward]         annotations, a bidirectional GRU over E x_j     (7)
    s_0  = tanh(W_s h_1 backward + b_s)         the decoder's first state                    (A.2.2)
    e_ij = v_a . tanh(W_a s_{i-1} + U_a h_j)    additive score of source position j          (A.1.2)
    a_ij = exp(e_ij) / sum_k exp(e_ik)          the alignment, over real positions only         (6)
    c_i  = sum_j a_ij h_j                       the context                                     (5)
    s_i  = GRU(s_{i-1}, [E y_{i-1} ; c_i])      the decoder's state                          (A.2.2)
    u_i  = U_o s_i + V_o E y_{i-1} + C_o c_i    read-out before the maxout                   (A.2.2)
    t_i  = [max(u_i,2k-1, u_i,2k)]_k            maxout over pairs of units                   (A.2.2)
    p(y_i | y_<i, x) = softmax(W_o t_i)                                                         (4)

The numbers are the paper's equations and appendices. Deliberate differences: the recurrent layers
are PyTorch's reset-after GRU, of which the encoder may have several; s_i has H units and each
direction of the encoder H / 2, so h_j has H too; and the read-out sees s_i as equation (4) says,
where the appendix writes s_{i-1}. For e_ij the scores of Luong, Pham and Manning (2015, section
3.1) can stand, of the same s_{i-1}: "dot", s_{i-1} . h_j, and "general", s_{i-1} . W_a h_j.

What does not depend on s_{i-1} is computed outside the loop over i: U_a h_j once per source, and
in training the whole read-out once for all steps. On seqkern's layers the loop over i, equations
(A.1.2), (6), (5) and the GRU, is one call of seqkern.attention_decoder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_packed_sequence

import seqkern.nn
from seqkern.models.common import check_sizes, layers_named
from seqkern.models.sequences import pack_symbols, padding_of

SCORES = ("additive", "dot", "general")


@dataclass(frozen=True)
class RNNSearchConfig:
    """Sizes of the model; `source_symbols` and `target_symbols` count the special symbols too."""

    source_symbols: int
    target_symbols: int
    embedding: int = 64
    hidden: int = 128
    attention: int = 64
    maxout: int = 64
    encoder_layers: int = 2
    dropout: float = 0.0
    pad: int = 0
    score: str = "additive"

    def __post_init__(self) -> None:
        if self.score not in SCORES:
            raise ValueError(f"score must be one of {SCORES}, got {self.score!r}")
        check_sizes(self, shares=("dropout",))
        if self.hidden % 2:
            raise ValueError(f"hidden must be even, half for each direction, got {self.hidden}")


class Memory(NamedTuple):
    """What the decoder reads of a source.

    h: annotations (B, Tx, H); u_h: U_a h_j (B, Tx, A); lengths: (B,) int32, positions that exist.
    """

    h: Tensor
    u_h: Tensor
    lengths: Tensor


class Step(NamedTuple):
    """One decoder step: log p(y_i) (B, K, V), state s_i (B, K, H), alignment a_i (B, K, Tx)."""

    log_p: Tensor
    s: Tensor
    alignment: Tensor


class PlainAttention(nn.Module):
    """e_ij, (6) and (5) in plain PyTorch; the parameters of seqkern.nn's attentions."""

    def __init__(self, score: str, state: int, annotation: int, size: int) -> None:
        super().__init__()
        self.score = score
        if score == "additive":
            self.w = nn.Linear(state, size)
            self.u = nn.Linear(annotation, size, bias=False)
            self.v = nn.Parameter(torch.empty(size))
            nn.init.uniform_(self.v, -(size**-0.5), size**-0.5)
        else:
            general = score == "general"
            self.u = nn.Linear(annotation, state, bias=False) if general else nn.Identity()

    def forward(self, s: Tensor, h: Tensor, u_h: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
        """s (B, K, H): K states per source, read together. Returns c (B, K, H), a (B, K, Tx)."""
        if self.score == "additive":
            # (B, K, 1, A) + (B, 1, Tx, A): the source is never copied K times
            e = torch.tanh(self.w(s).unsqueeze(2) + u_h.unsqueeze(1)) @ self.v
        else:
            e = s @ u_h.mT
        # every source has at least one symbol (encode checks it), so no row is all -inf
        a = e.masked_fill(padding.unsqueeze(1), float("-inf")).softmax(-1)
        return a @ h, a


class PlainDecoder(nn.Module):
    """The loop over i on torch.nn; called like seqkern.nn.AttentionDecoder."""

    def __init__(self, cell: nn.GRUCell, attention: PlainAttention) -> None:
        super().__init__()
        self.cell, self.attention = cell, attention

    def forward(
        self, x: Tensor, state: Tensor, key: Tensor, *, k_lens: Tensor, u_key: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x (N, T, D), state (N, H), key (B, Tx, H), N = B*K: all s_i, c_i and a_i, and s_T."""
        padding = padding_of(k_lens, key.size(1))
        steps = []
        for x_i in x.unbind(1):
            state, c, a = self._step(x_i, state, key, u_key, padding)
            steps.append((state, c, a))
        s, contexts, alignments = (torch.stack(t, 1) for t in zip(*steps, strict=True))
        return s, contexts, alignments, state

    def step(
        self, x: Tensor, state: Tensor, key: Tensor, *, k_lens: Tensor, u_key: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x (N, D): s_i (N, H), c_i (N, H) and a_i (N, Tx)."""
        padding = padding_of(k_lens, key.size(1))
        return self._step(x, state, key, u_key, padding)

    def _step(self, x: Tensor, s: Tensor, h: Tensor, u_h: Tensor, padding: Tensor):
        c, a = self.attention(s.unflatten(0, (h.size(0), -1)), h, u_h, padding)
        c = c.flatten(0, 1)
        return self.cell(torch.cat([x, c], -1), s), c, a.flatten(0, 1)


def _encoder(layers: str, config: RNNSearchConfig) -> nn.GRU | seqkern.nn.GRU:
    n, gru = config.encoder_layers, layers_named(layers).GRU
    between = config.dropout if n > 1 else 0.0
    return gru(config.embedding, config.hidden // 2, n, bidirectional=True, dropout=between)


def _decoder(layers: str, config: RNNSearchConfig) -> PlainDecoder | seqkern.nn.AttentionDecoder:
    D, H, A = config.embedding, config.hidden, config.attention
    if layers == "torch":
        attention = PlainAttention(config.score, H, H, A)
        return PlainDecoder(nn.GRUCell(D + H, H), attention)
    kinds = {
        "additive": lambda: seqkern.nn.AdditiveAttention(H, H, A),
        "dot": seqkern.nn.DotAttention,
        "general": lambda: seqkern.nn.GeneralAttention(H, H),
    }
    attention = kinds[config.score]()
    return seqkern.nn.AttentionDecoder(seqkern.nn.GRUCell(D + H, H), attention)


class RNNSearch(nn.Module):
    """The model of the module docstring.

    Args:
        config: sizes.
        layers: "seqkern" or "torch", where the encoder's GRU and the decoder, its GRUCell and its
            attention, come from. Parameters have the same names and, under the same seed, the
            same values in both, so one state_dict serves either.
    """

    def __init__(self, config: RNNSearchConfig, layers: str = "seqkern") -> None:
        super().__init__()
        layers_named(layers)
        self.config, self.layers = config, layers
        D, H = config.embedding, config.hidden
        self.embed_x = nn.Embedding(config.source_symbols, D, padding_idx=config.pad)
        self.embed_y = nn.Embedding(config.target_symbols, D, padding_idx=config.pad)
        self.encoder = _encoder(layers, config)
        self.init_s = nn.Linear(H // 2, H)
        self.decoder = _decoder(layers, config)
        self.readout = nn.Linear(H + D + H, 2 * config.maxout)  # [U_o V_o C_o]
        self.output = nn.Linear(config.maxout, config.target_symbols)
        self.dropout = nn.Dropout(config.dropout)

    def encode(self, x: Tensor, lengths: Tensor) -> tuple[Memory, Tensor]:
        """x (B, Tx) symbols, lengths (B,) in 1 .. Tx. Returns the memory and s_0 (B, H).

        Raises:
            ValueError: a length is outside 1 .. Tx.
        """
        # The symbols are packed, not their embeddings: what pads them has none.
        symbols = pack_symbols(x, lengths)
        e_x = symbols._replace(data=self.dropout(self.embed_x(symbols.data)))
        annotations, h_n = self.encoder(e_x)
        h, _ = pad_packed_sequence(annotations, batch_first=True, total_length=x.size(1))
        s_0 = torch.tanh(self.init_s(h_n[-1]))  # the last layer's backward state at j = 1
        u_h = self.decoder.attention.u(h)
        return Memory(h, u_h, lengths.to(x.device, torch.int32)), s_0

    def forward(self, x: Tensor, lengths: Tensor, y_previous: Tensor) -> Tensor:
        """Teacher forcing. x (B, Tx), lengths (B,), y_previous (B, Ty) = y_0 .. y_{Ty-1}.

        Returns the unnormalised scores of y_1 .. y_Ty, (B, Ty, V).
        """
        memory, s_0 = self.encode(x, lengths)
        e_y = self.dropout(self.embed_y(y_previous))  # (B, Ty, D)
        s, c, _, _ = self.decoder(e_y, s_0, memory.h, k_lens=memory.lengths, u_key=memory.u_h)
        return self._read_out(s, e_y, c)

    def step(self, y: Tensor, s: Tensor, memory: Memory) -> Step:
        """One step of decoding: y (B, K) = y_{i-1}, s (B, K, H) = s_{i-1}, K hypotheses each."""
        e_y = self.embed_y(y)
        of_rows = self.decoder.step(
            e_y.flatten(0, 1),
            s.flatten(0, 1),
            memory.h,
            k_lens=memory.lengths,
            u_key=memory.u_h,
        )
        s, c, alignment = (t.unflatten(0, y.shape) for t in of_rows)
        return Step(self._read_out(s, e_y, c).log_softmax(-1), s, alignment)

    def _read_out(self, s: Tensor, e_y: Tensor, c: Tensor) -> Tensor:
        u = self.readout(torch.cat([s, e_y, c], -1))
        # Not amax, whose backward shares the gradient among equals, at four times the cost.
        t = u.unflatten(-1, (-1, 2)).max(-1).values
        return self.output(self.dropout(t))
