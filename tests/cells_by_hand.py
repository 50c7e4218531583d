"""The recurrent cells' equations, a step at a time, on the parameters of torch.nn's layers."""

from collections.abc import Mapping

import torch
from torch import Tensor


def gates(p: Mapping[str, Tensor], name: str, suffix: str, x: Tensor, h: Tensor):
    """W_ih x + b_ih and W_hh h + b_hh of the layer `name`, whose weights end in `suffix`."""
    ih = p[f"{name}.weight_ih{suffix}"] @ x + p[f"{name}.bias_ih{suffix}"]
    hh = p[f"{name}.weight_hh{suffix}"] @ h + p[f"{name}.bias_hh{suffix}"]
    return ih, hh


def gru_step(p: Mapping[str, Tensor], name: str, suffix: str, x: Tensor, h: Tensor) -> Tensor:
    """h_t of x (I,) and h_{t-1} (H,)."""
    ih, hh = gates(p, name, suffix, x, h)
    (ir, iz, i_n), (hr, hz, hn) = ih.chunk(3), hh.chunk(3)
    r, z = torch.sigmoid(ir + hr), torch.sigmoid(iz + hz)
    return (1 - z) * torch.tanh(i_n + r * hn) + z * h


def lstm_states(p: Mapping[str, Tensor], name: str, suffix: str, x: Tensor) -> Tensor:
    """h_1 .. h_T (T, H) of x (T, I), in float64."""
    h = c = torch.zeros(p[f"{name}.weight_hh{suffix}"].size(1), dtype=torch.float64)
    states = []
    for x_t in x:
        i, f, g, o = sum(gates(p, name, suffix, x_t, h)).chunk(4)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        states.append(h)
    return torch.stack(states)


def bilstm_states(p: Mapping[str, Tensor], name: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """The states (T, H) of both directions, each at the place of its input."""
    return (
        lstm_states(p, name, "_l0", x),
        lstm_states(p, name, "_l0_reverse", x.flip(0)).flip(0),
    )
