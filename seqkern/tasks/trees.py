"""Labels for trees and for their parts: sentiment, ListOps, and the user's own trees."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqkern.models.treelstm import Forest, Tree, TreeLSTM, TreeLSTMConfig
from seqkern.tasks import listops
from seqkern.tasks.corpora import corpus_folder, needed_file
from seqkern.tasks.job import Job, Parts
from seqkern.tasks.libraries import library
from seqkern.tasks.treebank import LabelledTree, parse_tree, read_trees
from seqkern.tasks.vocab import Labels, Vocab

LEFT_OUT = -100  # the label of what is no part of the loss
LOSSES = ("nodes", "root")
SENTIMENT = ("0", "1", "2", "3", "4")  # very negative .. very positive
ROWS = 64  # trees that are scored at a time

TASKS = {
    "sst": "Stanford Sentiment Treebank: five labels at every phrase, as published",
    "listops": "generated expressions, their value at the root",
    "trees": "your folder of train.txt, dev.txt and test.txt of trees in brackets",
}
READING: dict[str, Any] = {
    "min_count": 1,
    "loss": "nodes",
    "examples": 10000,
    "held_out": 1000,
    "depth": 4,
    "arguments": 5,
    "nested": 0.25,
    "operators": tuple(listops.OPERATORS),
}
# What is generated reads no data, and has options of its own.
GENERATED = ("listops",)
EXPRESSIONS = ("examples", "held_out", "depth", "arguments", "nested", "operators")
OF_TASKS: dict[str, tuple[str, ...]] = dict.fromkeys(EXPRESSIONS, GENERATED)


def tree_parts(
    task: str, data: str, reading: dict[str, Any], seed: int, children: int | None = None
) -> Parts:
    """The trees of a task of TASKS, whose nodes in files have at most so many children.

    Raises:
        ValueError, OSError: the data is absent or malformed, or an option of reading impossible.
    """
    if reading["loss"] not in LOSSES:
        raise ValueError(f"loss must be one of {LOSSES}, got {reading['loss']!r}")
    if task == "listops":
        examples, held_out = reading["examples"], reading["held_out"]
        if examples < 1 or held_out < 1:
            raise ValueError(
                f"examples and held_out must be at least 1, got {examples} and {held_out}"
            )
        sizes = {name: reading[name] for name in ("depth", "arguments", "nested", "operators")}
        drawn = listops.generate(examples + 2 * held_out, seed, **sizes)
        return Parts(drawn[:examples], drawn[examples:-held_out], drawn[-held_out:])
    if task == "trees" and not data:
        raise ValueError("task 'trees' needs data: a folder of train.txt, dev.txt and test.txt")
    folder = corpus_folder(data, "sst") if task == "sst" else data
    files = (needed_file(folder, f"{part}.txt") for part in Parts._fields)
    return Parts(*(read_trees(file, children) for file in files))


def tree_of(task: str, text: str) -> LabelledTree:
    """The tree of a line of input: an expression of ListOps, or a tree in brackets."""
    return listops.parse(text) if task == "listops" else parse_tree(text)


def numbers_of(labels: Labels, names: Sequence[str]) -> list[int]:
    """Numbers of labels; LEFT_OUT for one that the training data has not."""
    known = set(labels.names)
    return [labels.encode(name) if name in known else LEFT_OUT for name in names]


def label_scores(labels: Labels, log_p: Tensor, names: Sequence[str]) -> dict[str, float]:
    """accuracy, the share of right labels; and, where these are those of sentiment, binary.

    binary is read off the five labels: P(3, 4) against P(0, 1) of those that are not neutral.

    Args:
        labels: the names of the C classes.
        log_p: (N, C) log p(label).
        names: N right labels; one that the training data has not is never found.
    """
    metrics = library("sklearn.metrics", "scikit-learn", "accuracy")
    found = [labels[i] for i in log_p.argmax(-1).tolist()]
    scores = {"accuracy": float(metrics.accuracy_score(list(names), found))}
    if labels.names == SENTIMENT:
        p = log_p.exp()
        positive = (p[:, 3:].sum(1) > p[:, :2].sum(1)).tolist()
        pairs = [(n > "2", y) for n, y in zip(names, positive, strict=True) if n != "2"]
        if pairs:
            scores["binary"] = float(metrics.accuracy_score(*zip(*pairs, strict=True)))
    return scores


class TreeBatch(NamedTuple):
    """A planned batch of trees and labels (N,) int64 of its nodes. A unit is a counted node."""

    forest: Forest
    labels: Tensor
    units: int
    rows: int


class TreeJob(Job):
    """The Tree-LSTM on trees with a label at every node.

    Options of reading: min_count, occurrences of a word that is kept; loss, over all "nodes" or
    the "root"; and for listops examples to train on and held_out for dev and for test, which share
    none, the most operators inside each other (depth), the most arguments of one, the probability
    that an argument is nested, and the operators.
    """

    TASKS: ClassVar[dict[str, str]] = TASKS
    WITHOUT_DATA: ClassVar[tuple[str, ...]] = GENERATED
    READING: ClassVar[dict[str, Any]] = READING
    OF_TASKS: ClassVar[dict[str, tuple[str, ...]]] = OF_TASKS
    unit = "node"
    score = "accuracy"
    higher = True

    model: TreeLSTM

    def task_reading(self) -> dict[str, Any]:
        return {"loss": "root"} if self.spec.task == "listops" else {}

    def read(self) -> Parts:
        spec, default = self.spec, TreeLSTMConfig
        nary = spec.sizes.get("kind", default.kind) == "nary"
        children = spec.sizes.get("children", default.children) if nary else None
        return tree_parts(spec.task, spec.data, self.reading, spec.seed, children)

    def build_vocabs(self) -> dict[str, Any]:
        train = self.data.train
        return {
            "words": Vocab.build((tree.words for tree in train), self.reading["min_count"]),
            "labels": Labels.build(label for tree in train for label in tree.labels),
        }

    def build_model(self) -> nn.Module:
        children = {"children": self.reading["arguments"]} if self.spec.task == "listops" else {}
        sizes = {"symbols": len(self.words), "labels": len(self.labels), **children}
        return TreeLSTM(TreeLSTMConfig(**{**sizes, **self.spec.sizes}), self.spec.layers)

    @property
    def words(self) -> Vocab:
        """Of the nodes' symbols."""
        return self.vocabs["words"]

    @property
    def labels(self) -> Labels:
        """Of the nodes."""
        return self.vocabs["labels"]

    def length(self, example: LabelledTree) -> tuple[int, ...]:
        """None: one product a height takes trees of any size together."""
        return ()

    def forest(self, trees: Sequence[LabelledTree]) -> Forest:
        """A planned batch."""
        return Forest.of([Tree(self._encode(tree.symbols), tree.parents) for tree in trees])

    def _encode(self, symbols: Sequence[str]) -> list[int]:
        numbers = iter(self.words.encode([symbol for symbol in symbols if symbol]))
        return [next(numbers) if symbol else 0 for symbol in symbols]

    def collate(self, examples: list[LabelledTree]) -> TreeBatch:
        forest = self.forest(examples)
        labels = torch.tensor([n for t in examples for n in numbers_of(self.labels, t.labels)])
        if self.reading["loss"] == "root":
            labels = torch.full_like(labels, LEFT_OUT).index_copy(
                0, forest.roots, labels[forest.roots]
            )
        return TreeBatch(forest, labels, int((labels != LEFT_OUT).sum()), len(examples))

    def place(self, batch: TreeBatch) -> TreeBatch:
        forest = batch.forest.to(self.device)
        return batch._replace(forest=forest, labels=batch.labels.to(self.device))

    def loss(self, batch: TreeBatch) -> Tensor:
        return F.cross_entropy(self.model(batch.forest), batch.labels, ignore_index=LEFT_OUT)

    @torch.inference_mode()
    def _log_p(self, trees: Sequence[LabelledTree]) -> Iterator[tuple[Tensor, Tensor]]:
        """log p(label) of the nodes (N, C) and of the roots (B, C), on the CPU, by batches."""
        self.model.eval()
        for start in range(0, len(trees), ROWS):
            forest = self.forest(trees[start : start + ROWS])
            log_p = self.model(forest.to(self.device)).float().log_softmax(-1).cpu()
            yield log_p, log_p[forest.roots]

    def evaluate(self, part: str, **_: Any) -> dict[str, float]:
        """accuracy and, of sentiment, binary: of the roots, see label_scores; nodes: the share of
        all nodes with the right label; loss: of what is trained on, in nats."""
        trees = self.part(part)
        nodes, roots = map(torch.cat, zip(*self._log_p(trees), strict=True))
        of_roots = [tree.labels[tree.parents.index(-1)] for tree in trees]
        scores = label_scores(self.labels, roots, of_roots)
        y = torch.tensor([n for t in trees for n in numbers_of(self.labels, t.labels)])
        scores["nodes"] = (nodes.argmax(-1) == y).double().mean().item()
        log_p = nodes
        if self.reading["loss"] == "root":
            log_p, y = roots, torch.tensor(numbers_of(self.labels, of_roots))
        scores["loss"] = F.nll_loss(log_p, y, ignore_index=LEFT_OUT).item()
        return scores

    def scorer(self) -> str:
        return "share of roots with the right label (scikit-learn accuracy_score)"

    def predict(self, texts: Sequence[str], **_: Any) -> list[str]:
        """The most probable label of each tree's root; the labels that it has are not read.

        Raises:
            ValueError: a text is no tree in brackets, or for listops no expression.
        """
        trees = [tree_of(self.spec.task, text) for text in texts]
        return [self.labels[i] for _, p in self._log_p(trees) for i in p.argmax(-1).tolist()]

    def expect_readable(self, text: str) -> None:
        tree_of(self.spec.task, text)
