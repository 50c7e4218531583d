"""A small character model, with seqkern's LSTM where torch.nn's stood: one import is different.

    python examples/drop_in_lstm.py [--steps 200]

The model learns to say which of its letters a string repeats. Both versions start from the same
weights, so their losses are equal up to rounding.
"""

import argparse
import time

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqkern.nn import LSTM  # was: from torch.nn import LSTM

LETTERS = 12


class Repeats(nn.Module):
    """Letters (B, T) to scores over the letters (B, LETTERS)."""

    def __init__(self, lstm: type[nn.Module], hidden: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(LETTERS, 16)
        self.lstm = lstm(16, hidden, batch_first=True, bidirectional=True)
        self.output = nn.Linear(2 * hidden, LETTERS)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.lstm(self.embed(x))
        return self.output(y.amax(1))


def strings(batch: int) -> tuple[Tensor, Tensor]:
    """Strings (B, 9) of eight different letters, one of them twice, and that letter (B,)."""
    x = torch.stack([torch.randperm(LETTERS)[:8] for _ in range(batch)])
    again = x.gather(1, torch.randint(8, (batch, 1)))
    x = torch.cat([x, again], 1)
    return x[:, torch.randperm(9)], again[:, 0]


def train(lstm: type[nn.Module], steps: int) -> tuple[list[float], float]:
    """The losses of all steps, and the seconds they took."""
    torch.manual_seed(0)
    model = Repeats(lstm)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    losses, started = [], time.perf_counter()
    for _ in range(steps):
        x, letter = strings(64)
        loss = F.cross_entropy(model(x), letter)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    steps = parser.parse_args().steps
    for lstm in (nn.LSTM, LSTM):
        losses, seconds = train(lstm, steps)
        print(f"{lstm.__module__}: loss {losses[0]:.6f} -> {losses[-1]:.6f} in {seconds:.1f} s")


if __name__ == "__main__":
    main()
