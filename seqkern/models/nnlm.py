"""The neural probabilistic language model (Bengio, Ducharme, Vincent and Jauvin, 2003).

The symbol w_t after the n - 1 symbols before it. In the paper's letters and numbers:

    x = (C(w_t-1), C(w_t-2), .. , C(w_t-n+1))             feature vectors of m numbers, section 2
    y = b + W x + U tanh(d + H x)                                                           (1)
    p(w_t | w_t-1 .. w_t-n+1) = softmax(y)                                      section 2, top

C is the table of features, H with h units and U the hidden layer, W the optional direct
connections from features to scores. Before the beginning of a text stands `start`.

Deliberate differences: `dropout` falls on x and on the hidden layer, which the paper does not
have (its weight decay does that work); layers and optimiser are those of PyTorch, so first values
and the decay are not the paper's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from seqkern.models.common import check_sizes, layers_named

State = tuple[Tensor, ...]


@dataclass(frozen=True)
class NNLMConfig:
    """Sizes: `symbols` |V|, `order` n, `features` m, `hidden` h; `direct` gives the model its W."""

    symbols: int
    order: int = 5
    features: int = 60
    hidden: int = 100
    direct: bool = False
    dropout: float = 0.0
    start: int = 1

    def __post_init__(self) -> None:
        check_sizes(self, shares=("dropout",))
        if self.order < 2:
            raise ValueError(f"order must be at least 2, one symbol to look at, got {self.order}")


class NNLM(nn.Module):
    """The model of the module docstring.

    Args:
        config: sizes.
        layers: "seqkern" or "torch"; the model has no recurrent and no attention layer, so both
            are the same computation.
    """

    carries = True  # the last n - 1 symbols of one piece of text are seen from the next

    def __init__(self, config: NNLMConfig, layers: str = "seqkern") -> None:
        super().__init__()
        layers_named(layers)
        self.config, self.layers = config, layers
        window = (config.order - 1) * config.features
        self.C = nn.Embedding(config.symbols, config.features)
        self.H = nn.Linear(window, config.hidden)  # its bias is d
        self.U = nn.Linear(config.hidden, config.symbols)  # its bias is b
        self.W = nn.Linear(window, config.symbols, bias=False) if config.direct else None
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Scores of the symbol after each one of `x`.

        Args:
            x: (B, T) int64.
            state: the n - 2 symbols before `x`, (B, n - 2), as the call before returned them;
                None for the beginning of a text.

        Returns:
            Unnormalised scores y (B, T, |V|), and the state after the last symbol.

        Raises:
            ValueError: `x` has no symbol or is not (B, T), or `state` is not (B, n - 2).
        """
        if x.dim() != 2 or not x.numel():
            raise ValueError(f"NNLM: x must be (B, T) with B, T >= 1, got {tuple(x.shape)}")
        before = self.config.order - 2
        if state is None:
            state = (x.new_full((x.size(0), before), self.config.start),)
        if len(state) != 1 or state[0].shape != (x.size(0), before):
            shapes = [tuple(part.shape) for part in state]
            raise ValueError(f"NNLM: state must be one ({x.size(0)}, {before}), got {shapes}")
        text = torch.cat([state[0], x], 1)
        # (B, T, m, n - 1) with the latest symbol last; the paper's x has it first
        windows = self.dropout(self.C(text)).unfold(1, self.config.order - 1, 1)
        features = windows.flip(-1).transpose(-1, -2).flatten(-2)
        y = self.U(self.dropout(torch.tanh(self.H(features))))
        if self.W is not None:
            y = y + self.W(features)
        return y, (text[:, text.size(1) - before :],)
