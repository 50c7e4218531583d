"""HyperLSTM: its equations, and what it is at first. The rest: tests/test_language_models.py."""

import pytest
import torch
from torch.nn import functional as F

from seqkern.models.hyperlstm import HyperLSTM, HyperLSTMConfig

SIZES = HyperLSTMConfig(11, embedding=5, hidden=7, hyper=4, z=3)


def make(layers="seqkern"):
    """A model none of whose parameters still has its first value, where the scales are alike."""
    torch.manual_seed(3)
    model = HyperLSTM(SIZES, layers).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def by_hand(model, x):
    """The module docstring's equations, gate by gate, for one text (T,): scores (T, V)."""
    p = dict(model.named_parameters())
    H, Z, small = SIZES.hidden, SIZES.z, SIZES.hyper

    def norm(u):
        centred = u - u.mean()
        return centred / torch.sqrt(centred.pow(2).mean() + 1e-5)

    h, c = torch.zeros(2, H, dtype=torch.float64)
    hyper_h, hyper_c = torch.zeros(2, small, dtype=torch.float64)
    scores = []
    for w in x:
        x_t = p["embed.weight"][w]
        sums = p["cell.hyper.weight_ih"] @ torch.cat([h, x_t]) + p["cell.hyper.bias_ih"]
        sums = sums + p["cell.hyper.weight_hh"] @ hyper_h + p["cell.hyper.bias_hh"]
        i, f, g, o = sums.chunk(4)
        hyper_c = torch.sigmoid(f) * hyper_c + torch.sigmoid(i) * torch.tanh(g)
        hyper_h = torch.sigmoid(o) * torch.tanh(hyper_c)
        z_h, z_x = (p["cell.z_hx.weight"] @ hyper_h + p["cell.z_hx.bias"]).view(2, 4, Z)
        z_b = (p["cell.z_b.weight"] @ hyper_h).view(4, Z)
        gates = []
        for y in range(4):
            W_h, W_x = p["cell.w_h.weight"].view(4, H, H)[y], p["w_x.weight"].view(4, H, -1)[y]
            d_h, d_x = z_h[y] @ p["cell.d"][y], z_x[y] @ p["cell.d"][4 + y]
            b = z_b[y] @ p["cell.w_bz"][y] + p["cell.b_0"][y, 0]
            u = norm(torch.diag(d_h) @ W_h @ h + torch.diag(d_x) @ W_x @ x_t + b)
            gates.append(u * p["cell.gain"][y, 0] + p["cell.shift"][y, 0])
        i, f, g, o = gates
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        normed = norm(c) * p["cell.norm_c.weight"] + p["cell.norm_c.bias"]
        h = torch.sigmoid(o) * torch.tanh(normed)
        scores.append(p["output.weight"] @ h + p["output.bias"])
    return torch.stack(scores)


@pytest.mark.parametrize("layers", ["torch", "seqkern"])
def test_scores_are_the_equations(layers):
    model, x = make(layers), torch.randint(11, (3, 6))
    scores, _ = model(x)
    for b, row in enumerate(x):
        torch.testing.assert_close(scores[b], by_hand(model, row), rtol=1e-10, atol=1e-11)


def test_at_first_it_is_a_normalised_lstm():
    """All factors are 0.1 and no bias is set, whatever the hyper network says."""
    torch.manual_seed(3)
    model = HyperLSTM(SIZES).double()
    cell, x = model.cell, torch.randint(11, (2, 5))
    hyper_h = torch.randn(2, 4, dtype=torch.float64)
    z = cell.z_hx(hyper_h).unflatten(-1, (8, -1)).transpose(0, 1)
    torch.testing.assert_close(z @ cell.d, torch.full((8, 2, 7), 0.1, dtype=torch.float64))
    scores, _ = model(x)
    with torch.no_grad():
        for parameter in cell.hyper.parameters():
            parameter.normal_()
    torch.testing.assert_close(model(x)[0], scores)


def test_the_hyper_network_learns():
    """Once the factors have moved, its weights take a gradient."""
    model, x = make(), torch.randint(11, (3, 6))
    scores, _ = model(x[:, :-1])
    F.cross_entropy(scores.flatten(0, 1), x[:, 1:].flatten()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 1e-6, name


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match="z must be at least 1, got 0"):
        HyperLSTMConfig(11, z=0)
    with pytest.raises(ValueError, match="layers must be one of"):
        HyperLSTM(SIZES, "cudnn")
