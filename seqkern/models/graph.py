"""Message passing on labelled graphs: gated graph network with syntactic gates.

The frame is the gated graph neural network (Li, Tarlow, Brockschmidt and Zemel, 2016): each node v
has a state, which takes in the messages of its neighbours by a GRU, T rounds with the same
parameters. The message along an edge is that of the syntactic graph convolution (Marcheggiani and
Titov, 2017, sections 3.1 and 3.2): it depends on the edge's label and direction, and has a gate.
With x_v the embedding of a node's symbol, and an edge u -> v of label l that is passed along it
(u to v) as well as against it (v to u), which d tells:

    h_v(0) = [x_v ; 0]                                              Li et al. (1)
    g_uv   = sigmoid(h_u . v^_d + b^_ld)                            the edge's gate
    a_v    = sum_u g_uv (V_d h_u + b_ld)                            in place of Li et al. (2)
    h_v(t) = GRU(h_v(t-1), a_v(t))                                  Li et al. (3) to (6)

and what is read of the states in the end is, by `readout`,

    "nodes"      y_v = W_s h_v + b_s                                at each node
    "max"        y = W_s max_v h_v + b_s                            over the nodes of a graph
    "attention"  y = W_s sum_v p_v h_v + b_s,   p_v = softmax_v(v_a . tanh(U_a h_v + b_a))

Deliberate differences: the GRU is PyTorch's reset-after one; a node's own state reaches it through
the GRU and needs no edge from a node to itself; the softmax over the nodes stands for the
sigmoids of Li et al. (7); and a label's bias and gate are of one direction each.

A batch is one graph whose parts are not connected, its edges sorted by the node at which they
arrive, so a sum over messages is done in one order whatever stands beside a graph; on a GPU that
takes torch.use_deterministic_algorithms. On seqkern's layers the GRU step is seqkern.nn.GRUCell
and the attention over nodes is seqkern.additive_attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from seqkern.models.common import check_sizes, layers_named
from seqkern.models.sequences import padding_of
from seqkern.ops.additive import additive_attention

READOUTS = ("nodes", "max", "attention")


@dataclass(frozen=True)
class GraphConfig:
    """Sizes of the model; symbol 0 is that of a node without a symbol.

    edge_labels: how many there are; edges: False takes the edges away, and leaves a bag of nodes.
    """

    symbols: int
    edge_labels: int
    labels: int
    embedding: int = 128
    hidden: int = 128
    attention: int = 64
    rounds: int = 4
    readout: str = "max"
    edges: bool = True
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.readout not in READOUTS:
            raise ValueError(f"readout must be one of {READOUTS}, got {self.readout!r}")
        check_sizes(self, shares=("dropout",))
        if self.embedding > self.hidden:
            raise ValueError(
                f"embedding must be at most hidden, {self.hidden}, got {self.embedding}"
            )


class Graph(NamedTuple):
    """One graph: a symbol for each node, 0 for none, and edges (from, to, label)."""

    symbols: Sequence[int]
    edges: Sequence[tuple[int, int, int]]


class Graphs(NamedTuple):
    """A batch of graphs as one: N nodes and, each edge in both directions, M messages.

    symbols: (N,) int64; sender: (M,) int64, 2 u + d of the node u that a message leaves, d being 0
    along the edge and 1 against it; receiver: (M,) int64, ascending; kind: (M,) int64, 2 l + d of
    the edge's label l; sizes: nodes of each graph.
    """

    symbols: Tensor
    sender: Tensor
    receiver: Tensor
    kind: Tensor
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, graphs: Sequence[Graph]) -> Graphs:
        """A batch of at least one graph, nodes numbered through.

        Raises:
            ValueError: there is no graph, or one has no node, or an edge with an end that is no
                node of it. The message counts graphs from 0.
        """
        if not graphs:
            raise ValueError("Graphs: expected at least one graph, got none")
        edges, start = [np.empty((0, 3), np.int64)], 0
        for number, (symbols, of_graph) in enumerate(graphs):
            ends = np.asarray(of_graph, np.int64).reshape(-1, 3)
            if not len(symbols):
                raise ValueError(f"Graphs: expected at least one node, got none in graph {number}")
            if ends.size and (ends.min() < 0 or ends[:, :2].max() >= len(symbols)):
                raise ValueError(
                    f"Graphs: edges must be (from, to, label), two of {len(symbols)} nodes and a "
                    f"label from 0, got {list(of_graph)} in graph {number}"
                )
            edges.append(ends + np.array([start, start, 0]))
            start += len(symbols)
        source, target, label = np.concatenate(edges).T
        sender = np.concatenate([2 * source, 2 * target + 1])
        receiver = np.concatenate([target, source])
        kind = np.concatenate([2 * label, 2 * label + 1])
        order = np.lexsort((kind, sender, receiver))
        return cls(
            torch.tensor([symbol for graph in graphs for symbol in graph.symbols]),
            torch.from_numpy(sender[order]),
            torch.from_numpy(receiver[order]),
            torch.from_numpy(kind[order]),
            tuple(len(graph.symbols) for graph in graphs),
        )

    def to(self, device: torch.device | str) -> Graphs:
        """The batch on a device."""
        symbols, sender, receiver, kind = (t.to(device) for t in self[:4])
        return Graphs(symbols, sender, receiver, kind, self.sizes)


class GraphNet(nn.Module):
    """The model of the module docstring.

    Args:
        config: sizes.
        layers: "seqkern" or "torch", where the GRU cell and the attention over nodes come from.
            Parameters have the same names and, under the same seed, the same values in both, so
            one state_dict serves either.
    """

    def __init__(self, config: GraphConfig, layers: str = "seqkern") -> None:
        super().__init__()
        self.config, self.layers = config, layers
        D, H = config.embedding, config.hidden
        self.embed = nn.Embedding(config.symbols, D, padding_idx=0)
        self.message = nn.Linear(H, 2 * H, bias=False)  # V_d, along and against
        self.gate = nn.Linear(H, 2, bias=False)  # v^_d
        self.message_bias = nn.Embedding(2 * config.edge_labels, H)  # b_ld
        self.gate_bias = nn.Embedding(2 * config.edge_labels, 1)  # b^_ld
        self.update = layers_named(layers).GRUCell(H, H)
        if config.readout == "attention":
            self.u_a = nn.Linear(H, config.attention)
            self.v_a = nn.Parameter(torch.empty(config.attention))
            nn.init.uniform_(self.v_a, -(config.attention**-0.5), config.attention**-0.5)
        self.output = nn.Linear(H, config.labels)
        self.dropout = nn.Dropout(config.dropout)
        nn.init.zeros_(self.message_bias.weight)
        nn.init.zeros_(self.gate_bias.weight)

    def forward(self, graphs: Graphs) -> Tensor:
        """Unnormalised scores of the labels: (N, labels) with the readout "nodes", else one row a
        graph, (B, labels).

        Raises:
            ValueError: an edge has a label that the model does not.
        """
        h = self.states(graphs)
        if self.config.readout == "max":
            h = pad_sequence(list(h.split(graphs.sizes)), True, -torch.inf).max(1).values
        elif self.config.readout == "attention":
            h = self._attend(h, graphs.sizes)
        return self.output(self.dropout(h))

    def states(self, graphs: Graphs) -> Tensor:
        """h_v of every node after all rounds, (N, H)."""
        kinds = 2 * self.config.edge_labels
        if len(graphs.kind) and int(graphs.kind.max()) >= kinds:
            raise ValueError(
                f"GraphNet: edge labels must be below {self.config.edge_labels}, "
                f"got {int(graphs.kind.max()) // 2}"
            )
        D, H = self.config.embedding, self.config.hidden
        h = F.pad(self.dropout(self.embed(graphs.symbols)), (0, H - D))
        b, b_gate = self.message_bias(graphs.kind), self.gate_bias(graphs.kind)
        for _ in range(self.config.rounds):
            a = torch.zeros_like(h)
            if self.config.edges:
                gate = self.gate(h).view(-1, 1).index_select(0, graphs.sender) + b_gate
                message = self.message(h).view(-1, H).index_select(0, graphs.sender) + b
                a = a.index_add(0, graphs.receiver, torch.sigmoid(gate) * message)
            h = self.update(a, h).to(h.dtype)  # under autocast the states stay in float32
        return h

    def _attend(self, h: Tensor, sizes: tuple[int, ...]) -> Tensor:
        """sum_v p_v h_v of each graph, (B, H), of h (N, H)."""
        k_lens = torch.tensor(sizes, device=h.device)
        key, value = (pad_sequence(list(t.split(sizes)), True) for t in (self.u_a(h), h))
        if self.layers == "seqkern":
            query = key.new_zeros(len(sizes), 1, key.size(2))
            return additive_attention(query, key, value, self.v_a, k_lens=k_lens).squeeze(1)
        e = (torch.tanh(key) @ self.v_a).masked_fill(padding_of(k_lens, key.size(1)), -torch.inf)
        return (e.softmax(1).unsqueeze(1) @ value).squeeze(1)
