"""Trees in brackets, ListOps, and the job that trains a Tree-LSTM on them."""

import random
import re

import pytest
import torch
from torch.nn import functional as F

from seqkern.tasks import listops
from seqkern.tasks.job import JobSpec
from seqkern.tasks.options import TrainOptions
from seqkern.tasks.registry import make_job
from seqkern.tasks.training import Trainer
from seqkern.tasks.treebank import LabelledTree, parse_tree, read_trees
from seqkern.tasks.trees import LEFT_OUT, SENTIMENT, TreeJob, label_scores
from seqkern.tasks.vocab import Labels

SENTENCE = "(3 (2 Not) (4 (2 too) (3 bad)))"
SMALL = {"embedding": 4, "hidden": 5}


def test_a_tree_in_brackets():
    assert parse_tree(SENTENCE) == LabelledTree(
        ("", "Not", "", "too", "bad"), (-1, 0, 0, 2, 2), ("3", "2", "4", "2", "3")
    )
    assert parse_tree(" ( X   word )").words == ("word",)
    assert parse_tree("(2 1\u00a01/2)").words == ("1\u00a01/2",)  # no space that ends a word
    assert parse_tree("(S (NP a)(VP(V b)(NP c)))").parents == (-1, 0, 0, 2, 2)


def test_a_tree_deeper_than_pythons_stack():
    n = 5000
    tree = parse_tree("(1 " * n + "w" + ")" * n)
    assert tree.parents == (-1, *range(n - 1))
    text = "[MAX 1 " * n + "2" + " ]" * n
    deep = listops.parse(text)
    assert deep.labels[0] == "2"
    assert listops.write(deep) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "brackets are closed, got 0 open"),
        ("(3 (2 a) (2 b)", "brackets are closed, got 1 open"),
        ("(3 (2 a) (2 b)))", r"the end of the tree, got '\)' as part 12"),
        ("(3 a) (2 b)", r"the end of the tree, got '\(' as part 5"),
        ("3 a", r"\( to begin a tree, got '3' as part 1"),
        ("()", r"a label after \(, got '\)' as part 2"),
        ("(3 ((2 a)))", r"a label after \(|a word"),
        ("(((2 a)))", r"a label after \(, got '\(' as part 3"),
        ("((2 a) (2 b))", r"the end of the tree, got '\(' as part 6"),
        ("((2 a)", "brackets are closed, got 1 open"),
        ("(3)", r"a word or a node, got '\)' as part 3"),
        ("(3 a b)", "one word or nodes in a node, and then .* got 'b' as part 4"),
        ("(3 a (2 b))", r"one word or nodes in a node, and then .* got '\(' as part 4"),
        ("(3 (2 b) a)", "one word or nodes in a node, and then .* got 'a' as part 7"),
    ],
)
def test_what_is_no_tree_is_refused_with_its_line(tmp_path, text, message):
    with pytest.raises(ValueError, match=f"^expected .*{message}"):
        parse_tree(text)
    path = tmp_path / "trees.txt"
    path.write_text(f"{SENTENCE}\n\n{text}\n")
    if text:
        with pytest.raises(ValueError, match=rf"trees\.txt:3: expected .*{message}"):
            read_trees(path)
    else:
        assert read_trees(path) == [parse_tree(SENTENCE)]


# The first sentence of the Penn Treebank's own form, and one a line.
MRG = """
( (S
    (NP-SBJ (DT The) (NN dog) )
    (VP (VBZ barks)
      (ADVP (RB very) (RB often) (-NONE- *) ))
    (. .) ))
( (S (NP (PRP It)) (VP (VBZ does))) )
"""


def test_trees_of_the_penn_treebank(tmp_path):
    """Over several lines, in brackets without a label."""
    path = tmp_path / "wsj.mrg"
    path.write_text(MRG)
    first, second = read_trees(path)
    text = "(S (NP-SBJ (DT The) (NN dog)) (VP (VBZ barks) (ADVP (RB very) (RB often) (-NONE- *)))"
    assert first == parse_tree(f"{text} (. .))")
    assert second == parse_tree("(S (NP (PRP It)) (VP (VBZ does)))")
    assert (first.words[0], first.labels[:2], second.parents) == (
        "The",
        ("S", "NP-SBJ"),
        (-1, 0, 1, 0, 3),
    )


