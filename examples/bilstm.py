"""What a pool lets through: the first word of a long sentence decides, and an LSTM has to say so.

    python examples/bilstm.py [--length 100] [--steps 150]

The last state of a forward LSTM has to carry the word over all steps; max pooling and attention
have the first state itself.
"""

import argparse

import torch

from seqkern.models.bilstm import POOLS, BiLSTMClassifier, BiLSTMConfig

SYMBOLS, LABELS, ROWS = 12, 4, 32


def draw(rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sentences (rows, length), their lengths, and their first words, which are the labels."""
    x = torch.randint(LABELS, SYMBOLS, (rows, length))
    x[:, 0] = torch.randint(LABELS, (rows,))
    return x, torch.full((rows,), length), x[:, 0].clone()


def accuracy_after(steps: int, pool: str, length: int) -> float:
    """The share of right labels on new sentences."""
    torch.manual_seed(1)
    config = BiLSTMConfig(
        *(SYMBOLS, LABELS), embedding=16, hidden=16, directions=1, pool=pool, dropout=0.0
    )
    model = BiLSTMClassifier(config)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(steps):
        loss = model.loss(*draw(ROWS, length))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x, lengths, y = draw(500, length)
    with torch.inference_mode():
        return (model(x, lengths).argmax(-1) == y).double().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=100)
    parser.add_argument("--steps", type=int, default=150)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for pool in POOLS:
        right = accuracy_after(arguments.steps, pool, arguments.length)
        print(f"{pool}\t{right:.1%} right")


if __name__ == "__main__":
    main()
