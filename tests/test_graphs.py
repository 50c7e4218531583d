"""Message passing on graphs: the equations, batches, and the two sets of layers."""

import random
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from seqkern.models.graph import Graph, GraphConfig, GraphNet, Graphs

SIZES = GraphConfig(
    symbols=9,
    edge_labels=3,
    labels=4,
    embedding=5,
    hidden=7,
    attention=6,
    rounds=3,
    readout="max",
)
READOUTS = ["nodes", "max", "attention"]


def random_graphs(count=6, labels=3):
    """Single nodes, graphs without edges, with loops and with parallel edges."""
    rng = random.Random(2)
    graphs = [Graph([3], []), Graph([0], [(0, 0, 1)]), Graph([1, 2], []), Graph([1, 2], [])]
    graphs[3] = Graph([4, 5], [(0, 1, 0), (0, 1, 2), (1, 0, 0), (0, 1, 0)])
    for _ in range(count):
        nodes = rng.randrange(2, 12)
        edges = [
            (rng.randrange(nodes), rng.randrange(nodes), rng.randrange(labels))
            for _ in range(rng.randrange(1, 3 * nodes))
        ]
        graphs.append(Graph([rng.randrange(9) for _ in range(nodes)], edges))
    return graphs


def models(config=SIZES):
    """The torch twin and seqkern's, from one seed, labels' biases drawn too."""
    both = []
    for layers in ("torch", "seqkern"):
        torch.manual_seed(3)
        model = GraphNet(config, layers)
        for parameter in (model.message_bias.weight, model.gate_bias.weight):
            torch.nn.init.normal_(parameter)
        both.append(model)
    return both


def by_hand(model, graph):
    """The module docstring's equations for one graph, an edge at a time: scores."""
    p, H = dict(model.named_parameters()), model.config.hidden
    V, v_gate = p["message.weight"].split(H), p["gate.weight"]
    h = []
    for symbol in graph.symbols:
        x = p["embed.weight"][symbol]
        h.append(torch.cat([x, x.new_zeros(H - len(x))]))
    for _ in range(model.config.rounds):
        a = [torch.zeros_like(state) for state in h]
        for along, against, label in graph.edges if model.config.edges else ():
            for d, (u, v) in enumerate([(along, against), (against, along)]):
                kind = 2 * label + d
                gate = torch.sigmoid(h[u] @ v_gate[d] + p["gate_bias.weight"][kind, 0])
                a[v] = a[v] + gate * (V[d] @ h[u] + p["message_bias.weight"][kind])
        for v, state in enumerate(h):
            ih = p["update.weight_ih"] @ a[v] + p["update.bias_ih"]
            hh = p["update.weight_hh"] @ state + p["update.bias_hh"]
            (ir, iz, i_n), (hr, hz, hn) = ih.chunk(3), hh.chunk(3)
            r, z = torch.sigmoid(ir + hr), torch.sigmoid(iz + hz)
            h[v] = (1 - z) * torch.tanh(i_n + r * hn) + z * state
    states = torch.stack(h)
    if model.config.readout == "max":
        states = states.max(0).values[None]
    elif model.config.readout == "attention":
        e = [p["v_a"] @ torch.tanh(p["u_a.weight"] @ s + p["u_a.bias"]) for s in states]
        weights = torch.stack(e).exp() / torch.stack(e).exp().sum()
        states = torch.stack([w * s for w, s in zip(weights, states, strict=True)]).sum(0)[None]
    return states @ p["output.weight"].T + p["output.bias"]


@pytest.mark.parametrize("layers", ["torch", "seqkern"])
@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.parametrize("edges", [True, False], ids=["edges", "bag"])
def test_scores_are_the_equations(readout, layers, edges):
    """Of each graph alone, and so of a batch, whatever else is in it and in whichever order."""
    config = replace(SIZES, readout=readout, edges=edges)
    model = models(config)[layers == "seqkern"].double()
    graphs = random_graphs()
    expected = [by_hand(model, graph) for graph in graphs]
    torch.testing.assert_close(model(Graphs.of(graphs)), torch.cat(expected))
    backwards = model(Graphs.of(graphs[::-1]))
    torch.testing.assert_close(backwards, torch.cat(expected[::-1]), rtol=1e-12, atol=1e-13)


