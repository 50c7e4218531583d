"""A decoder-only Transformer language model (Radford et al., 2019, on Vaswani et al., 2017).

Text w_1 .. w_T, T at most the context C. In the letters of Vaswani et al., the number of an
equation or section is theirs:

    h_t = E w_t + P_t                                          learnt positions            (3.5)
    a   = h + W^O Concat(head_1 .. head_n)                     of LN(h)                  (3.2.2)
    head = softmax(Q K^T / sqrt(d_k)) V, with no key after its query                    (1), (3.2.3)
    h'  = a + W_2 gelu(W_1 LN(a))                              for each of L blocks          (2)
    p(w_t+1 | w_1 .. w_t) = softmax(E LN(h_t^L))               output tied to E            (3.4)

Deliberate differences, all of Radford et al.: LN stands before each part and once more at the
end, gelu in place of ReLU, learnt positions in place of sines, all weights from N(0, 0.02), those
that end a residual branch divided by sqrt(2 L). Besides, E is not scaled by sqrt(d) and there are
no biases but those of the layer norms.

The state of the model is its keys and values: with the state of w_1 .. w_t, `forward` computes
w_t+1 alone. A text longer than the context has to be read in windows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqkern.models.common import check_sizes, layers_named
from seqkern.ops.attention import attention

State = tuple[Tensor, ...]


@dataclass(frozen=True)
class TransformerLMConfig:
    """Sizes of the model; `symbols` is V, `width` d, `context` C, `depth` L."""

    symbols: int
    width: int = 128
    heads: int = 4
    depth: int = 4
    context: int = 64
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_sizes(self, shares=("dropout",))
        if self.width % self.heads:
            raise ValueError(
                f"width must be a multiple of heads, got {self.width} and {self.heads}"
            )


class Block(nn.Module):
    """Causal self-attention and the feed-forward layer, each on a residual branch."""

    def __init__(self, config: TransformerLMConfig, layers: str) -> None:
        super().__init__()
        d = config.width
        self.layers, self.heads, self.p = layers, config.heads, config.dropout
        self.norm_1, self.norm_2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv = nn.Linear(d, 3 * d, bias=False)
        self.w_o = nn.Linear(d, d, bias=False)
        self.w_1 = nn.Linear(d, 4 * d, bias=False)
        self.w_2 = nn.Linear(4 * d, d, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, h: Tensor, past: State | None) -> tuple[Tensor, State]:
        """h (B, T, d); past keys and values (B, n, t, d / n). Returns h' and all of them."""
        qkv = self.qkv(self.norm_1(h)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, n, T, D)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        o = self._attend(q, k, v).transpose(1, 2).flatten(2)
        a = h + self.dropout(self.w_o(o))
        return a + self.dropout(self.w_2(F.gelu(self.w_1(self.norm_2(a))))), (k, v)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        p = self.p if self.training else 0.0
        if self.layers == "seqkern":
            return attention(q, k, v, causal="bottom_right", dropout_p=p)
        T, all_keys = q.size(2), k.size(2)
        if all_keys == T:
            return F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
        seen = torch.ones(T, all_keys, dtype=torch.bool, device=q.device).tril(all_keys - T)
        return F.scaled_dot_product_attention(q, k, v, seen, dropout_p=p)


class TransformerLM(nn.Module):
    """The model of the module docstring.

    Args:
        config: sizes.
        layers: "seqkern" or "torch", whose attention is called. Parameters have the same names
            and, under the same seed, the same values in both.
    """

    carries = False  # every window of training begins at the first position

    def __init__(self, config: TransformerLMConfig, layers: str = "seqkern") -> None:
        super().__init__()
        layers_named(layers)
        self.config, self.layers = config, layers
        self.embed = nn.Embedding(config.symbols, config.width)
        self.positions = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config, layers) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)
        self.output = nn.Linear(config.width, config.symbols, bias=False)
        self.output.weight = self.embed.weight
        self.dropout = nn.Dropout(config.dropout)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                ends_branch = name.endswith(("w_o.weight", "w_2.weight"))
                std = 0.02 * (2 * config.depth) ** -0.5 if ends_branch else 0.02
                nn.init.normal_(parameter, std=std)

    @property
    def context(self) -> int:
        """The longest text that the model can read: positions and state together."""
        return self.config.context

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Scores of the symbol after each one of `x`.

        Args:
            x: (B, T) int64.
            state: keys and values of the text before, (B, n, t, d / n) each, those of the first
                block first, as the call before returned them; None for its beginning.

        Returns:
            Unnormalised scores (B, T, V), and the state after the last symbol.

        Raises:
            ValueError: `x` has no symbol or is not (B, T), t + T is more than the context, or
                `state` is not of this model.
        """
        if x.dim() != 2 or not x.numel():
            raise ValueError(f"TransformerLM: x must be (B, T), B, T >= 1, got {tuple(x.shape)}")
        if state is not None and len(state) != 2 * len(self.blocks):
            raise ValueError(
                f"TransformerLM: state must have {2 * len(self.blocks)} parts, got {len(state)}"
            )
        before = 0 if state is None else state[0].size(2)
        if before + x.size(1) > self.context:
            raise ValueError(
                f"TransformerLM: the context is {self.context} symbols, got {before} before "
                f"and {x.size(1)} new ones"
            )
        positions = torch.arange(before, before + x.size(1), device=x.device)
        h = self.dropout(self.embed(x) + self.positions(positions))
        present: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            h, kv = block(h, None if state is None else state[2 * i : 2 * i + 2])
            present += kv
        return self.output(self.norm(h)), tuple(present)