@pytest.mark.parametrize(
    ("wrong", "line", "message"),
    [
        # The tree of line 7 is not taken for a part of the one before, whatever it closes.
        (MRG.replace("(. .) ))", "(. .) )"), 2, "closed, got 1 open"),
        (MRG.replace("(. .) ))", "(. .) )").rstrip() + ")", 2, "closed, got 1 open"),
        (MRG.replace("often)", "often))"), 2, "the end of the tree, got '.' as part"),
        (MRG.rstrip()[:-1], 7, "closed, got 1 open"),
        (MRG.replace("(NN dog)", "(NN the dog)"), 2, "one word or nodes"),
        ("(3 (2 a) (2 b)\n(3 (2 a) (2 b)))\n", 1, "closed, got 1 open"),
    ],
)
def test_a_malformed_tree_is_named_by_the_line_it_begins_at(tmp_path, wrong, line, message):
    path = tmp_path / "wsj.mrg"
    path.write_text(wrong)
    with pytest.raises(ValueError, match=rf"wsj\.mrg:{line}: expected .*{message}"):
        read_trees(path)


def test_more_children_than_the_model_has_are_refused_before_training(tmp_path):
    folder_of(tmp_path)
    (tmp_path / "test.txt").write_text("(2 good)\n\n(2 (2 (2 so) (2 so) (2 so)) (3 good))\n")
    wide = "expected at most 2 children of a node .* got 3"
    with pytest.raises(ValueError, match=rf"test\.txt:3: {wide}"):
        make_job(JobSpec("treelstm", "trees", str(tmp_path), sizes=SMALL))
    for sizes in ({"children": 3}, {"kind": "childsum"}):
        job = make_job(JobSpec("treelstm", "trees", str(tmp_path), sizes=SMALL | sizes))
        assert 0 <= job.evaluate("test")["accuracy"] <= 1


def test_a_file_without_a_tree_is_refused(tmp_path):
    (tmp_path / "none.txt").write_text("\n \n")
    with pytest.raises(ValueError, match=r"none\.txt: holds no tree"):
        read_trees(tmp_path / "none.txt")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("[MAX 2 9 [MIN 4 7 ] 0 ]", "9"),
        ("[MIN 2 9 [MAX 4 7 ] 1 ]", "1"),
        ("[MED 1 8 3 ]", "3"),
        ("[MED 1 8 3 4 ]", "3"),  # 3.5 rounded down
        ("[MED 9 8 ]", "8"),
        ("[SUM_MOD 9 8 7 ]", "4"),
        ("[SUM_MOD 5 [MED 2 2 9 ] [SUM_MOD 9 9 ] ]", "5"),
        ("7", None),
    ],
)
def test_values_of_expressions(text, value):
    if value is None:
        with pytest.raises(ValueError, match="got '7' as part 1"):
            listops.parse(text)
        return
    tree = listops.parse(text)
    assert tree.labels[0] == value
    assert listops.write(tree) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "whose brackets are closed"),
        ("[MAX 1 2", "whose brackets are closed"),
        ("[MAX 1 ]", "two digits or more, got ']' as part 3"),
        ("[MAX 1 2 ] 3", "got '3' as part 5"),
        ("[MAX 1 2 ] [MIN 1 2 ]", r"got '\[MIN' as part 5"),
        ("[SUM 1 2 ]", r"got '\[SUM' as part 1"),
        ("[MAX 1 12 ]", "got '12' as part 3"),
        ("[MAX 1 MIN 2 ]", "got 'MIN' as part 3"),
    ],
)
def test_what_is_no_expression_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        listops.parse(text)