def test_the_order_of_edges_changes_no_bit():
    model, rng = GraphNet(SIZES), random.Random(1)
    graphs = random_graphs()
    shuffled = [Graph(s, rng.sample(list(edges), len(edges))) for s, edges in graphs]
    assert torch.equal(model(Graphs.of(graphs)), model(Graphs.of(shuffled)))


def test_one_seed_gives_both_the_same_parameters():
    ours, theirs = models(replace(SIZES, readout="attention"))
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, value in ours.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[name]), name


@pytest.mark.parametrize("readout", READOUTS)
def test_both_layers_agree_forward_and_backward(readout):
    """In float64 the two differ by rounding alone, in every gradient."""
    graphs, results = Graphs.of(random_graphs()), []
    for model in models(replace(SIZES, readout=readout)):
        model.double()
        scores = model(graphs)
        (scores * torch.arange(4)).logsumexp(1).sum().backward()
        results.append({"scores": scores, **{n: p.grad for n, p in model.named_parameters()}})
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("readout", READOUTS)
def test_fifty_steps_of_training_agree(readout):
    graphs, losses = Graphs.of(random_graphs()), {}
    for model in models(replace(SIZES, readout=readout)):
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        losses[model.layers] = []
        for _ in range(50):
            scores = model(graphs)
            loss = F.cross_entropy(scores, torch.arange(len(scores)) % 4)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[model.layers].append(loss.item())
    torch_losses, ours = losses["torch"], losses["seqkern"]
    assert ours[:5] == pytest.approx(torch_losses[:5], rel=1e-5)
    assert ours == pytest.approx(torch_losses, rel=1e-4)
    assert ours[-1] < ours[0]


def test_a_path_longer_than_pythons_stack():
    """And what is further away than the rounds reach has no say."""
    n = 2000
    model = GraphNet(replace(SIZES, readout="nodes")).double()
    path = Graph([1] * n, [(v, v + 1, 0) for v in range(n - 1)])
    other = Graph([2, *[1] * (n - 1)], path.edges)
    first, second = model(Graphs.of([path, other])).split(n)
    reached = (first != second).any(1)
    assert reached[: SIZES.rounds + 1].all()
    assert not reached[SIZES.rounds + 1 :].any()
    first.sum().backward()
    grad = model.message.weight.grad
    assert grad is not None
    assert torch.isfinite(grad).all()


@pytest.mark.parametrize("layers", ["torch", "seqkern"])
@pytest.mark.parametrize("readout", READOUTS)
def test_autocast(readout, layers):
    """In bfloat16 the scores are near those of float32, and every gradient comes back."""
    model = models(replace(SIZES, readout=readout))[layers == "seqkern"]
    graphs = Graphs.of(random_graphs())
    with torch.autocast("cpu", torch.bfloat16):
        scores = model(graphs)
    torch.testing.assert_close(scores.float(), model(graphs), rtol=0.05, atol=0.05)
    scores.float().logsumexp(1).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("graphs", "message"),
    [
        ([], "at least one graph, got none"),
        ([Graph([1], []), Graph([], [])], "at least one node, got none in graph 1"),
        ([Graph([1, 2], [(0, 2, 0)])], r"two of 2 nodes .* got \[\(0, 2, 0\)\] in graph 0"),
        ([Graph([1, 2], [(-1, 0, 0)])], r"got \[\(-1, 0, 0\)\] in graph 0"),
        ([Graph([1, 2], [(0, 1, -1)])], r"a label from 0, got \[\(0, 1, -1\)\] in graph 0"),
    ],
)
def test_what_is_no_graph_is_refused(graphs, message):
    with pytest.raises(ValueError, match=message):
        Graphs.of(graphs)


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match=r"readout must be one of .* got 'sum'"):
        replace(SIZES, readout="sum")
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        replace(SIZES, rounds=0)
    with pytest.raises(ValueError, match="embedding must be at most hidden, 7, got 8"):
        replace(SIZES, embedding=8)
    with pytest.raises(ValueError, match=r"layers must be one of .* got 'cudnn'"):
        GraphNet(SIZES, "cudnn")
    with pytest.raises(ValueError, match="edge labels must be below 3, got 3"):
        GraphNet(SIZES)(Graphs.of([Graph([1, 2], [(0, 1, 3)])]))
