"""TextCNN: a sentence classified by the phrases that it holds (Kim, 2014).

A sentence of words x_1 .. x_n, each a vector of k numbers. In the paper's letters, for a filter w
over h words:

    x_1:n = x_1 (+) x_2 (+) .. (+) x_n           the vectors one after another          (1)
    c_i   = f(w . x_i:i+h-1 + b)                 one feature of each window             (2)
    c     = [c_1, c_2, .., c_n-h+1]              the feature map                        (3)
    ĉ     = max(c)                               max over time, one number per filter   (section 2)
    y     = w . (z o r) + b,  z = [ĉ_1 .. ĉ_m]   dropout r on what was pooled           (5)

with f the rectifier and a softmax over y. After a step of training each row of the output's
weights is brought back to a length of at most s (section 2.1): `constrain`.

Deliberate differences: windows may start at every `stride`-th word, where the paper's is 1; a
sentence shorter than the widest filter has zero vectors put after it up to that width, and no
other padding is seen by any window (the author's programme puts zeros before and after every
sentence). There are no pre-trained vectors: the paper's CNN-rand.

No layer here is recurrent or an attention, so `layers` chooses nothing: the network on "seqkern"
and on "torch" is one and the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqkern.models.common import check_sizes, layers_named
from seqkern.models.sequences import check_sequences, padding_of


@dataclass(frozen=True)
class TextCNNConfig:
    """Sizes of the model.

    Attributes:
        symbols: of the vocabulary, the special ones too.
        labels: classes.
        embedding: k, numbers of a word's vector.
        widths: the widths h of the filters, in words.
        maps: filters of each width.
        stride: words from the start of one window to that of the next.
        dropout: probability of dropping a pooled feature.
        max_norm: s, or 0 for rows of any length.
        pad: the symbol of padding.
    """

    symbols: int
    labels: int
    embedding: int = 300
    widths: tuple[int, ...] = (3, 4, 5)
    maps: int = 100
    stride: int = 1
    dropout: float = 0.5
    max_norm: float = 3.0
    pad: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", tuple(self.widths))  # from a file it is a list
        check_sizes(self, shares=("dropout",), free=("max_norm",))
        if not self.widths or any(type(h) is not int or h < 1 for h in self.widths):
            raise ValueError(f"widths must be whole numbers of at least 1, got {self.widths}")
        if not self.max_norm >= 0:
            raise ValueError(f"max_norm must not be negative, got {self.max_norm}")


class TextCNN(nn.Module):
    """The model of the module docstring.

    Args:
        config: sizes.
        layers: "seqkern" or "torch", which are alike here.
    """

    def __init__(self, config: TextCNNConfig, layers: str = "seqkern") -> None:
        super().__init__()
        layers_named(layers)
        self.config, self.layers = config, layers
        k = config.embedding
        self.embed = nn.Embedding(config.symbols, k, padding_idx=config.pad)
        nn.init.uniform_(self.embed.weight, -0.25, 0.25)
        with torch.no_grad():
            self.embed.weight[config.pad].zero_()
        self.filters = nn.ModuleList(
            nn.Conv1d(k, config.maps, h, config.stride) for h in config.widths
        )
        self.output = nn.Linear(len(config.widths) * config.maps, config.labels)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """x (B, T) symbols, lengths (B,) in 1 .. T. Returns y (B, labels), not normalised.

        Raises:
            ValueError: a sequence is empty or longer than T, or the sizes do not fit.
        """
        return self.output(self.dropout(self.features(x, lengths)))

    def features(self, x: Tensor, lengths: Tensor) -> Tensor:
        """z (B, widths * maps), the filters of the first width first; arguments of `forward`."""
        check_sequences(x, lengths)
        widest, lengths = max(self.config.widths), lengths.to(x.device)
        x = F.pad(x, (0, max(0, widest - x.size(1))))
        vectors = self.embed(x).masked_fill(padding_of(lengths, x.size(1)).unsqueeze(-1), 0)
        ends = lengths.clamp(min=widest).unsqueeze(-1)  # (B, 1): past them no window reaches
        pooled = []
        for h, convolution in zip(self.config.widths, self.filters, strict=True):
            c = convolution(vectors.mT)  # (B, maps, windows)
            starts = torch.arange(c.size(-1), device=x.device) * self.config.stride
            c = c.masked_fill((starts + h > ends).unsqueeze(1), float("-inf"))
            # f rises, so it commutes with the maximum, after which it has less to do.
            pooled.append(F.relu(c.max(-1).values))
        return torch.cat(pooled, -1)

    def loss(self, x: Tensor, lengths: Tensor, labels: Tensor) -> Tensor:
        """Mean of -log p(label) over the sentences, labels (B,) int64; 0-d, in nats."""
        return F.cross_entropy(self(x, lengths), labels)

    @torch.no_grad()
    def constrain(self) -> None:
        """Shortens the rows of the output's weights to `max_norm`; to be called after each step."""
        if self.config.max_norm:
            self.output.weight.copy_(self.output.weight.renorm(2, 0, self.config.max_norm))
