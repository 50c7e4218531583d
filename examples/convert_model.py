"""A model that exists already, with its weights, on seqkern's layers: one call.

python examples/convert_model.py
"""

import torch
from torch import nn

import seqkern


class Tagger(nn.Module):
    """Stands for a model of someone else: x (B, T, 40) to tags (B, T, 9)."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.LSTM(40, 64, num_layers=2, bidirectional=True, batch_first=True)
        self.output = nn.Linear(128, 9)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.output(self.encoder(x)[0])


def main() -> None:
    torch.manual_seed(0)
    model = Tagger().eval()
    x = torch.randn(3, 25, 40)
    with torch.inference_mode():
        before = model(x)
        conversion = seqkern.convert(model)
        after = model(x)
    for swapped in conversion.swapped:
        new = f"{swapped.new.__module__}.{swapped.new.__name__}"
        print(f"{swapped.name}: {swapped.old.__name__} of torch.nn is now {new}")
    print(f"largest difference of the outputs: {(before - after).abs().max():.1e}")


if __name__ == "__main__":
    main()