def test_generated_expressions_keep_their_limits():
    trees = listops.generate(400, seed=3, depth=3, arguments=4, nested=0.5)
    assert trees == listops.generate(400, seed=3, depth=3, arguments=4, nested=0.5)
    assert trees != listops.generate(400, seed=4, depth=3, arguments=4, nested=0.5)
    assert len(set(trees)) == 400
    depths, widths = set(), set()
    for tree in trees:
        assert sorted(listops.parse(listops.write(tree)).labels) == sorted(tree.labels)
        depth = [1] * len(tree.parents)
        for node, parent in enumerate(tree.parents):
            if parent >= 0:
                depth[node] = depth[parent] + 1
        depths.add(max(depth) - 1)  # the digits are one below their operator
        widths |= {tree.parents.count(node) for node in set(tree.parents) - {-1}}
    assert depths == {1, 2, 3}
    assert widths == {2, 3, 4}


def test_impossible_generators_are_refused():
    for wrong in ({"depth": 0}, {"arguments": 1}, {"nested": 1.5}, {"count": 0}):
        with pytest.raises(ValueError, match="count and depth must be at least 1"):
            listops.generate(**{"count": 2, "seed": 1, **wrong})
    with pytest.raises(ValueError, match="operators must be some of"):
        listops.generate(2, 1, operators=["FIRST"])
    with pytest.raises(ValueError, match=r"asked for 101 .* found 100 of depth 1"):
        listops.generate(101, 1, depth=1, arguments=2, operators=["MAX"])


def test_binary_accuracy_is_read_off_five_labels():
    """By hand: neutral roots are dropped, and P(3) + P(4) stands against P(0) + P(1)."""
    p = torch.tensor(
        [
            [0.3, 0.2, 0.4, 0.05, 0.05],  # found 2, negative
            [0.0, 0.3, 0.1, 0.29, 0.31],  # found 4, positive
            [0.2, 0.25, 0.0, 0.3, 0.25],  # found 3, positive
            [0.35, 0.05, 0.2, 0.25, 0.15],  # found 0, no side above the other by the sums .4 .4
        ]
    )
    labels = Labels(SENTIMENT)
    scores = label_scores(labels, p.log(), ["2", "4", "1", "3"])
    assert scores == {"accuracy": 0.5, "binary": pytest.approx(1 / 3)}
    assert label_scores(labels, p.log(), ["2"] * 4) == {"accuracy": 0.25}
    assert "binary" not in label_scores(Labels("01345"), p.log(), ["4"] * 4)


def folder_of(path, part_sizes=(30, 8, 8)):
    """A folder of trees: a node is positive where more good than bad stands below it."""
    rng = random.Random(4)

    def tree(words):
        if words == 1:
            word = rng.choice(["good", "bad", "so"])
            return {"good": 1, "bad": -1, "so": 0}[word], word
        first = rng.randrange(1, words)
        (a, left), (b, right) = tree(first), tree(words - first)
        return a + b, f"{labelled(a, left)} {labelled(b, right)}"

    def labelled(total, text):
        return f"({2 + (total > 0) - (total < 0)} {text})"

    for name, size in zip(("train", "dev", "test"), part_sizes, strict=True):
        lines = [labelled(*tree(rng.randrange(1, 7))) for _ in range(size)]
        (path / f"{name}.txt").write_text("\n".join(lines))
    return str(path)


@pytest.mark.parametrize("loss", ["nodes", "root"])
def test_a_batch_counts_the_labels_of_its_loss(tmp_path, loss):
    job = TreeJob(
        JobSpec("treelstm", "trees", folder_of(tmp_path), sizes=SMALL, reading={"loss": loss})
    )
    trees = job.data.train[:5]
    batch = job.collate(trees)
    counted = [node == 0 or loss == "nodes" for tree in trees for node in range(len(tree.labels))]
    assert (batch.labels != LEFT_OUT).tolist() == counted
    assert (batch.units, batch.rows) == (sum(counted), 5)
    job.model.eval()
    log_p = job.model(batch.forest).log_softmax(-1)
    right = [job.labels.encode(label) for tree in trees for label in tree.labels]
    every = log_p[range(len(right)), right]
    assert job.loss(batch).item() == pytest.approx(-every[counted].mean().item(), rel=1e-5)


