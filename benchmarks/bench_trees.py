"""Times training steps of the Tree-LSTM: all nodes of a height together, and one node at a time.

25 trees a batch as in the Stanford Sentiment Treebank: binary, about 19 words, most of a phrase's
words in its second part; the child-sum kind gets dependency trees of as many words. One step is
forward and backward, and planning the batch is part of it. Interleaved in one process, one thread.
`--grid tiny` takes small sizes, which show that the suite works. `python -m
benchmarks.trees_table RESULTS.json` makes the table.
"""

import random
from collections.abc import Callable, Sequence

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks.bench_recurrent import race
from benchmarks.contestants import Contestant
from seqkern.models.treelstm import Forest, Tree, TreeLSTM, TreeLSTMConfig

TOGETHER, BY_NODE = "heights together", "node by node"
SYMBOLS = 1000
WORDS = {"mean": 19.0, "deviation": 9.0, "most": 52}


def words(rng: random.Random) -> int:
    """How many words a sentence has."""
    drawn = round(rng.gauss(WORDS["mean"], WORDS["deviation"]))
    return max(2, min(int(WORDS["most"]), drawn))


def constituency_tree(rng: random.Random) -> Tree:
    """A binary tree whose leaves have the symbols."""
    symbols, parents = [], []
    spans = [(words(rng), -1)]
    while spans:
        leaves, parent = spans.pop()
        node = len(parents)
        parents.append(parent)
        symbols.append(0 if leaves > 1 else rng.randrange(1, SYMBOLS))
        if leaves > 1:
            first = 1 + int((leaves - 1) * rng.random() ** 2)
            spans += [(leaves - first, node), (first, node)]
    return Tree(symbols, parents)


def dependency_tree(rng: random.Random) -> Tree:
    """A tree of any width all of whose nodes have symbols."""
    n = words(rng)
    symbols = [rng.randrange(1, SYMBOLS) for _ in range(n)]
    return Tree(symbols, [-1, *(rng.randrange(max(0, k - 6), k) for k in range(1, n))])


def step(model: TreeLSTM, scores_of: Callable[[], Tensor], y: Tensor) -> None:
    """Forward and backward of the mean loss over all nodes."""
    model.zero_grad()
    torch.nn.functional.cross_entropy(scores_of(), y).backward()


def gradients(model: TreeLSTM, run: Callable[[], None]) -> dict[str, Tensor]:
    """What a step computes."""
    run()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def contestants(model: TreeLSTM, trees: Sequence[Tree]) -> list[Contestant]:
    """Both ways of computing one batch."""
    y = torch.arange(sum(len(tree.parents) for tree in trees)) % model.config.labels
    ways = {
        TOGETHER: lambda: model(Forest.of(trees)),
        BY_NODE: lambda: model.node_by_node(trees),
    }
    runs = {name: lambda w=way: step(model, w, y) for name, way in ways.items()}
    return [Contestant(n, run, lambda r=run: gradients(model, r)) for n, run in runs.items()]


@pytest.mark.parametrize("kind", ["nary", "childsum"])
def test_step(benchmark: BenchmarkFixture, kind: str, pytestconfig: pytest.Config) -> None:
    tiny = pytestconfig.option.grid == "tiny"
    torch.set_num_threads(1)
    torch.manual_seed(0)
    D, H, B = (8, 4, 3) if tiny else (300, 150, 25)
    rng = random.Random(0)
    make = constituency_tree if kind == "nary" else dependency_tree
    trees = [make(rng) for _ in range(B)]
    model = TreeLSTM(TreeLSTMConfig(SYMBOLS, 5, D, H, kind))
    entries = contestants(model, trees)
    together, by_node = (entry.outputs() for entry in entries)
    for name, value in by_node.items():
        torch.testing.assert_close(together[name], value, rtol=1e-3, atol=1e-6, msg=name)
    samples = race(benchmark, entries, pytestconfig.option.budget)
    forest = Forest.of(trees)
    benchmark.group = "Tree-LSTM"
    benchmark.extra_info.update(
        kind=kind,
        trees=B,
        nodes=len(forest.place),
        heights=len(forest.levels),
        D=D,
        H=H,
        threads=1,
        samples={e.name: s.as_microseconds() for e, s in zip(entries, samples, strict=True)},
    )
