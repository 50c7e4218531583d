"""Layers and arguments that the tests of the recurrent ops share."""

import torch


def torch_layer(mode: str, I: int, H: int, **kwargs) -> torch.nn.RNNBase:
    if mode.startswith("RNN"):
        return torch.nn.RNN(I, H, nonlinearity=mode[4:].lower(), **kwargs)
    return getattr(torch.nn, mode)(I, H, **kwargs)


def states(mode: str, D: int, B: int, H: int, dtype=torch.float32, proj: int = 0):
    h0 = torch.randn(D, B, proj or H, dtype=dtype)
    return h0, torch.randn(D, B, H, dtype=dtype) if mode == "LSTM" else None


def layer_arguments(mode: str, T: int, B: int, I: int, H: int, D: int = 1, dtype=torch.float32):
    layer = torch_layer(mode, I, H, bidirectional=D == 2).to(dtype)
    weights = [w.detach() for w in layer._flat_weights]
    return (torch.randn(T, B, I, dtype=dtype), *states(mode, D, B, H, dtype), weights)
