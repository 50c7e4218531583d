"""The job that trains the graph network: trees as graphs, and dependency parses."""

import re

import pytest
import torch
from torch.nn import functional as F

from seqkern.tasks import listops
from seqkern.tasks.conllu import read_conllu
from seqkern.tasks.graphs import GraphJob, LabelledGraph, graph_of_parse, graph_of_tree, parse_line
from seqkern.tasks.job import JobSpec
from seqkern.tasks.options import TrainOptions
from seqkern.tasks.registry import make_job
from seqkern.tasks.training import Trainer
from seqkern.tasks.treebank import parse_tree
from seqkern.tasks.trees import LEFT_OUT

SMALL = {"embedding": 4, "hidden": 5, "attention": 3, "rounds": 2}
LISTOPS = {"examples": 20, "held_out": 6, "depth": 2}
PARSE = "1 the 2 det,2 dog 3 nsubj,3 barks 0 root"


def folder_of(path, sentences=(PARSE, "1 go 0 root", "1 dog 2 obj,2 see 0 root")):
    """train, dev and test.conllu with the same sentences."""
    blocks = []
    for sentence in sentences:
        rows = [row.split() for row in sentence.split(",")]
        blocks.append("\n".join(f"{i}\t{w}\t_\tX\t_\t_\t{h}\t{r}\t_\t_" for i, w, h, r in rows))
    for part in ("train", "dev", "test"):
        (path / f"{part}.conllu").write_text("\n\n".join(blocks) + "\n\n")
    return str(path)


def test_the_graph_of_a_tree():
    assert graph_of_tree(parse_tree("(3 (2 Not) (4 (2 too) (3 bad)))")) == LabelledGraph(
        ("", "Not", "", "too", "bad"),
        ((1, 0, "child 0"), (2, 0, "child 1"), (3, 2, "child 0"), (4, 2, "child 1")),
        ("3", "2", "4", "2", "3"),
        0,
    )


def test_the_graph_of_a_parse(tmp_path):
    """A word points to its head and to the next word; the relations are not in the graph."""
    edges = ((0, 1, "head"), (1, 2, "head"), (0, 1, "next"), (1, 2, "next"))
    expected = LabelledGraph(("the", "dog", "barks"), edges, ("det", "nsubj", "root"), -1)
    sentence = read_conllu(folder_of(tmp_path) + "/train.conllu")[0]
    assert graph_of_parse(sentence.words, sentence.heads, sentence.deprels) == expected
    assert parse_line("the:2 dog:3 barks:0") == expected._replace(labels=("", "", ""))
    assert parse_line("go:0 on:1").edges == ((1, 0, "head"), (0, 1, "next"))
    assert parse_line("::0").symbols == (":",)
    for wrong in ("", "the dog", "a:3 b:0", ":1", "a:-1"):
        with pytest.raises(ValueError, match="expected words with the number of each one's head"):
            parse_line(wrong)


@pytest.mark.parametrize("loss", ["nodes", "root"])
@pytest.mark.parametrize("readout", ["nodes", "max", "attention"])
def test_loss_and_scores_of_trees(readout, loss):
    """What counts is each node, or the root; and where the graph has one label, that one."""
    spec = JobSpec(
        "graph", "listops", sizes={**SMALL, "readout": readout}, reading={**LISTOPS, "loss": loss}
    )
    job = GraphJob(spec)
    graphs = job.data.test
    batch = job.collate(graphs)
    every = readout == "nodes" and loss == "nodes"
    job.model.eval()
    log_p, losses, right = [], [], 0
    for graph in graphs:
        p = job.model(job.graphs([graph])).log_softmax(-1)
        y = torch.tensor([job.labels.encode(label) for label in graph.labels])
        root = p[graph.root] if readout == "nodes" else p[0]
        right += int(root.argmax() == y[graph.root])
        log_p.append(root[y[graph.root]].item())
        counted = p[range(len(y)), y] if every else root[y[graph.root], None]
        losses += counted.tolist()
    assert (batch.units, batch.rows) == (len(losses), len(graphs))
    assert int((batch.labels != LEFT_OUT).sum()) == len(losses)
    assert job.loss(batch).item() == pytest.approx(-sum(losses) / len(losses), rel=1e-5)
    scores = job.evaluate("test")
    assert scores["accuracy"] == pytest.approx(right / len(graphs))
    assert scores["loss"] == pytest.approx(-sum(log_p) / len(graphs), rel=1e-5)


