"""One time step of each recurrent cell: the forward formula and its derivative.

Every function works on the rows of one step. `ax` is the input's share of the gates'
pre-activations, W_ih x_t + b_ih, and `ah` the recurrent share, W_hh h_{t-1} + b_hh, both
(B, G*H); `h` and `c` are the states of step t-1. All arithmetic runs in the accumulation
dtype, float32 or float64.

LSTM (Hochreiter & Schmidhuber 1997, forget gate of Gers et al. 2000), gates i f g o:

    i = sigmoid(ax_i + ah_i)      f = sigmoid(ax_f + ah_f)
    g = tanh(ax_g + ah_g)         o = sigmoid(ax_o + ah_o)
    c_t = f * c_{t-1} + i * g     m_t = o * tanh(c_t)     h_t = m_t, or W_hr m_t

The last form is the projected LSTM of Sak et al. 2014.

GRU (Cho et al. 2014, in the form that applies the reset gate after the product, as cuDNN
does), gates r z n:

    r = sigmoid(ax_r + ah_r)      z = sigmoid(ax_z + ah_z)
    n = tanh(ax_n + r * ah_n)     h_t = (1 - z) * n + z * h_{t-1}

RNN (Elman 1990): h_t = phi(ax + ah), phi = tanh or max(0, .).

Each forward returns (m, c, saved): the new output before projection, the new cell state, and
the values that the backward reads, (B, 4H) or (B, 0). Each backward takes the gradients of m
and of c and returns those of ax, of ah, of c_{t-1}, and the part of h_{t-1}'s gradient that
does not pass through ah.
"""

import torch
from torch import Tensor

GATES = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}


def lstm_forward(ax: Tensor, ah: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    i, f, g, o = (ax + ah).chunk(4, -1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    c = f * c + i * g
    return o * c.tanh(), c, torch.cat([i, f, g, o], -1)


def lstm_backward(dm, dc, saved, m, c, h, c_prev) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    i, f, g, o = saved.chunk(4, -1)
    tanh_c = c.tanh()
    dc = dc + dm * o * (1 - tanh_c * tanh_c)
    da = torch.cat(
        [
            dc * g * i * (1 - i),
            dc * c_prev * f * (1 - f),
            dc * i * (1 - g * g),
            dm * tanh_c * o * (1 - o),
        ],
        -1,
    )
    return da, da, dc * f, torch.zeros_like(h)


def gru_forward(ax: Tensor, ah: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    ax_r, ax_z, ax_n = ax.chunk(3, -1)
    ah_r, ah_z, ah_n = ah.chunk(3, -1)
    r, z = (ax_r + ah_r).sigmoid(), (ax_z + ah_z).sigmoid()
    n = (ax_n + r * ah_n).tanh()
    return (1 - z) * n + z * h, c, torch.cat([r, z, n, ah_n], -1)


def gru_backward(dm, dc, saved, m, c, h, c_prev) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r, z, n, ah_n = saved.chunk(4, -1)
    dn = dm * (1 - z) * (1 - n * n)
    dr = dn * ah_n * r * (1 - r)
    dz = dm * (h - n) * z * (1 - z)
    return torch.cat([dr, dz, dn], -1), torch.cat([dr, dz, dn * r], -1), dc, dm * z


def tanh_forward(ax: Tensor, ah: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return (ax + ah).tanh(), c, ax[:, :0]


def tanh_backward(dm, dc, saved, m, c, h, c_prev) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    da = dm * (1 - m * m)
    return da, da, dc, torch.zeros_like(h)


def relu_forward(ax: Tensor, ah: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return (ax + ah).relu(), c, ax[:, :0]


def relu_backward(dm, dc, saved, m, c, h, c_prev) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    da = dm.masked_fill(m <= 0, 0)  # as torch: a gradient passes through NaN
    return da, da, dc, torch.zeros_like(h)


FORWARD = {
    "LSTM": lstm_forward,
    "GRU": gru_forward,
    "RNN_TANH": tanh_forward,
    "RNN_RELU": relu_forward,
}
BACKWARD = {
    "LSTM": lstm_backward,
    "GRU": gru_backward,
    "RNN_TANH": tanh_backward,
    "RNN_RELU": relu_backward,
}
