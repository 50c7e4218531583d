"""Shows where a self-attentive classifier looks: at the word that decides.

    python examples/self_attentive.py [--kind structured|heads] [--steps 250]

A sentence is a row of other words with one colour in it, which is its label.
"""

import argparse

import torch

from seqkern.models.self_attentive import KINDS, SelfAttentive, SelfAttentiveConfig

WORDS = ["<pad>", "red", "green", "blue", "a", "the", "bird", "sees", "near", "house", "we", "old"]
COLOURS, LENGTH = 3, 8


def draw(rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sentences (rows, LENGTH), their lengths, and their labels."""
    x = torch.randint(COLOURS + 1, len(WORDS), (rows, LENGTH))
    lengths, y = torch.randint(3, LENGTH + 1, (rows,)), torch.randint(COLOURS, (rows,))
    x[torch.arange(rows), (torch.rand(rows) * lengths).long()] = y + 1
    return x, lengths, y


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kind", choices=KINDS, default="structured")
    parser.add_argument("--steps", type=int, default=250)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(1)
    config = SelfAttentiveConfig(
        *(len(WORDS), COLOURS, arguments.kind),
        **{"embedding": 16, "hidden": 16, "attention": 16, "rows": 1, "heads": 2, "dropout": 0.0},
    )
    model = SelfAttentive(config)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(arguments.steps):
        loss = model.loss(*draw(32))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x, lengths, y = draw(500)
    with torch.inference_mode():
        right = (model(x, lengths).argmax(-1) == y).double().mean()
        print(f"{right:.1%} right; what each word of a sentence is given on average:")
        weights = model.attend(x[:4], lengths[:4], need_weights=True).weights
    for row, n, a in zip(x[:4].tolist(), lengths[:4].tolist(), weights, strict=True):
        of_words = a.flatten(0, -2).sum(0) / a.sum()  # over rows, or over heads and queries
        print("  ".join(f"{WORDS[w]} {of_words[t]:.0%}" for t, w in enumerate(row[:n])))


if __name__ == "__main__":
    main()
