"""A language model that becomes a classifier (Dai and Le, 2015; Howard and Ruder, 2018).

Words x_1 .. x_T of a sentence, of which most have no label. First the model learns to go on with a
sentence, from all of them; then to label it, from the few that have a label:

    h_t = LSTM(E x_t, h_{t-1}),                       x_0 = <s>, so that x_1 is predicted too
    p(x_{t+1} | x_1 .. x_t) = softmax(E W_p h_t)                      (Dai and Le, section 2.2)
    u   = [h_T ; max_t h_t ; mean_t h_t]                (Howard and Ruder, section 3.3: pooling)
    p(label | x) = softmax(W_2 relu(W_1 u))                        (Howard and Ruder, section 3.3)

E, the LSTM and its state at every word are the same in both. Deliberate differences: one learning
rate for all layers and no gradual unfreezing, which Howard and Ruder need for a model that was
trained on other text; no batch normalisation in the classifier.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from seqkern.models.common import check_sizes, layers_named
from seqkern.models.sequences import check_sequences, pack_symbols, padding_of


@dataclass(frozen=True)
class PretrainedConfig:
    """Sizes of the model; `symbols` counts the special ones too, bos is the number of x_0."""

    symbols: int
    labels: int
    embedding: int = 200
    hidden: int = 300
    depth: int = 1
    head: int = 50
    dropout: float = 0.4
    pad: int = 0
    bos: int = 1

    def __post_init__(self) -> None:
        check_sizes(self, shares=("dropout",))


class PretrainedClassifier(nn.Module):
    """The model of the module docstring.

    Args:
        config: sizes.
        layers: "seqkern" or "torch", where the LSTM comes from. Parameters have the same names
            and, under one seed, the same first values in both.
    """

    def __init__(self, config: PretrainedConfig, layers: str = "seqkern") -> None:
        super().__init__()
        self.config, self.layers = config, layers
        D, H = config.embedding, config.hidden
        self.embed = nn.Embedding(config.symbols, D, padding_idx=config.pad)
        nn.init.normal_(self.embed.weight, std=D**-0.5)  # it is the output's weight too
        between = config.dropout if config.depth > 1 else 0.0
        self.lstm = layers_named(layers).LSTM(D, H, config.depth, dropout=between)
        self.w_p = nn.Linear(H, D)
        self.w_1, self.w_2 = nn.Linear(3 * H, config.head), nn.Linear(config.head, config.labels)
        self.dropout = nn.Dropout(config.dropout)

    def states(self, x: Tensor, lengths: Tensor) -> PackedSequence:
        """h_0 .. h_T of sentences x (B, T), lengths (B,) in 1 .. T, each after <s> and T words.

        Raises:
            ValueError: a sentence is empty or longer than T, or the sizes do not fit.
        """
        check_sequences(x, lengths)
        begun = torch.cat([x.new_full((len(x), 1), self.config.bos), x], 1)
        words = pack_symbols(begun, lengths + 1)
        states, _ = self.lstm(words._replace(data=self.dropout(self.embed(words.data))))
        return states

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Arguments of `states`. Returns scores (B, labels), not normalised."""
        h, _ = pad_packed_sequence(self.states(x, lengths), batch_first=True)
        n = (lengths + 1).to(x.device)
        past = padding_of(n, h.size(1)).unsqueeze(-1)
        last = h[torch.arange(len(h), device=h.device), n - 1]
        largest = h.masked_fill(past, float("-inf")).amax(1)
        u = torch.cat([last, largest, h.sum(1) / n.unsqueeze(-1)], -1)  # past the end h is zero
        return self.w_2(self.dropout(torch.relu(self.w_1(self.dropout(u)))))

    def loss(self, x: Tensor, lengths: Tensor, labels: Tensor) -> Tensor:
        """Mean of -log p(label) over the sentences, labels (B,) int64; 0-d, in nats."""
        return F.cross_entropy(self(x, lengths), labels)

    def language_loss(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Mean of -log p(x_t | x_1 .. x_{t-1}) over all words; 0-d, in nats."""
        states = self.states(x, lengths)
        # The state after <s> and t words against word t + 1; after the last there is none.
        after = F.pad(x, (0, 1)).masked_fill(
            padding_of(lengths.to(x.device), x.size(1) + 1), self.config.pad
        )
        following = pack_symbols(after, lengths + 1).data
        scores = F.linear(self.w_p(self.dropout(states.data)), self.embed.weight)
        ends = following == self.config.pad
        return F.cross_entropy(scores[~ends], following[~ends])
