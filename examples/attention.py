"""A small causal model over strings of different lengths, padded and packed: one loss.

    python examples/attention.py [--steps 60]

Its attention has grouped heads, a sliding window and sinks. Each string repeats its first half, and
the model learns to predict the letters of the second half. Padded, `attention` takes the lengths;
packed, `attention_varlen` takes all strings in one row and computes nothing for padding.
"""

import argparse

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import seqkern

LETTERS, HEADS, KV_HEADS, SIZE, WINDOW = 8, 4, 2, 16, 12


class Block(nn.Module):
    """Causal attention over (..., T, HEADS * SIZE), padded or packed, and a layer after it."""

    def __init__(self) -> None:
        super().__init__()
        width = HEADS * SIZE
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, (HEADS + 2 * KV_HEADS) * SIZE)
        self.sinks = nn.Parameter(torch.zeros(HEADS))
        self.out = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, x: Tensor, lens: Tensor | None = None, cu: Tensor | None = None) -> Tensor:
        heads = self.qkv(self.norm(x)).unflatten(-1, (-1, SIZE))
        q, k, v = heads.split([HEADS, KV_HEADS, KV_HEADS], -2)
        rule = {"causal": "bottom_right", "window": (WINDOW - 1, 0), "sinks": self.sinks}
        if cu is None:
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            o = seqkern.attention(q, k, v, q_lens=lens, k_lens=lens, **rule).transpose(1, 2)
        else:
            o = seqkern.attention_varlen(q, k, v, cu, cu, **rule)
        return x + self.out(o.flatten(-2))


class Copies(nn.Module):
    """Letters (..., T) and their places in their strings to scores (..., T, LETTERS)."""

    def __init__(self) -> None:
        super().__init__()
        self.letter = nn.Embedding(LETTERS, HEADS * SIZE)
        self.place = nn.Embedding(2 * WINDOW, HEADS * SIZE)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.output = nn.Linear(HEADS * SIZE, LETTERS)

    def forward(self, x: Tensor, places: Tensor, **bounds: Tensor) -> Tensor:
        h = self.letter(x) + self.place(places)
        for block in self.blocks:
            h = block(h, **bounds)
        return self.output(h)


def strings(batch: int) -> list[Tensor]:
    """Strings of 4, 6 ... 20 letters whose second half is the first again."""
    halves = [torch.randint(LETTERS, (int(n),)) for n in torch.randint(2, 11, (batch,))]
    return [half.repeat(2) for half in halves]


def loss_of(scores: Tensor, rows: list[Tensor]) -> Tensor:
    """Of the letters of the second halves, each predicted from the one before; scores (N, LETTERS)
    of all strings in a row."""
    each = scores.split([len(r) for r in rows])
    scores = torch.cat([s[len(r) // 2 - 1 : -1] for s, r in zip(each, rows)])
    return F.cross_entropy(scores, torch.cat([r[len(r) // 2 :] for r in rows]))


def padded(model: Copies, rows: list[Tensor]) -> Tensor:
    x = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lens = torch.tensor([len(r) for r in rows])
    places = torch.arange(x.size(1))
    scores = model(x, places, lens=lens)
    return loss_of(scores[places < lens[:, None]], rows)


def packed(model: Copies, rows: list[Tensor]) -> Tensor:
    cu = torch.tensor([0, *(len(r) for r in rows)]).cumsum(0)
    places = torch.cat([torch.arange(len(r)) for r in rows])
    return loss_of(model(torch.cat(rows), places, cu=cu), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    steps = parser.parse_args().steps
    for form in (padded, packed):
        torch.manual_seed(0)
        model = Copies()
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        losses = []
        for _ in range(steps):
            loss = form(model, strings(32))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        print(f"{form.__name__}: loss {losses[0]:.6f} -> {losses[-1]:.6f}")
    q, k, v = torch.randn(32, HEADS, 20, SIZE), *torch.randn(2, 32, KV_HEADS, 20, SIZE)
    print(seqkern.explain(seqkern.attention, q, k, v, causal="bottom_right"))


if __name__ == "__main__":
    main()
