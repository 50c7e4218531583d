"""Labels for graphs and for their nodes: trees as graphs, and dependency parses.

A tree's edges go from a child to its parent, labelled by which child it is. A dependency parse has
an edge from each word to its head and one from each word to the next, and what is asked for is the
relation of every word to its head, which the labels of the edges do not tell.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqkern.models.graph import Graph, GraphConfig, GraphNet, Graphs
from seqkern.tasks import trees
from seqkern.tasks.conllu import read_conllu
from seqkern.tasks.corpora import corpus_folder, needed_file
from seqkern.tasks.job import Job, Parts
from seqkern.tasks.treebank import LabelledTree
from seqkern.tasks.trees import LEFT_OUT, ROWS, label_scores, numbers_of
from seqkern.tasks.vocab import Labels, Vocab

HEAD, NEXT, CHILD = "head", "next", "child"
PARSES = {
    "conllu": "your folder of train, dev and test.conllu: the relation of a word to its head",
    "atis-parses": "requests about flights, UD_English-Atis: the relation of a word to its head",
}


class LabelledGraph(NamedTuple):
    """A graph, its nodes' symbols ("" for none) and labels, and its edges (from, to, label).

    root: the node whose label is the graph's; -1 where the graph has none.
    """

    symbols: tuple[str, ...]
    edges: tuple[tuple[int, int, str], ...]
    labels: tuple[str, ...]
    root: int


class GraphBatch(NamedTuple):
    """A batch as one graph, and int64 labels of its nodes (N,) or of its graphs (B,), whichever
    the model has scores for. A unit is a label that counts."""

    graphs: Graphs
    labels: Tensor
    units: int
    rows: int


def graph_of_tree(tree: LabelledTree) -> LabelledGraph:
    """The graph of a tree."""
    children = [0] * len(tree.parents)
    edges = []
    for node, parent in enumerate(tree.parents):
        if parent >= 0:
            edges.append((node, parent, f"{CHILD} {children[parent]}"))
            children[parent] += 1
    return LabelledGraph(tree.symbols, tuple(edges), tree.labels, tree.parents.index(-1))


def graph_of_parse(
    words: Sequence[str], heads: Sequence[int], relations: Sequence[str]
) -> LabelledGraph:
    """The graph of a dependency parse; heads count words from 1, and 0 is no word."""
    arcs = [(word, head - 1, HEAD) for word, head in enumerate(heads) if head]
    order = [(word, word + 1, NEXT) for word in range(len(words) - 1)]
    return LabelledGraph(tuple(words), (*arcs, *order), tuple(relations), -1)


def parse_line(text: str) -> LabelledGraph:
    """The graph of a line of words with the numbers of their heads, as `The:2 dog:3 barks:0`.

    Raises:
        ValueError: a word has no head, or one that is no word of the line.
    """
    pairs = [token.rpartition(":") for token in text.split()]
    heads = [int(head) if head.isdecimal() else -1 for _, _, head in pairs]
    words = [word for word, _, _ in pairs]
    if not pairs or not all(words) or min(heads) < 0 or max(heads) > len(pairs):
        raise ValueError(
            "expected words with the number of each one's head, as The:2 dog:3 barks:0, "
            f"got {text!r}"
        )
    return graph_of_parse(words, heads, [""] * len(words))


class GraphJob(Job):
    """The graph network on trees as graphs, or on dependency parses.

    With the readout "nodes" each node has scores, and a tree's label is found at its root; else
    the graph has. Options of reading are those of TreeJob, of parses min_count alone; loss counts
    for the readout "nodes".
    """

    TASKS: ClassVar[dict[str, str]] = {
        **trees.TASKS,
        **PARSES,
    }
    WITHOUT_DATA: ClassVar[tuple[str, ...]] = trees.GENERATED
    READING: ClassVar[dict[str, Any]] = trees.READING
    OF_TASKS: ClassVar[dict[str, tuple[str, ...]]] = {**trees.OF_TASKS, "loss": (*trees.TASKS,)}
    score = "accuracy"
    unit = "label"
    higher = True

    model: GraphNet

    def task_reading(self) -> dict[str, Any]:
        return {"loss": "root"} if self.spec.task == "listops" else {}

    def read(self) -> Parts:
        spec = self.spec
        if spec.task not in PARSES:
            parts = trees.tree_parts(spec.task, spec.data, self.reading, spec.seed)
            return Parts(*([graph_of_tree(tree) for tree in part] for part in parts))
        if spec.task == "conllu" and not spec.data:
            raise ValueError("task 'conllu' needs data: a folder of train, dev and test.conllu")
        known = spec.task == "atis-parses"
        folder = corpus_folder(spec.data, "ud_english_atis") if known else spec.data
        files = (needed_file(folder, f"{part}.conllu") for part in Parts._fields)
        return Parts(
            *([graph_of_parse(s.words, s.heads, s.deprels) for s in read_conllu(f)] for f in files)
        )

    def build_vocabs(self) -> dict[str, Any]:
        train: list[LabelledGraph] = self.data.train
        words = ([symbol for symbol in graph.symbols if symbol] for graph in train)
        return {
            "words": Vocab.build(words, self.reading["min_count"]),
            "edges": Labels.build(label for graph in train for _, _, label in graph.edges),
            "labels": Labels.build(label for graph in train for label in graph.labels),
        }

    def build_model(self) -> nn.Module:
        readout = {"readout": "nodes"} if self.spec.task in PARSES else {}
        counts = {"symbols": "words", "edge_labels": "edges", "labels": "labels"}
        sizes = {size: len(self.vocabs[name]) for size, name in counts.items()}
        config = GraphConfig(**{**sizes, **readout, **self.spec.sizes})
        if self.spec.task in PARSES and config.readout != "nodes":
            raise ValueError(
                f"readout must be 'nodes' for task {self.spec.task!r}, which labels words, "
                f"got {config.readout!r}"
            )
        return GraphNet(config, self.spec.layers)

    @property
    def labels(self) -> Labels:
        """Of the nodes or of the graphs."""
        return self.vocabs["labels"]

    def length(self, example: LabelledGraph) -> tuple[int, ...]:
        return (len(example.symbols),)

    def graphs(self, examples: Sequence[LabelledGraph]) -> Graphs:
        """A batch as one graph."""
        words = self.vocabs["words"]
        return Graphs.of(
            [
                Graph(
                    [words.encode([symbol])[0] if symbol else 0 for symbol in graph.symbols],
                    [(u, v, self._edge(label)) for u, v, label in graph.edges],
                )
                for graph in examples
            ]
        )

    def _edge(self, label: str) -> int:
        """The number of an edge label; of a child beyond those of training, that of their last."""
        edges: Labels = self.vocabs["edges"]
        kind, _, _ = label.partition(" ")
        if label not in edges.names and kind == CHILD:
            known = [int(name.split()[1]) for name in edges.names if name.startswith(CHILD)]
            label = f"{CHILD} {max(known, default=0)}"
        return edges.encode(label)

    def _counted(self, graph: LabelledGraph) -> list[int]:
        """The nodes whose labels are a graph's part of the loss."""
        of_graph = self.model.config.readout != "nodes" or self.reading["loss"] == "root"
        return [graph.root] if of_graph and graph.root >= 0 else [*range(len(graph.symbols))]

    def collate(self, examples: list[LabelledGraph]) -> GraphBatch:
        labels = []
        for graph in examples:
            counted = self._counted(graph)
            numbers = numbers_of(self.labels, [graph.labels[node] for node in counted])
            if self.model.config.readout == "nodes":
                row = [LEFT_OUT] * len(graph.symbols)
                for node, number in zip(counted, numbers, strict=True):
                    row[node] = number
                numbers = row
            labels += numbers
        y = torch.tensor(labels)
        return GraphBatch(self.graphs(examples), y, int((y != LEFT_OUT).sum()), len(examples))

    def place(self, batch: GraphBatch) -> GraphBatch:
        graphs, labels = batch.graphs.to(self.device), batch.labels.to(self.device)
        return batch._replace(graphs=graphs, labels=labels)

    def loss(self, batch: GraphBatch) -> Tensor:
        return F.cross_entropy(self.model(batch.graphs), batch.labels, ignore_index=LEFT_OUT)

    @torch.inference_mode()
    def _log_p(self, examples: Sequence[LabelledGraph]) -> Iterator[Tensor]:
        """log p(label) of each graph: of its root or readout (1, C), or of its nodes (n, C)."""
        self.model.eval()
        nodes = self.model.config.readout == "nodes"
        for start in range(0, len(examples), ROWS):
            chosen = examples[start : start + ROWS]
            log_p = self.model(self.graphs(chosen).to(self.device)).float().log_softmax(-1).cpu()
            pieces = log_p.split([len(graph.symbols) if nodes else 1 for graph in chosen])
            for graph, piece in zip(chosen, pieces, strict=True):
                yield piece[graph.root, None] if nodes and graph.root >= 0 else piece

    def evaluate(self, part: str, **_: Any) -> dict[str, float]:
        """accuracy and, of sentiment, binary: of trees' roots, or of all words of parses, see
        label_scores; loss: of the same, in nats."""
        examples: list[LabelledGraph] = self.part(part)
        log_p = torch.cat(list(self._log_p(examples)))
        names = [
            name
            for graph in examples
            for name in ([graph.labels[graph.root]] if graph.root >= 0 else graph.labels)
        ]
        scores = label_scores(self.labels, log_p, names)
        y = torch.tensor(numbers_of(self.labels, names))
        return {**scores, "loss": F.nll_loss(log_p, y, ignore_index=LEFT_OUT).item()}

    def scorer(self) -> str:
        return "share of right labels (scikit-learn accuracy_score)"

    def predict(self, texts: Sequence[str], **_: Any) -> list[str]:
        """The most probable label of each tree; of a parse, those of its words.

        Raises:
            ValueError: a text is no tree in brackets; for listops no expression; for conllu not
                words with their heads, see parse_line.
        """
        examples = [self._graph_in(text) for text in texts]
        found = (p.argmax(-1).tolist() for p in self._log_p(examples))
        return [" ".join(self.labels[i] for i in numbers) for numbers in found]

    def expect_readable(self, text: str) -> None:
        self._graph_in(text)

    def _graph_in(self, text: str) -> LabelledGraph:
        task = self.spec.task
        return parse_line(text) if task in PARSES else graph_of_tree(trees.tree_of(task, text))
