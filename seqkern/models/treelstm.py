"""Tree-LSTM: a long short-term memory along the branches of a tree (Tai, Socher and Manning, 2015).

Node j of a tree has an input x_j, which may be missing, and children C(j), k = 1 .. |C(j)| in
their order. In the paper's letters, the Child-Sum Tree-LSTM, kind "childsum":

    h~_j = sum_k h_k                                                        (2)
    i_j  = sigmoid(W_i x_j + U_i h~_j + b_i)                                (3)
    f_jk = sigmoid(W_f x_j + U_f h_k + b_f)                                 (4)
    o_j  = sigmoid(W_o x_j + U_o h~_j + b_o)                                (5)
    u_j  = tanh(W_u x_j + U_u h~_j + b_u)                                   (6)
    c_j  = i_j u_j + sum_k f_jk c_k                                         (7)
    h_j  = o_j tanh(c_j)                                                    (8)

and the N-ary Tree-LSTM, kind "nary", where a child's place has matrices of its own:

    i_j  = sigmoid(W_i x_j + sum_l U_il h_jl + b_i)                         (9)
    f_jk = sigmoid(W_f x_j + sum_l U_fkl h_jl + b_f)                        (10)
    o_j  = sigmoid(W_o x_j + sum_l U_ol h_jl + b_o)                         (11)
    u_j  = tanh(W_u x_j + sum_l U_ul h_jl + b_u)                            (12)
    c_j  = i_j u_j + sum_l f_jl c_jl                                        (13)
    h_j  = o_j tanh(c_j)                                                    (14)

    p(y | j) = softmax(W_s h_j + b_s)                                       (section 4.1)

Deliberate differences: a node of the N-ary kind may have fewer than N children, a missing one
counts as h = c = 0; and the N-ary kind lets inner nodes have an input, which a constituency tree
does not use.

All nodes of one height, over all trees of a batch, are computed together: one product with U a
height, and one with W for the whole batch. A state goes straight to the height of its parent, so
time and memory grow with the number of nodes, whatever the trees look like. `node_by_node` is the
same network one node at a time. No kernel of seqkern fits a cell with several children, so both
kinds of layers are the same code; `layers` is checked and kept, as in the other models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from seqkern.models.common import check_sizes, layers_named
from seqkern.models.sequences import small_embedding

KINDS = ("nary", "childsum")
NO_SYMBOL = 0
NO_PARENT = -1


@dataclass(frozen=True)
class TreeLSTMConfig:
    """Sizes of the model; symbol 0 is that of a node without an input.

    children: N of the N-ary kind; the child-sum kind takes any number and does not look at it.
    """

    symbols: int
    labels: int
    embedding: int = 300
    hidden: int = 150
    kind: str = "nary"
    children: int = 2
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {KINDS}, got {self.kind!r}")
        check_sizes(self, shares=("dropout",))


class Tree(NamedTuple):
    """One tree, its nodes in any order; siblings stand in the order of their numbers.

    symbols: a number for each node, 0 for none; parents: each node's parent, -1 for the root.
    """

    symbols: Sequence[int]
    parents: Sequence[int]


class Level(NamedTuple):
    """The nodes of one height, in the order in which the level computes them.

    size: how many; inputs: (n_x,) those with a symbol; parent: (n_k,) for every child of theirs,
    as the states come in from the levels below, its parent's place here; slot: (n_k,) which child
    of it, from 0; above, counts: this level's nodes, cut by the level of their parents.
    """

    size: int
    inputs: Tensor
    parent: Tensor
    slot: Tensor
    above: tuple[int, ...]
    counts: tuple[int, ...]


class Forest(NamedTuple):
    """A batch of trees, planned: N nodes of all trees in one row.

    symbols: (n_x,) int64, those that are not 0, in the order of the levels; levels: from the
    leaves up; place: (N,) int64, where in the levels' order a node is; roots: (B,) int64 nodes;
    widest: most children of a node.
    """

    symbols: Tensor
    levels: tuple[Level, ...]
    place: Tensor
    roots: Tensor
    widest: int

    @classmethod
    def of(cls, trees: Sequence[Tree]) -> Forest:
        """Plans a batch of at least one tree; nodes are numbered through, tree after tree.

        Raises:
            ValueError: there is no tree; or one has no node, not as many symbols as parents, a
                parent that is no node of it, more or less than one root, or a cycle. The message
                counts trees from 0.
        """
        if not trees:
            raise ValueError("Forest: expected at least one tree, got none")
        for number, tree in enumerate(trees):
            _check_tree(number, tree)
        sizes = np.array([len(tree.parents) for tree in trees])
        starts = np.repeat(sizes.cumsum() - sizes, sizes)
        symbols = np.concatenate([np.asarray(tree.symbols, np.int64) for tree in trees])
        parents = np.concatenate([np.asarray(tree.parents, np.int64) for tree in trees])
        parents = np.where(parents == NO_PARENT, NO_PARENT, parents + starts)
        height = _heights(parents)
        if (height < 0).any():
            tree = np.searchsorted(sizes.cumsum(), np.flatnonzero(height < 0)[0], "right")
            raise ValueError(f"Forest: tree {tree} has a cycle")
        levels, order = _levels(symbols, parents, height)
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        present = order[symbols[order] != NO_SYMBOL]
        return cls(
            torch.from_numpy(symbols[present]),
            levels,
            torch.from_numpy(place),
            torch.from_numpy(np.flatnonzero(parents == NO_PARENT)),
            int(np.bincount(parents + 1, minlength=2)[1:].max()),
        )

    def to(self, device: torch.device | str) -> Forest:
        """The batch on a device."""
        levels = (
            level._replace(
                inputs=level.inputs.to(device),
                parent=level.parent.to(device),
                slot=level.slot.to(device),
            )
            for level in self.levels
        )
        symbols, place, roots = (t.to(device) for t in (self.symbols, self.place, self.roots))
        return Forest(symbols, tuple(levels), place, roots, self.widest)


def _levels(
    symbols: NDArray[np.int64], parents: NDArray[np.int64], height: NDArray[np.int64]
) -> tuple[tuple[Level, ...], NDArray[np.int64]]:
    """The levels of a batch, and its nodes in their order."""
    # Nodes by height, and within one by the height of the parent: what a level sends to one
    # level above is one piece. A root's parent is above all levels.
    n_levels = int(height.max()) + 1
    above = np.where(parents == NO_PARENT, n_levels, height[parents])
    order = np.lexsort((above, height))
    arriving = order[np.argsort(above[order], kind="stable")]
    starts = np.searchsorted(height[order], np.arange(n_levels + 1))
    arrivals = np.searchsorted(above[arriving], np.arange(n_levels + 1))
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    slots = _slots(parents)
    levels = []
    for level in range(n_levels):
        nodes = order[starts[level] : starts[level + 1]]
        children = arriving[arrivals[level] : arrivals[level + 1]]
        receivers, counts = np.unique(above[nodes], return_counts=True)
        levels.append(
            Level(
                len(nodes),
                torch.from_numpy(np.flatnonzero(symbols[nodes] != NO_SYMBOL)),
                torch.from_numpy(place[parents[children]] - starts[level]),
                torch.from_numpy(slots[children]),
                tuple(receivers.tolist()),
                tuple(counts.tolist()),
            )
        )
    return tuple(levels), order


def _check_tree(number: int, tree: Tree) -> None:
    """Raises unless each node has a symbol and a parent of the tree, and one node is the root."""
    n = len(tree.parents)
    if not n or len(tree.symbols) != n:
        raise ValueError(
            f"Forest: expected a symbol and a parent for each node, at least one, "
            f"got {len(tree.symbols)} and {n} in tree {number}"
        )
    if min(tree.parents) < NO_PARENT or max(tree.parents) >= n:
        raise ValueError(
            f"Forest: parents must be in -1 .. {n - 1}, "
            f"got {min(tree.parents)} .. {max(tree.parents)} in tree {number}"
        )
    if (roots := sum(parent == NO_PARENT for parent in tree.parents)) != 1:
        raise ValueError(f"Forest: expected one root, got {roots} in tree {number}")


def _heights(parents: NDArray[np.int64]) -> NDArray[np.int64]:
    """Each node's longest way down to a leaf; -1 for those above which there is a cycle."""
    waiting = np.bincount(parents[parents != NO_PARENT], minlength=len(parents))
    height = np.full(len(parents), -1)
    level, nodes = 0, np.flatnonzero(waiting == 0)
    while nodes.size:
        height[nodes] = level
        above = parents[nodes]
        above, done = np.unique(above[above != NO_PARENT], return_counts=True)
        waiting[above] -= done
        level, nodes = level + 1, above[waiting[above] == 0]
    return height


