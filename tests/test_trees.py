"""The Tree-LSTM: its equations, and heights in one go against one node at a time."""

import random
import sys
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from seqkern.models.treelstm import Forest, Tree, TreeLSTM, TreeLSTMConfig

SIZES = TreeLSTMConfig(symbols=12, labels=4, embedding=5, hidden=3, kind="nary", children=3)
KINDS = ["nary", "childsum"]


def random_tree(rng, nodes, widest=3, bare=0.4):
    """Nodes in any order; each has up to `widest` children and, but for some, a symbol."""
    parents, free = [-1], [0] * widest
    for node in range(1, nodes):
        parents.append(free.pop(rng.randrange(len(free))))
        free += [node] * widest
    names = list(range(nodes))
    rng.shuffle(names)
    shuffled = [-1] * nodes
    for node, parent in enumerate(parents):
        shuffled[names[node]] = -1 if parent < 0 else names[parent]
    symbols = [0 if rng.random() < bare else rng.randrange(1, 12) for _ in range(nodes)]
    return Tree(symbols, shuffled)


def chain(nodes):
    return Tree([1 + i % 11 for i in range(nodes)], [*range(1, nodes), -1])


def trees_of_many_shapes(widest=3):
    """Single nodes with and without a symbol, a chain, a wide node, a comb and random ones."""
    rng = random.Random(5)
    comb = Tree([2, 0, 3, 0, 4, 0, 5], [1, 3, 3, 5, 5, -1, 5])
    wide = Tree([1, *range(2, 2 + widest)], [-1, *[0] * widest])
    single = [Tree([7], [-1]), Tree([0], [-1])]
    return [*single, chain(9), wide, comb, *(random_tree(rng, n, widest) for n in (2, 5, 17, 40))]


def by_hand(model, tree, node):
    """(2) to (14) of the module docstring, one gate after the other: h and c of a node."""
    p = dict(model.named_parameters())
    H = model.config.hidden
    x = p["embed.weight"][tree.symbols[node]]  # row 0, of no symbol, is zeros
    W = dict(zip("iouf", p["cell.w.weight"].split(H), strict=True))
    b = dict(zip("iouf", p["cell.w.bias"].split(H), strict=True))
    children = [k for k, parent in enumerate(tree.parents) if parent == node]
    states = [by_hand(model, tree, k) for k in children]
    sums = {gate: W[gate] @ x + b[gate] for gate in "iou"}
    forget = []
    if model.config.kind == "childsum":
        U = dict(zip("iouf", p["cell.u.weight"].split(H), strict=True))
        h_sum = sum((h for h, _ in states), torch.zeros(H, dtype=x.dtype))
        for gate in "iou":
            sums[gate] = sums[gate] + U[gate] @ h_sum
        forget = [torch.sigmoid(W["f"] @ x + U["f"] @ h + b["f"]) for h, _ in states]
    else:
        rows = p["cell.u.weight"].split(H)
        for gate, row in zip("iou", rows[:3], strict=True):
            for (h, _), U in zip(states, row.split(H, 1), strict=False):
                sums[gate] = sums[gate] + U @ h
        for k in range(len(states)):
            f = W["f"] @ x + b["f"]
            for (h, _), U in zip(states, rows[3 + k].split(H, 1), strict=False):
                f = f + U @ h
            forget.append(torch.sigmoid(f))
    c = torch.sigmoid(sums["i"]) * torch.tanh(sums["u"])
    for f, (_, c_k) in zip(forget, states, strict=True):
        c = c + f * c_k
    return torch.sigmoid(sums["o"]) * torch.tanh(c), c


