"""Fast weights: a memory between weights and states (Ba, Hinton, Mnih, Leibo and Ionescu, 2016).

A sequence x(1) .. x(T) is read; its label is told from h(T). In the paper's letters and numbers,
with R hidden units, f = ReLU and decay l (the paper's lambda) and rate e (eta) of the memory:

    A(t)      = l A(t-1) + e h(t) h(t)^T,   A(0) = 0                                        (1)
    h_0(t+1)  = f(W h(t) + C x(t))                                           text before (2)
    h_s+1(t+1) = f(LN[W h(t) + C x(t) + A(t) h_s(t+1)]),   s = 0 .. S-1               (2), (5)
    A(t) h_s  = e sum_tau=1..t l^(t-tau) h(tau) [h(tau)^T h_s]                              (4)

h(t+1) is the last h_s. (1) with a product is the "matrix" form, R^2 numbers of memory for each
sequence; (4) is the "attention" form, which keeps the past states and weights them by a scalar
product. Their results are equal up to rounding; the second is cheaper while t < R.

Label: softmax(V relu(U h(T) + b) + c), a layer of ReLU units as the paper has it. W starts as a
small multiple of the identity. `cell` "LSTM" and "IRNN" put the paper's two baselines in place of
the fast weights: an LSTM, and a ReLU network that starts with W = I (Le, Jaitly and Hinton, 2015).

Deliberate differences: C has a bias; only the inner steps are normalised, not h_0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from seqkern.models.common import check_sizes, layers_named

CELLS = ("fast", "LSTM", "IRNN")
FORMS = ("matrix", "attention")


@dataclass(frozen=True)
class FastWeightsConfig:
    """Sizes: `symbols` and `labels`, `hidden` R, `inner` S, `readout` the ReLU units after h(T)."""

    symbols: int
    labels: int
    embedding: int = 100
    hidden: int = 20
    readout: int = 100
    inner: int = 1
    decay: float = 0.95
    rate: float = 0.5
    form: str = "attention"
    cell: str = "fast"

    def __post_init__(self) -> None:
        check_sizes(self, shares=("decay",), free=("rate",))
        if not self.rate > 0:
            raise ValueError(f"rate must be positive, got {self.rate}")
        for name, value, known in (("form", self.form, FORMS), ("cell", self.cell, CELLS)):
            if value not in known:
                raise ValueError(f"{name} must be one of {known}, got {value!r}")


class FastWeightRNN(nn.Module):
    """The recurrent equations of the module docstring."""

    def __init__(self, config: FastWeightsConfig) -> None:
        super().__init__()
        R = config.hidden
        self.config = config
        self.W = nn.Linear(R, R, bias=False)
        self.C = nn.Linear(config.embedding, R)
        self.norm = nn.LayerNorm(R)
        nn.init.eye_(self.W.weight)
        with torch.no_grad():
            self.W.weight.mul_(0.05)

    def forward(self, x: Tensor) -> Tensor:
        """x (T, B, D): h(1) .. h(T), (T, B, R)."""
        c_x = self.C(x)  # of all steps at once
        h = c_x.new_zeros(c_x.shape[1:])
        memory = self._empty(c_x)
        states = []
        for c_x_t in c_x.unbind():
            slow = self.W(h) + c_x_t
            h = torch.relu(slow)
            for _ in range(self.config.inner):
                h = torch.relu(self.norm(slow + self._read(memory, h)))
            memory = self._write(memory, h)
            states.append(h)
        return torch.stack(states)

    def _empty(self, like: Tensor) -> Tensor:
        """A(0), (B, R, R), or no past state, (B, 0, R)."""
        R = self.config.hidden
        return like.new_zeros(like.size(1), R if self.config.form == "matrix" else 0, R)

    def _read(self, memory: Tensor, h: Tensor) -> Tensor:
        """A(t) h_s, (B, R): by A itself, or by (4) of the past states."""
        if self.config.form == "matrix":
            return torch.bmm(memory, h.unsqueeze(-1)).squeeze(-1)
        t, l = memory.size(1), self.config.decay
        age = torch.arange(t - 1, -1, -1, device=h.device, dtype=h.dtype)
        weights = self.config.rate * l**age * torch.bmm(memory, h.unsqueeze(-1)).squeeze(-1)
        return torch.bmm(weights.unsqueeze(1), memory).squeeze(1)

    def _write(self, memory: Tensor, h: Tensor) -> Tensor:
        """The memory with h(t): (1), or one state more."""
        if self.config.form == "matrix":
            outer = h.unsqueeze(-1) * h.unsqueeze(1)
            return self.config.decay * memory + self.config.rate * outer
        return torch.cat([memory, h.unsqueeze(1)], 1)


class FastWeights(nn.Module):
    """The classifier of the module docstring.

    Args:
        config: sizes.
        layers: "seqkern" or "torch", where the recurrent layer of the cells "LSTM" and "IRNN"
            comes from; the cell "fast" is a loop in PyTorch either way. Parameters have the same
            names and, under the same seed, the same values in both.
    """

    def __init__(self, config: FastWeightsConfig, layers: str = "seqkern") -> None:
        super().__init__()
        namespace = layers_named(layers)
        self.config, self.layers = config, layers
        self.embed = nn.Embedding(config.symbols, config.embedding)
        if config.cell == "fast":
            self.recurrent = FastWeightRNN(config)
        elif config.cell == "LSTM":
            self.recurrent = namespace.LSTM(config.embedding, config.hidden)
        else:
            self.recurrent = namespace.RNN(config.embedding, config.hidden, nonlinearity="relu")
            nn.init.eye_(self.recurrent.weight_hh_l0)
            nn.init.zeros_(self.recurrent.bias_hh_l0)
            nn.init.zeros_(self.recurrent.bias_ih_l0)
        self.hidden = nn.Linear(config.hidden, config.readout)
        self.output = nn.Linear(config.readout, config.labels)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T) int64, sequences of one length: unnormalised scores (B, labels).

        Raises:
            ValueError: `x` is not (B, T) with B, T >= 1.
        """
        if x.dim() != 2 or not x.numel():
            raise ValueError(f"FastWeights: x must be (B, T) with B, T >= 1, got {tuple(x.shape)}")
        states = self.recurrent(self.embed(x.t()))
        h = states[0] if isinstance(states, tuple) else states
        return self.output(torch.relu(self.hidden(h[-1])))
