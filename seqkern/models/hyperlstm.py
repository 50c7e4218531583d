"""HyperLSTM: a small LSTM sets the weights of a large one at every step (Ha, Dai and Le, 2017).

A language model over w_1 .. w_T with x_t = E w_t. In the letters of the paper's appendix on the
HyperLSTM, where a hat marks the small network and y stands for each of the gates i, f, g, o:

    (h^_t, c^_t) = LSTM([h_t-1 ; x_t], h^_t-1, c^_t-1)              the hyper network
    z_h^y = W_h^h^y h^_t + b_h^h^y                                  embeddings of N_z numbers:
    z_x^y = W_h^x^y h^_t + b_h^x^y                                  what the main cell is to be
    z_b^y = W_h^b^y h^_t
    d_h^y = W_hz^y z_h^y,   d_x^y = W_xz^y z_x^y                    a factor for each row
    b^y   = W_bz^y z_b^y + b_0^y                                    and its bias
    y_t   = LN(d_h^y * W_h^y h_t-1 + d_x^y * W_x^y x_t + b^y)
    c_t   = sigmoid(f_t) * c_t-1 + sigmoid(i_t) * tanh(g_t)
    h_t   = sigmoid(o_t) * tanh(LN(c_t))
    p(w_t+1 | w_1 .. w_t) = softmax(W h_t + b)

A factor of a row of W scales the row's product, so no weight matrix is ever made: d * (W h).
At first all d are 0.1 and b is b_0 = 0, so the cell begins as a layer-normalised LSTM.

Deliberate differences: the hyper network is a plain LSTM, without layer normalisation; the z are
read from h^_t, which has seen x_t, not from the state before; the forget gate's
normalisation starts with a shift of 1; dropout falls on x_t and on h_t before the output only.

What does not depend on h_t-1, the products W_x x_t of all gates, is computed outside the loop.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqkern.models.common import check_sizes, layers_named

State = tuple[Tensor, ...]


@dataclass(frozen=True)
class HyperLSTMConfig:
    """Sizes: `symbols` V, `hidden` of the main cell, `hyper` of the small one, `z` N_z."""

    symbols: int
    embedding: int = 128
    hidden: int = 256
    hyper: int = 64
    z: int = 16
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_sizes(self, shares=("dropout",))


class HyperLSTMCell(nn.Module):
    """One step of the module docstring's equations, from y_t on, and the hyper network's."""

    def __init__(self, config: HyperLSTMConfig, layers: str) -> None:
        super().__init__()
        H, Z = config.hidden, config.z
        self.hyper = layers_named(layers).LSTMCell(H + config.embedding, config.hyper)
        self.w_h = nn.Linear(H, 4 * H, bias=False)
        self.z_hx = nn.Linear(config.hyper, 2 * 4 * Z)  # z_h and z_x of the four gates
        self.z_b = nn.Linear(config.hyper, 4 * Z, bias=False)
        self.d = nn.Parameter(torch.full((2 * 4, Z, H), 0.1 / Z))  # W_hz and W_xz
        self.w_bz = nn.Parameter(torch.zeros(4, Z, H))
        self.b_0 = nn.Parameter(torch.zeros(4, 1, H))
        self.gain = nn.Parameter(torch.ones(4, 1, H))
        self.shift = nn.Parameter(torch.zeros(4, 1, H))
        self.norm_c = nn.LayerNorm(H)
        nn.init.zeros_(self.z_hx.weight)
        nn.init.ones_(self.z_hx.bias)
        with torch.no_grad():
            self.shift[1] = 1.0  # the forget gate: at first the cell keeps what it holds

    def forward(self, x: Tensor, w_x: Tensor, state: State) -> tuple[Tensor, State]:
        """x (B, D), W_x x (4, B, H), state (h, c, h^, c^): h_t and the state after it."""
        h, c, hyper_h, hyper_c = state
        hyper_h, hyper_c = self.hyper(torch.cat([h, x], -1), (hyper_h, hyper_c))
        z_hx = self.z_hx(hyper_h).unflatten(-1, (8, -1)).transpose(0, 1)  # (8, B, N_z)
        z_b = self.z_b(hyper_h).unflatten(-1, (4, -1)).transpose(0, 1)
        d_h, d_x = torch.bmm(z_hx, self.d).chunk(2)  # each (4, B, H)
        b = torch.baddbmm(self.b_0, z_b, self.w_bz)
        w_h = self.w_h(h).unflatten(-1, (4, -1)).transpose(0, 1)
        y = F.layer_norm(d_h * w_h + d_x * w_x + b, h.shape[-1:])
        i, f, g, o = torch.addcmul(self.shift, self.gain, y)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(self.norm_c(c))
        return h, (h, c, hyper_h, hyper_c)


class HyperLSTM(nn.Module):
    """The model of the module docstring.

    Args:
        config: sizes.
        layers: "seqkern" or "torch", where the hyper network's cell comes from. Parameters have
            the same names and, under the same seed, the same values in both.
    """

    carries = True  # the state of one piece of text is the start of the next

    def __init__(self, config: HyperLSTMConfig, layers: str = "seqkern") -> None:
        super().__init__()
        self.config, self.layers = config, layers
        self.embed = nn.Embedding(config.symbols, config.embedding)
        self.w_x = nn.Linear(config.embedding, 4 * config.hidden, bias=False)
        self.cell = HyperLSTMCell(config, layers)
        self.output = nn.Linear(config.hidden, config.symbols)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Scores of the symbol after each one of `x`.

        Args:
            x: (B, T) int64.
            state: h, c (B, hidden), h^, c^ (B, hyper), as the call before returned them for the
                text before; None for its beginning.

        Returns:
            Unnormalised scores (B, T, V), and the state after the last symbol.

        Raises:
            ValueError: `x` has no symbol or is not (B, T), or `state` is not of this model.
        """
        if x.dim() != 2 or not x.numel():
            raise ValueError(f"HyperLSTM: x must be (B, T) with B, T >= 1, got {tuple(x.shape)}")
        B, H, small = x.size(0), self.config.hidden, self.config.hyper
        shapes = [(B, H), (B, H), (B, small), (B, small)]
        if state is None:
            present = tuple(self.output.weight.new_zeros(shape) for shape in shapes)
        else:
            present = state
        if (got := [tuple(part.shape) for part in present]) != shapes:
            raise ValueError(f"HyperLSTM: state must be {shapes}, got {got}")
        e = self.dropout(self.embed(x.t()))  # (T, B, D)
        w_x = self.w_x(e).unflatten(-1, (4, H)).transpose(1, 2)  # (T, 4, B, H)
        outputs = []
        for x_t, w_x_t in zip(e.unbind(), w_x.unbind(), strict=True):
            h, present = self.cell(x_t, w_x_t, present)
            outputs.append(h)
        return self.output(self.dropout(torch.stack(outputs, 1))), present