def test_scores_and_predictions_of_a_folder(tmp_path):
    job = TreeJob(JobSpec("treelstm", "trees", folder_of(tmp_path), sizes=SMALL))
    scores = job.evaluate("test")
    trees = job.data.test
    roots, right, nll = 0, 0, []
    for tree in trees:
        log_p = job.model(job.forest([tree])).log_softmax(-1)
        y = torch.tensor([job.labels.encode(label) for label in tree.labels])
        roots += int(log_p[0].argmax() == y[0])
        right += int((log_p.argmax(-1) == y).sum())
        nll += F.nll_loss(log_p, y, reduction="none").tolist()
    assert scores == {
        "accuracy": roots / len(trees),
        "nodes": pytest.approx(right / len(nll)),
        "loss": pytest.approx(sum(nll) / len(nll), rel=1e-5),
    }
    texts = (tmp_path / "test.txt").read_text().splitlines()
    assert len(job.predict(texts)) == len(texts)
    found = zip(job.predict(texts), trees, strict=True)
    assert sum(label == tree.labels[0] for label, tree in found) == roots


def test_unknown_words_and_labels(tmp_path):
    """A rare word is unknown, and a label that training never saw is never right."""
    folder_of(tmp_path)
    (tmp_path / "test.txt").write_text("(9 (1 good) (9 never))\n(9 good)")
    job = TreeJob(
        JobSpec("treelstm", "trees", str(tmp_path), sizes=SMALL, reading={"min_count": 1000})
    )
    assert len(job.words) == 4
    assert job.evaluate("test")["accuracy"] == 0
    assert job.evaluate("test")["nodes"] <= 0.25


@pytest.mark.parametrize(
    ("task", "data", "reading", "message"),
    [
        ("trees", "", {}, "needs data: a folder of train.txt"),
        ("trees", "{folder}/none", {}, "holds no train.txt"),
        ("sst", "{folder}", {}, "holds no corpus 'sst'"),
        ("listops", "", {"loss": "leaves"}, "loss must be one of"),
        ("listops", "", {"held_out": 0}, "held_out must be at least 1"),
        ("parses", "", {}, "task of model 'treelstm' must be one of listops, sst, trees"),
    ],
)
def test_bad_tasks_are_refused(tmp_path, task, data, reading, message):
    spec = JobSpec("treelstm", task, data.format(folder=tmp_path), reading=reading)
    with pytest.raises(ValueError, match=message):
        make_job(spec)


def test_listops_is_learned_from_gold_trees():
    """Expressions of MAX and MIN up to three deep, from the value of the whole alone."""
    reading = {"depth": 3, "arguments": 4, "examples": 4000, "held_out": 200}
    spec = JobSpec(
        "treelstm",
        "listops",
        sizes={"embedding": 16, "hidden": 48, "kind": "childsum"},
        reading={**reading, "operators": ("MAX", "MIN")},
    )
    options = TrainOptions(
        epochs=4, batch_size=32, lr=1e-2, optimizer="adam", weight_decay=0.0, warmup=0
    )
    trainer = Trainer(make_job(spec), options)
    for _ in trainer.train(trainer.steps):
        pass
    assert trainer.job.evaluate("test")["accuracy"] >= 0.95
    assert trainer.job.predict(["[MAX 2 8 [MIN 4 7 ] 0 ]", "[MIN 6 5 ]"]) == ["8", "5"]


def test_the_treebank_is_read_whole(corpora):
    (path,) = corpora.glob("**/sst/dev.txt.gz")
    trees = read_trees(path)
    assert len(trees) == 1101
    assert sum(len(tree.labels) for tree in trees) == 41447
    assert sum(tree.labels[0] != "2" for tree in trees) == 872


def test_example(example, tmp_path):
    out = example("treelstm.py", "--steps", "2")
    assert re.search(r"^step 2: loss \d", out, re.MULTILINE)
    assert re.search(r"^held-out trees: [\d.]+% right$", out, re.MULTILINE)
    assert re.search(r"^\d\t\[MAX 2 9 \[MIN 4 7 \] 0 \]$", out, re.MULTILINE)
    folder_of(tmp_path)
    out = example("treelstm.py", "--steps", "2", "--data", str(tmp_path), SENTENCE)
    assert re.search(rf"^[123]\t{re.escape(SENTENCE)}$", out, re.MULTILINE)