def _slots(parents: NDArray[np.int64]) -> NDArray[np.int64]:
    """Which child of its parent each node is, from 0."""
    order = np.argsort(parents, kind="stable")
    siblings = parents[order]
    slots = np.empty_like(order)
    slots[order] = np.arange(len(order)) - np.searchsorted(siblings, siblings)
    return slots


class ChildSumCell(nn.Module):
    """(2) to (8). Parameters: w (4H, D) and its bias (4H,), u (4H, H), rows in the order i o u f.

    Args:
        D: features of an input.
        H: units of the states.
    """

    def __init__(self, D: int, H: int) -> None:
        super().__init__()
        self.w, self.u = nn.Linear(D, 4 * H), nn.Linear(H, 4 * H, bias=False)

    def forward(self, a: Tensor, h: Tensor, c: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        """a (n, 4H) = W x + b, h and c (n_k, H) of the children. Returns h_j and c_j (n, H)."""
        H = h.size(1)
        h_sum = h.new_zeros(level.size, H).index_add(0, level.parent, h)  # (2)
        u_iou, u_f = self.u.weight.split((3 * H, H))
        iou = torch.addmm(a[:, : 3 * H], h_sum, u_iou.T)
        f = torch.sigmoid(torch.addmm(a[:, 3 * H :].index_select(0, level.parent), h, u_f.T))
        return _state(iou, h.new_zeros(level.size, H).index_add(0, level.parent, f * c))

    def node(self, x: Tensor | None, h: list[Tensor], c: list[Tensor]) -> tuple[Tensor, Tensor]:
        """One node: x (D,) or None, h and c a list of (H,). Returns h_j and c_j."""
        H = self.u.in_features
        u_iou, u_f = self.u.weight.split((3 * H, H))
        a = self.w.bias if x is None else self.w(x)
        iou, a_f = a.split((3 * H, H))
        if not h:
            return _state(iou, torch.zeros_like(a_f))
        f_c = [torch.sigmoid(a_f + u_f @ h_k) * c_k for h_k, c_k in zip(h, c, strict=True)]
        return _state(iou + u_iou @ torch.stack(h).sum(0), torch.stack(f_c).sum(0))


class NaryCell(nn.Module):
    """(9) to (14). Parameters: w (4H, D) and its bias (4H,), rows in the order i o u f, and
    u (3H + N H, N H), rows i o u f_1 .. f_N, columns h_1 .. h_N.

    Args:
        D: features of an input.
        H: units of the states.
        N: most children of a node.
    """

    def __init__(self, D: int, H: int, N: int) -> None:
        super().__init__()
        self.w, self.u = nn.Linear(D, 4 * H), nn.Linear(N * H, (3 + N) * H, bias=False)
        self.N = N

    def forward(self, a: Tensor, h: Tensor, c: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        """a (n, 4H) = W x + b, h and c (n_k, H) of the children. Returns h_j and c_j (n, H)."""
        H, N = h.size(1), self.N
        seat = level.parent * N + level.slot
        seats = h.new_zeros(level.size * N, H)
        h, c = seats.index_copy(0, seat, h), seats.index_copy(0, seat, c)
        a = torch.cat([a, a[:, 3 * H :].repeat(1, N - 1)], 1)  # W_f x + b_f is that of every f_k
        iou, f = torch.addmm(a, h.view(-1, N * H), self.u.weight.T).split((3 * H, N * H), 1)
        return _state(iou, (torch.sigmoid(f).view(-1, N, H) * c.view(-1, N, H)).sum(1))

    def node(self, x: Tensor | None, h: list[Tensor], c: list[Tensor]) -> tuple[Tensor, Tensor]:
        """One node: x (D,) or None, h and c a list of (H,). Returns h_j and c_j."""
        H = self.w.out_features // 4
        iou, a_f = (self.w.bias if x is None else self.w(x)).split((3 * H, H))
        if not h:
            return _state(iou, torch.zeros_like(a_f))
        u = self.u.weight[:, : len(h) * H] @ torch.cat(h)
        f = torch.sigmoid(a_f + u[3 * H :].view(self.N, H)[: len(h)])
        return _state(iou + u[: 3 * H], (f * torch.stack(c)).sum(0))


def _state(iou: Tensor, f_c: Tensor) -> tuple[Tensor, Tensor]:
    """h_j and c_j (.., H) of the sums in i, o and u (.., 3H) and of sum_k f_jk c_k (.., H)."""
    i, o, u = iou.to(f_c.dtype).chunk(3, -1)  # under autocast the states stay in float32
    c = torch.addcmul(f_c, torch.sigmoid(i), torch.tanh(u))
    return torch.sigmoid(o) * torch.tanh(c), c


class TreeLSTM(nn.Module):
    """The model of the module docstring.

    Args:
        config: sizes.
        layers: "seqkern" or "torch"; both are the same code here.
    """

    def __init__(self, config: TreeLSTMConfig, layers: str = "seqkern") -> None:
        super().__init__()
        layers_named(layers)
        self.config, self.layers = config, layers
        D, H = config.embedding, config.hidden
        self.embed = small_embedding(config.symbols, D, NO_SYMBOL)
        self.cell = (
            ChildSumCell(D, H) if config.kind == "childsum" else NaryCell(D, H, config.children)
        )
        self.output = nn.Linear(H, config.labels)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, forest: Forest) -> Tensor:
        """Unnormalised scores of the labels at every node, (N, labels), in the trees' order.

        Raises:
            ValueError: a node has more children than the N-ary kind has matrices for.
        """
        return self.output(self.dropout(self.states(forest)))

    def states(self, forest: Forest) -> Tensor:
        """h_j of every node, (N, H), in the trees' order; see forward."""
        self._check(forest)
        w, H = self.cell.w, self.config.hidden
        x = self.dropout(self.embed(forest.symbols))
        w_x = F.linear(x, w.weight).to(w.bias.dtype)
        w_x = w_x.split([len(level.inputs) for level in forest.levels])
        received: list[list[tuple[Tensor, Tensor]]] = [[] for _ in forest.levels]
        states = []
        for level, w_x_level, children in zip(forest.levels, w_x, received, strict=True):
            a = w.bias.expand(level.size, -1)
            if len(level.inputs) == level.size:
                a = a + w_x_level
            elif len(level.inputs):
                a = a.index_add(0, level.inputs, w_x_level)
            if children:
                h, c = (torch.cat(s) for s in zip(*children, strict=True))
                h, c = self.cell(a, h, c, level)
            else:
                h, c = _state(a[:, : 3 * H], a.new_zeros(level.size, H))
            states.append(h)
            pieces = zip(level.above, h.split(level.counts), c.split(level.counts), strict=True)
            for above, h_piece, c_piece in pieces:
                if above < len(received):
                    received[above].append((h_piece, c_piece))
        return torch.cat(states).index_select(0, forest.place)

    def node_by_node(self, trees: Sequence[Tree]) -> Tensor:
        """What forward returns, by one cell a node: the plain way, for comparison."""
        forest = Forest.of(trees)
        self._check(forest)
        states = [h for tree in trees for h in self._states_of(tree)]
        return self.output(self.dropout(torch.stack(states)))

    def _states_of(self, tree: Tree) -> list[Tensor]:
        """h_j of each node of a tree, a list of (H,)."""
        children: list[list[int]] = [[] for _ in tree.parents]
        for node, parent in enumerate(tree.parents):
            if parent != NO_PARENT:
                children[parent].append(node)
        # Parents before their children, whose states are computed first, so in reverse.
        order = [tree.parents.index(NO_PARENT)]
        for node in order:
            order += children[node]
        h, c = {}, {}
        for node in reversed(order):
            symbol = torch.tensor(tree.symbols[node], device=self.embed.weight.device)
            x = self.dropout(self.embed(symbol)) if tree.symbols[node] != NO_SYMBOL else None
            below = children[node]
            h[node], c[node] = self.cell.node(x, [h[k] for k in below], [c[k] for k in below])
        return [h[node] for node in range(len(order))]

    def _check(self, forest: Forest) -> None:
        if self.config.kind == "nary" and forest.widest > self.config.children:
            raise ValueError(
                f"TreeLSTM: nodes may have {self.config.children} children, the model's number, "
                f"got one with {forest.widest}"
            )