@pytest.mark.parametrize("kind", KINDS)
def test_states_are_the_equations(kind):
    model = TreeLSTM(replace(SIZES, kind=kind)).double()
    trees = trees_of_many_shapes()
    states = model.states(Forest.of(trees))
    expected = [by_hand(model, tree, node)[0] for tree in trees for node in range(len(tree[0]))]
    torch.testing.assert_close(states, torch.stack(expected), rtol=1e-12, atol=1e-14)
    scores = model(Forest.of(trees))
    p = model.output
    torch.testing.assert_close(scores, states @ p.weight.T + p.bias, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("bare", [0.0, 0.4, 1.0], ids=["all", "some", "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_heights_together_are_nodes_one_by_one(kind, bare):
    """Forward and every gradient, where all nodes, some or none have a symbol."""
    rng = random.Random(3)
    widest = 3 if kind == "nary" else 12
    trees = [random_tree(rng, rng.randrange(1, 60), widest, bare) for _ in range(12)]
    model = TreeLSTM(replace(SIZES, kind=kind)).double()
    weight = torch.randn(sum(len(tree.parents) for tree in trees), 4, dtype=torch.float64)
    results = []
    for scores in (model(Forest.of(trees)), model.node_by_node(trees)):
        model.zero_grad()
        (scores * weight).sum().backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        results.append({"scores": scores, **gradients})
    assert results[0].keys() == results[1].keys() or bare == 1.0
    for name, value in results[1].items():
        torch.testing.assert_close(results[0][name], value, rtol=1e-10, atol=1e-12, msg=name)
    if bare == 1.0:
        assert all(not results[0][name].any() for name in results[0].keys() - results[1].keys())


@pytest.mark.parametrize("kind", KINDS)
def test_neighbours_and_their_order_do_not_change_a_tree(kind):
    model = TreeLSTM(replace(SIZES, kind=kind)).double()
    trees = trees_of_many_shapes()
    alone = [model(Forest.of([tree])) for tree in trees]
    for order in (range(len(trees)), reversed(range(len(trees)))):
        order = list(order)
        forest = Forest.of([trees[i] for i in order])
        together = model(forest)
        expected = torch.cat([alone[i] for i in order])
        torch.testing.assert_close(together, expected, rtol=1e-12, atol=1e-14)
        roots = torch.stack([alone[i][trees[i].parents.index(-1)] for i in order])
        torch.testing.assert_close(together[forest.roots], roots, rtol=1e-12, atol=1e-14)


def test_siblings_are_ordered_for_one_kind_alone():
    trees = [Tree([1, 2, 3, 4], [3, 3, 3, -1]), Tree([3, 1, 2, 4], [3, 3, 3, -1])]
    for kind, differ in (("nary", True), ("childsum", False)):
        forest = Forest.of(trees)
        first, second = TreeLSTM(replace(SIZES, kind=kind)).double().states(forest)[forest.roots]
        assert torch.allclose(first, second, rtol=1e-12) != differ


@pytest.mark.parametrize("kind", KINDS)
def test_a_chain_deeper_than_pythons_stack(kind):
    """Forward and backward, at a cost that grows with the nodes and not with their square."""
    nodes = 2 * sys.getrecursionlimit()
    model = TreeLSTM(replace(SIZES, kind=kind))
    above = [above for k in range(1, nodes) for above in (2 * k, 2 * k + 2)]
    comb = Tree([1] + [1, 0] * (nodes - 1), [2, *above[:-1], -1])  # leaf k at 2k - 1, but 0 at 0
    scores = model(Forest.of([chain(nodes), comb]))
    assert scores.shape == (3 * nodes - 1, 4)
    scores.sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    torch.testing.assert_close(model.node_by_node([chain(nodes)]), scores[:nodes])


def test_one_seed_gives_both_layers_the_same_training():
    """Which here are one code: 50 losses are equal to the bit."""
    trees, losses = trees_of_many_shapes(), {}
    forest = Forest.of(trees)
    y = torch.arange(len(forest.place)) % 4
    for layers in ("torch", "seqkern"):
        torch.manual_seed(3)
        model = TreeLSTM(replace(SIZES, dropout=0.2), layers)
        optimizer = torch.optim.Adagrad(model.parameters(), 0.05)
        losses[layers] = []
        for _ in range(50):
            loss = F.cross_entropy(model(forest), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[layers].append(loss.item())
    assert losses["torch"] == losses["seqkern"]
    assert losses["torch"][-1] < losses["torch"][0]


@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind):
    """In bfloat16 the scores are near those of float32, and every gradient comes back."""
    model, forest = TreeLSTM(replace(SIZES, kind=kind)), Forest.of(trees_of_many_shapes())
    with torch.autocast("cpu", torch.bfloat16):
        scores = model(forest)
    torch.testing.assert_close(scores.float(), model(forest), rtol=0.05, atol=0.05)
    scores.float().logsumexp(1).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_dropout_is_off_in_eval_mode():
    model, forest = TreeLSTM(replace(SIZES, dropout=0.5)), Forest.of(trees_of_many_shapes())
    assert not torch.equal(model(forest), model(forest))
    model.eval()
    assert torch.equal(model(forest), model(forest))


@pytest.mark.parametrize(
    ("trees", "message"),
    [
        ([], "at least one tree, got none"),
        ([Tree([], [])], "at least one, got 0 and 0 in tree 0"),
        ([Tree([1], [-1]), Tree([1, 2], [-1])], "got 2 and 1 in tree 1"),
        ([Tree([1, 2], [-1, 2])], r"parents must be in -1 \.\. 1, got -1 \.\. 2 in tree 0"),
        ([Tree([1, 2], [-1, -2])], r"got -2 \.\. -1 in tree 0"),
        ([Tree([1, 2], [-1, -1])], "expected one root, got 2 in tree 0"),
        ([Tree([1, 2], [1, 0])], "expected one root, got 0 in tree 0"),
        ([Tree([1], [-1]), Tree([1, 2, 3, 4], [-1, 2, 1, 0])], "tree 1 has a cycle"),
        ([Tree([1], [-1]), Tree([1, 2], [-1, 1])], "tree 1 has a cycle"),
    ],
)
def test_what_is_no_tree_is_refused(trees, message):
    with pytest.raises(ValueError, match=message):
        Forest.of(trees)


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match=r"kind must be one of .* got 'sum'"):
        TreeLSTMConfig(12, 4, kind="sum")
    with pytest.raises(ValueError, match="children must be at least 1, got 0"):
        TreeLSTMConfig(12, 4, children=0)
    with pytest.raises(ValueError, match=r"layers must be one of .* got 'cudnn'"):
        TreeLSTM(SIZES, "cudnn")
    wide = Tree([1] * 5, [-1, 0, 0, 0, 0])
    with pytest.raises(ValueError, match="3 children, the model's number, got one with 4"):
        TreeLSTM(SIZES)(Forest.of([wide]))
    with pytest.raises(ValueError, match="3 children, the model's number, got one with 4"):
        TreeLSTM(SIZES).node_by_node([wide])
    TreeLSTM(replace(SIZES, kind="childsum"))(Forest.of([wide]))
