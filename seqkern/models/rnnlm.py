"""Recurrent language models over characters or words, and how far their gradients reach.

Text w_1 .. w_T, symbols of a vocabulary of V. In the letters of Mikolov et al. (2010) and of
Zaremba, Sutskever and Vinyals (2014):

    p(w_1 .. w_T) = prod_t p(w_t | w_1 .. w_t-1)                            the chain rule
    h_t^0 = E w_t                                                           a row of the table E
    h_t^l = RNN(D(h_t^l-1), h_t-1^l),   l = 1 .. L                          (Zaremba, section 3.2)
    p(w_t+1 | w_1 .. w_t) = softmax(W D(h_t^L) + b)

RNN is Elman's cell (the simple network of Mikolov et al.), the LSTM or the GRU; D drops units
between layers, never from one step to the next. With `tied` W is E itself (Press and Wolf, 2017;
Inan, Khosravi and Socher, 2017), and E is drawn from N(0, 1/d), so that the first scores are of
size one.

Deliberate differences: Mikolov's units are logistic, here tanh; the cells are those of PyTorch,
so the GRU resets after the product; the forget gates start with a bias of 1 (Gers, Schmidhuber
and Cummins, 2000). A text of any length is read in pieces: `forward` takes the state that the
piece before returned, and what is cut is the gradient, not the text (truncated
back-propagation through time).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from seqkern.models.common import check_sizes, layers_named

CELLS = ("RNN", "LSTM", "GRU")
State = tuple[Tensor, ...]


@dataclass(frozen=True)
class RNNLMConfig:
    """Sizes of the model; `symbols` is V, `depth` the number of recurrent layers."""

    symbols: int
    cell: str = "LSTM"
    embedding: int = 128
    hidden: int = 256
    depth: int = 2
    dropout: float = 0.0
    tied: bool = False

    def __post_init__(self) -> None:
        if self.cell not in CELLS:
            raise ValueError(f"cell must be one of {CELLS}, got {self.cell!r}")
        check_sizes(self, shares=("dropout",))
        if self.tied and self.embedding != self.hidden:
            raise ValueError(
                "tied takes one table for both ends: embedding must equal hidden, "
                f"got {self.embedding} and {self.hidden}"
            )


class RNNLM(nn.Module):
    """The model of the module docstring.

    Args:
        config: sizes.
        layers: "seqkern" or "torch", where the recurrent layers come from. Parameters have the
            same names and, under the same seed, the same values in both.
    """

    carries = True  # the state of one piece of text is the start of the next

    def __init__(self, config: RNNLMConfig, layers: str = "seqkern") -> None:
        super().__init__()
        recurrent = getattr(layers_named(layers), config.cell)
        self.config, self.layers = config, layers
        self.embed = nn.Embedding(config.symbols, config.embedding)
        self.recurrent = recurrent(
            config.embedding,
            config.hidden,
            config.depth,
            dropout=config.dropout if config.depth > 1 else 0.0,
        )
        self.output = nn.Linear(config.hidden, config.symbols)
        self.dropout = nn.Dropout(config.dropout)
        if config.tied:
            nn.init.normal_(self.embed.weight, std=config.embedding**-0.5)
            self.output.weight = self.embed.weight
        if config.cell == "LSTM":
            open_forget_gates(self.recurrent)

    def forward(self, x: Tensor | PackedSequence, state: State | None = None) -> tuple[Any, State]:
        """Scores of the symbol after each one of `x`.

        Args:
            x: (B, T) int64; or sequences of different lengths, their symbols packed.
            state: what the call before returned, for the text before; None for its beginning.

        Returns:
            Unnormalised scores (B, T, V), or packed (N, V); and the state after the last symbol,
            (h,) or (h, c), each (L, B, H).

        Raises:
            ValueError: `x` has no symbol or is not (B, T), or `state` has not the number of parts.
        """
        hx = self._as_hx(state)
        if isinstance(x, PackedSequence):
            h, hx = self.recurrent(x._replace(data=self.dropout(self.embed(x.data))), hx)
            return h._replace(data=self.output(self.dropout(h.data))), _as_state(hx)
        if x.dim() != 2 or not x.numel():
            raise ValueError(f"RNNLM: x must be (B, T) with B, T >= 1, got {tuple(x.shape)}")
        h, hx = self.recurrent(self.dropout(self.embed(x.t())), hx)
        return self.output(self.dropout(h.transpose(0, 1))), _as_state(hx)

    def _as_hx(self, state: State | None) -> Any:
        if state is None:
            return None
        parts = 2 if self.config.cell == "LSTM" else 1
        if len(state) != parts:
            raise ValueError(f"RNNLM: state must have {parts} part(s), got {len(state)}")
        return state if parts == 2 else state[0]


def _as_state(hx: Any) -> State:
    return hx if isinstance(hx, tuple) else (hx,)


def open_forget_gates(lstm: nn.Module) -> None:
    """Sets the forget gates' bias of every layer to 1: at first a cell keeps what it holds."""
    for name, parameter in lstm.named_parameters():
        if name.startswith("bias"):
            _, f, _, _ = parameter.detach().chunk(4)
            f.fill_(1.0 if name.startswith("bias_ih") else 0.0)


def gradient_norms(model: RNNLM, x: Tensor) -> Tensor:
    """How much the loss at the end of a text depends on each symbol before it.

    L = -log p(w_T | w_1 .. w_T-1) alone is derived by every input vector E w_t. In a simple
    network the norm falls, or grows, as a power of the distance (Bengio, Simard and Frasconi,
    1994); a gated one keeps a path open.

    Args:
        model: the language model; its mode and its gradients are left as they are.
        x: (B, T) int64, T >= 2.

    Returns:
        The norms of dL/dE w_t, t = 1 .. T - 1, each the mean over the batch: (T - 1,).

    Raises:
        ValueError: `x` is not (B, T) with B >= 1 and T >= 2.
    """
    if x.dim() != 2 or not x.size(0) or x.size(1) < 2:
        raise ValueError(f"gradient_norms: x must be (B, T), B >= 1, T >= 2, got {tuple(x.shape)}")
    e = model.embed(x[:, :-1].t()).detach().requires_grad_()
    with torch.enable_grad():
        h, _ = model.recurrent(e)
        scores = model.output(h[-1])
        # The sum, not the mean: a row's gradient does not depend on how many rows there are.
        loss = F.cross_entropy(scores, x[:, -1], reduction="sum")
        (gradient,) = torch.autograd.grad(loss, e)
    return gradient.norm(dim=-1).mean(1)
