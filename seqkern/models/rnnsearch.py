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
where the appendix writes s_{i-1}.

What does not depend on s_{i-1} is computed outside the loop over i: U_a h_j once per source, and
in training the whole read-out once for all steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import seqkern.nn

LAYERS = ("seqkern", "torch")


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

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name not in ("dropout", "pad") and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.hidden % 2:
            raise ValueError(f"hidden must be even, half for each direction, got {self.hidden}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")


class Memory(NamedTuple):
    """What the decoder reads of a source.

    h: annotations (B, Tx, H); u_h: U_a h_j (B, Tx, A); padding: (B, Tx) bool, True past the end.
    """

    h: Tensor
    u_h: Tensor
    padding: Tensor


class Step(NamedTuple):
    """One decoder step: log p(y_i) (B, K, V), state s_i (B, K, H), alignment a_i (B, K, Tx)."""

    log_p: Tensor
    s: Tensor
    alignment: Tensor


def _layer_module(layers: str) -> ModuleType:
    if layers not in LAYERS:
        raise ValueError(f"layers must be one of {LAYERS}, got {layers!r}")
    return seqkern.nn if layers == "seqkern" else torch.nn


class AdditiveAttention(nn.Module):
    """e_ij = v_a . tanh(W_a s_{i-1} + U_a h_j), softmax over j, c_i = sum_j a_ij h_j."""

    def __init__(self, state: int, annotation: int, size: int) -> None:
        super().__init__()
        self.w = nn.Linear(state, size)
        self.u = nn.Linear(annotation, size, bias=False)
        self.v = nn.Parameter(torch.empty(size))
        nn.init.uniform_(self.v, -(size**-0.5), size**-0.5)

    def forward(self, s: Tensor, memory: Memory) -> tuple[Tensor, Tensor]:
        """s (B, K, H): K states per source, read together. Returns c (B, K, H), a (B, K, Tx)."""
        # (B, K, 1, A) + (B, 1, Tx, A): the source is never copied K times
        e = torch.tanh(self.w(s).unsqueeze(2) + memory.u_h.unsqueeze(1)) @ self.v
        # every source has at least one symbol (encode checks it), so no row is all -inf
        a = e.masked_fill(memory.padding.unsqueeze(1), float("-inf")).softmax(-1)
        return a @ memory.h, a


class RNNSearch(nn.Module):
    """The model of the module docstring.

    Args:
        config: sizes.
        layers: "seqkern" or "torch", where the encoder's GRU and the decoder's GRUCell come from.
            Parameters have the same names and, under the same seed, the same values in both, so
            one state_dict serves either.
    """

    def __init__(self, config: RNNSearchConfig, layers: str = "seqkern") -> None:
        super().__init__()
        rnn = _layer_module(layers)
        self.config, self.layers = config, layers
        D, H = config.embedding, config.hidden
        self.embed_x = nn.Embedding(config.source_symbols, D, padding_idx=config.pad)
        self.embed_y = nn.Embedding(config.target_symbols, D, padding_idx=config.pad)
        between = config.dropout if config.encoder_layers > 1 else 0.0
        self.encoder = rnn.GRU(
            D, H // 2, config.encoder_layers, bidirectional=True, dropout=between
        )
        self.init_s = nn.Linear(H // 2, H)
        self.attention = AdditiveAttention(H, H, config.attention)
        self.decoder = rnn.GRUCell(D + H, H)
        self.readout = nn.Linear(H + D + H, 2 * config.maxout)  # [U_o V_o C_o]
        self.output = nn.Linear(config.maxout, config.target_symbols)
        self.dropout = nn.Dropout(config.dropout)

    def encode(self, x: Tensor, lengths: Tensor) -> tuple[Memory, Tensor]:
        """x (B, Tx) symbols, lengths (B,) in 1 .. Tx. Returns the memory and s_0 (B, H).

        Raises:
            ValueError: a length is outside 1 .. Tx.
        """
        if x.dim() != 2 or not x.size(0) or lengths.shape != x.shape[:1]:
            raise ValueError(
                "encode: expected x (B, Tx) and lengths (B,), B >= 1, "
                f"got {tuple(x.shape)} and {tuple(lengths.shape)}"
            )
        shortest, longest = int(lengths.min()), int(lengths.max())
        if shortest < 1 or longest > x.size(1):
            raise ValueError(
                f"encode: lengths must be in 1 .. {x.size(1)}, got {shortest} .. {longest}"
            )
        packed = pack_padded_sequence(
            self.dropout(self.embed_x(x)), lengths.cpu(), batch_first=True, enforce_sorted=False
        )
        annotations, h_n = self.encoder(packed)
        h, _ = pad_packed_sequence(annotations, batch_first=True, total_length=x.size(1))
        padding = torch.arange(x.size(1), device=x.device) >= lengths.to(x.device)[:, None]
        s_0 = torch.tanh(self.init_s(h_n[-1]))  # the last layer's backward state at j = 1
        return Memory(h, self.attention.u(h), padding), s_0

    def forward(self, x: Tensor, lengths: Tensor, y_previous: Tensor) -> Tensor:
        """Teacher forcing. x (B, Tx), lengths (B,), y_previous (B, Ty) = y_0 .. y_{Ty-1}.

        Returns the unnormalised scores of y_1 .. y_Ty, (B, Ty, V).
        """
        memory, s = self.encode(x, lengths)
        e_y = self.dropout(self.embed_y(y_previous))  # (B, Ty, D)
        states, contexts = [], []
        for e_y_i in e_y.unbind(1):
            c = self.attention(s.unsqueeze(1), memory)[0].squeeze(1)
            s = self.decoder(torch.cat([e_y_i, c], -1), s)
            states.append(s)
            contexts.append(c)
        return self._read_out(torch.stack(states, 1), e_y, torch.stack(contexts, 1))

    def step(self, y: Tensor, s: Tensor, memory: Memory) -> Step:
        """One step of decoding: y (B, K) = y_{i-1}, s (B, K, H) = s_{i-1}, K hypotheses each."""
        c, alignment = self.attention(s, memory)
        e_y = self.embed_y(y)
        s = self.decoder(torch.cat([e_y, c], -1).flatten(0, 1), s.flatten(0, 1)).view_as(s)
        return Step(self._read_out(s, e_y, c).log_softmax(-1), s, alignment)

    def _read_out(self, s: Tensor, e_y: Tensor, c: Tensor) -> Tensor:
        u = self.readout(torch.cat([s, e_y, c], -1))
        t = u.unflatten(-1, (-1, 2)).amax(-1)
        return self.output(self.dropout(t))