def test_loss_scores_and_predictions_of_parses(tmp_path):
    job = GraphJob(JobSpec("graph", "conllu", folder_of(tmp_path), sizes=SMALL))
    assert job.vocabs["edges"].names == ("head", "next")
    assert job.labels.names == ("det", "nsubj", "obj", "root")
    graphs = job.data.train
    batch = job.collate(graphs)
    assert (batch.units, batch.rows) == (6, 3)
    job.model.eval()
    log_p = torch.cat([job.model(job.graphs([graph])).log_softmax(-1) for graph in graphs])
    y = torch.tensor([job.labels.encode(label) for graph in graphs for label in graph.labels])
    assert job.loss(batch).item() == pytest.approx(F.nll_loss(log_p, y).item(), rel=1e-5)
    scores = job.evaluate("dev")
    assert scores["accuracy"] == pytest.approx((log_p.argmax(-1) == y).double().mean().item())
    (line,) = job.predict(["the:2 dog:3 barks:0"])
    assert line.split() == [job.labels[i] for i in log_p[:3].argmax(-1).tolist()]
    assert len(job.predict(["go:0"])[0].split()) == 1


def test_predictions_of_trees():
    job = GraphJob(JobSpec("graph", "listops", sizes=SMALL, reading=LISTOPS))
    texts = [listops.write(tree) for tree in listops.generate(5, 1)]
    assert [len(label) for label in job.predict(texts)] == [1] * 5
    with pytest.raises(ValueError, match="expected an expression"):
        job.predict(["[MAX 1"])


def test_more_children_than_in_training(tmp_path):
    """The edge of a third child is as that of the second, the last one known."""
    for part, tree in (("train", "(1 (0 a) (1 b))"), ("dev", "(1 (0 a) (1 b) (0 c))")):
        (tmp_path / f"{part}.txt").write_text(f"{tree}\n(0 a)\n")
    (tmp_path / "test.txt").write_text("(1 (0 a) (1 b) (0 c))\n")
    job = make_job(JobSpec("graph", "trees", str(tmp_path), sizes=SMALL))
    assert job.vocabs["edges"].names == ("child 0", "child 1")
    assert [job._edge(f"child {n}") for n in (0, 1, 2, 10)] == [0, 1, 1, 1]
    assert 0 <= job.evaluate("test")["accuracy"] <= 1
    with pytest.raises(ValueError, match="label 'head' is not one"):
        job._edge("head")


def test_bad_tasks_are_refused(tmp_path):
    for task, data, sizes, message in (
        ("conllu", "", {}, "needs data: a folder of train, dev and test.conllu"),
        ("conllu", str(tmp_path), {}, r"holds no train\.conllu"),
        ("parses", "", {}, "must be one of atis-parses, conllu, listops, sst, trees"),
        ("conllu", folder_of, {"readout": "max"}, "readout must be 'nodes' for task 'conllu'"),
    ):
        data = data(tmp_path) if callable(data) else data
        with pytest.raises(ValueError, match=message):
            make_job(JobSpec("graph", task, data, sizes=sizes))


def test_expressions_need_their_edges():
    """MAX and MIN up to two deep: learned along the edges, and not from a bag of symbols."""
    accuracy = {}
    for edges in (True, False):
        reading = {"depth": 2, "arguments": 4, "examples": 2000, "held_out": 200, "nested": 0.5}
        spec = JobSpec(
            "graph",
            "listops",
            sizes={"embedding": 32, "hidden": 48, "rounds": 3, "edges": edges},
            reading={**reading, "operators": ("MAX", "MIN")},
        )
        options = TrainOptions(
            epochs=6 if edges else 3,
            batch_size=32,
            lr=1e-2,
            optimizer="adam",
            weight_decay=0.0,
            warmup=0,
        )
        trainer = Trainer(make_job(spec), options)
        for _ in trainer.train(trainer.steps):
            pass
        accuracy[edges] = trainer.job.evaluate("test")["accuracy"]
    assert accuracy[True] >= 0.92
    assert accuracy[False] <= 0.75


def test_a_treebank_is_learned_a_little(corpora):
    """After 60 steps on the parses of ATIS the relation of four words in ten is right."""
    sizes = {"embedding": 32, "hidden": 32, "rounds": 2}
    job = make_job(JobSpec("graph", "atis-parses", str(corpora), sizes=sizes))
    trainer = Trainer(job, TrainOptions(steps=60, batch_size=32, lr=1e-2, warmup=0))
    for _ in trainer.train(60):
        pass
    assert job.evaluate("dev")["accuracy"] > 0.4


def test_example(example, tmp_path):
    for data in ([], ["--data", folder_of(tmp_path)]):
        out = example("graph.py", "--steps", "2", *data)
        assert len(re.findall(r"^step 2: loss \d", out, re.MULTILINE)) == 2
        assert re.search(r"^with edges: [\d.]+% of held-out labels right$", out, re.MULTILINE)
        assert re.search(r"^without edges: [\d.]+% of held-out labels right$", out, re.MULTILINE)
