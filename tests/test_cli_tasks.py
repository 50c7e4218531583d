"""The commands that train and use models, called as a user calls them."""

import gzip
import json
import random
import re
from dataclasses import replace

import pytest
import torch
import typer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from typer.testing import CliRunner

from seqkern.cli.demo import demo
from seqkern.cli.evaluate import evaluate
from seqkern.cli.plot import plot
from seqkern.cli.predict import load_job, predict, translate
from seqkern.cli.reproduce import reproduce
from seqkern.cli.train import train
from seqkern.tasks import recipes
from seqkern.tasks.run import best_path, checkpoint_path, log_path, read_log, scores_path


@pytest.fixture(scope="module")
def app():
    app = typer.Typer()
    for command in (train, evaluate, predict, translate, plot, reproduce, demo):
        app.command(command.__name__)(command)
    return app


@pytest.fixture(scope="module")
def call(app):
    def call(*arguments, status=0, **options):
        """Runs a command; returns its output, or its one line of error where status is not 0."""
        result = CliRunner().invoke(app, [str(a) for a in arguments], **options)
        assert result.exit_code == status, (result.output, result.exception)
        if status == 0:
            return result.stdout
        lines = result.stderr.splitlines()
        assert len(lines) == 1, lines
        return lines[0]

    return call


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Words and the same letters in capitals."""
    draw = random.Random(0)
    words = sorted({"".join(draw.choices("abcd", k=draw.randint(1, 5))) for _ in range(300)})
    path = tmp_path_factory.mktemp("data") / "pairs.tsv"
    path.write_text("".join(f"{word}\t{' '.join(word.upper())}\n" for word in words))
    return path


TRAIN = ("train", "rnnsearch", "--task", "pairs")


@pytest.fixture(scope="module")
def run(call, data, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "toy"
    settings = ["--set", "batch_size=32", "--set", "hidden=24", "--set", "lr=0.01"]
    assert "done" in call(*TRAIN, "--run", run, "--data", data, "--steps", 300, *settings)
    return run


def test_train_evaluate_predict_translate(call, run):
    out = call("evaluate", run)
    assert re.search(r"sequence_error +0\.0000", out)
    assert "rnnsearch on pairs, test: 8 examples" in out
    assert "rnnsearch on pairs, dev" in call("evaluate", run, "--part", "dev", "--beam", 1)
    for layers in ("seqkern", "torch"):
        out = call("predict", "abcd", "dab", "--checkpoint", run, "--layers", layers)
        assert out == "abcd\tA B C D\ndab\tD A B\n"
    assert call("translate", run, input="abcd\n\ndab\n") == "A B C D\n\nD A B\n"
    assert call("translate", checkpoint_path(run), input="") == ""


def test_translate_keeps_the_lines(call, run, tmp_path):
    """A line ends where a file's does, and nowhere else; it may be compressed."""
    path = tmp_path / "lines.gz"
    path.write_bytes(gzip.compress("\ufeffabcd\n\u200b\nda\u0085b\n".encode()))
    line = call("translate", run, path, status=2)
    assert line.startswith(
        f"seqkern: {path}:3: cannot decode 'da\\x85b': symbols ['\\x85'] are not"
    )
    line = call("translate", run, input="abcd\n\n\nxyz\n", status=2)
    assert line.startswith("seqkern: standard input:4: cannot decode 'xyz': symbols")
    path.write_bytes(gzip.compress("\ufeffabcd\r\n\u200b\ndab".encode()))
    assert call("translate", run, path) == "A B C D\n\nD A B\n"
    latin = tmp_path / "latin.txt"
    latin.write_bytes(b"abcd\n\xe4\n")
    assert f"{latin}:2: not UTF-8" in call("translate", run, latin, status=2)
    line = call("translate", run, input=b"\xe4", status=2)
    assert line.startswith("seqkern: standard input:1: not UTF-8")


@pytest.mark.parametrize(
    ("model", "task", "sizes", "good", "bad"),
    [
        ("treelstm", "listops", ("examples=20", "held_out=5", "depth=2"), "[MAX 1 2 ]", "[MAX 1"),
        ("graph", "listops", ("examples=20", "held_out=5", "depth=2"), "[MAX 1 2 ]", "[MAX 1"),
        ("fast-weights", "retrieval", ("train=20", "dev=5", "test=5"), "c9k8??c", "c9k8?c"),
    ],
)
def test_translate_names_the_line_of_any_task(call, tmp_path, model, task, sizes, good, bad):
    given = [word for size in ("hidden=8", "embedding=8", *sizes) for word in ("--set", size)]
    call("train", model, "--task", task, "--run", tmp_path, "--steps", 1, *given)
    assert len(call("translate", tmp_path, input=f"{good}\n{good}\n").splitlines()) == 2
    line = call("translate", tmp_path, input=f"{good}\n\n{bad}\n", status=2)
    assert line.startswith("seqkern: standard input:3: expected ")


def test_a_new_run_has_nothing_of_the_old(call, data, tmp_path):
    """The best weights of a run that began anew are its own."""
    run = tmp_path / "run"
    small = ["--run", run, "--data", data, "--steps", 2]
    call(*TRAIN, *small, "--set", "hidden=8", "--set", "evaluate_every=1")
    assert best_path(run).exists()
    checkpoint_path(run).unlink()
    call(*TRAIN, *small, "--set", "hidden=12")
    assert not best_path(run).exists()
    assert load_job(run).model.config.hidden == 12


def test_other_tokens(call, tmp_path):
    path = tmp_path / "pairs.tsv"
    path.write_text("".join(f"{a} {b}\t{b}{a}\n" for a in "abcd" for b in "xyz"))
    run = tmp_path / "run"
    tokens = ["--set", "source_tokens=words", "--set", "target_tokens=chars"]
    call(*TRAIN, "--run", run, "--data", path, "--steps", 2, "--set", "hidden=8", *tokens)
    out = call("predict", "a x", "--checkpoint", run)
    word, target = out.rstrip("\n").split("\t")
    assert word == "a x"
    assert " " not in target


def test_resuming_a_finished_run_changes_nothing(call, run):
    before = log_path(run).read_text()
    assert "resuming" in call(*TRAIN, "--run", run)
    assert log_path(run).read_text() == before


def test_early_stopping_keeps_the_best_weights(call, data, tmp_path):
    """At a learning rate of nearly nothing no evaluation is better than the first ones."""
    run = tmp_path / "run"
    settings = ["lr=1e-12", "hidden=8", "batch_size=32", "evaluate_every=2", "patience=3"]
    given = [word for setting in settings for word in ("--set", setting)]
    out = call(*TRAIN, "--run", run, "--data", data, "--steps", 50, *given)
    scores = read_log(scores_path(run))
    assert [line["step"] for line in scores] == [2, 4, 6, 8]
    assert out.count("dev loss") == 4
    assert torch.load(best_path(run), weights_only=True)["step"] == 2
    assert len(read_log(log_path(run))) == 8
    assert "done" in call(*TRAIN, "--run", run)
    assert len(read_log(log_path(run))) == 8


def test_tensorboard_shows_losses_and_scores(call, data, tmp_path):
    run = tmp_path / "run"
    given = ["--set", "hidden=8", "--set", "evaluate_every=2", "--tensorboard"]
    call(*TRAIN, "--run", run, "--data", data, "--steps", 4, *given)
    events = EventAccumulator(str(run)).Reload()
    shown = {
        tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }
    losses = [(line["step"], line["loss"]) for line in read_log(log_path(run))]
    assert shown["train/loss"] == [(n, pytest.approx(loss)) for n, loss in losses]
    for name in ("loss", "sequence_error"):
        scores = [(line["step"], line[name]) for line in read_log(scores_path(run))]
        assert len(scores) == 2
        assert shown[f"dev/{name}"] == [(n, pytest.approx(value)) for n, value in scores]


def test_averaged_weights(call, data, tmp_path):
    run = tmp_path / "run"
    settings = ["lr=0.01", "hidden=8", "batch_size=32", "evaluate_every=4", "average=2"]
    given = [word for setting in settings for word in ("--set", setting)]
    call(*TRAIN, "--run", run, "--data", data, "--steps", 12, *given)
    *_, last, averaged = read_log(scores_path(run))
    assert (last["step"], averaged["step"], averaged["averaged"]) == (12, 12, True)
    content = torch.load(checkpoint_path(run), weights_only=True)
    first, second = (weights["output.bias"] for weights in content["recent"])
    assert torch.equal(second, content["model"]["output.bias"])
    if averaged["sequence_error"] <= min(
        line["sequence_error"] for line in read_log(scores_path(run))
    ):
        best = torch.load(best_path(run), weights_only=True)["model"]["output.bias"]
        torch.testing.assert_close(best, (first + second) / 2)


def test_plots(call, run, tmp_path):
    for kind, more, size in (("curves", [], 5000), ("alignments", ["--text", "abcd"], 3000)):
        for suffix in (".svg", ".png"):
            out = tmp_path / (kind + suffix)
            call("plot", kind, run, "--out", out, *more)
            assert out.stat().st_size > size
    assert "alignments need a source" in call("plot", "alignments", run, status=2)
    assert "task 'pairs' has no BLEU by length" in call("plot", "lengths", run, status=2)
    assert "has no gradients over time" in call("plot", "gradients", run, status=2)
    assert "kind must be" in call("plot", "pie", run, status=2)
    line = call("plot", "curves", run, "--out", tmp_path / "a.txt", status=2)
    assert "must end in one of" in line


def test_plots_refuse_what_they_do_not_show(call, run, data, tmp_path):
    """Runs after the first of alignments, texts of other figures, curves on unlike axes."""
    out = ["--out", tmp_path / "a.svg"]
    line = call("plot", "alignments", run, tmp_path / "none", "--text", "abcd", *out, status=2)
    assert line == "seqkern: alignments are of one run, got 2"
    line = call("plot", "curves", run, "--text", "abcd", *out, status=2)
    assert line == "seqkern: text is for alignments, got it for 'curves'"
    other = tmp_path / "other"
    small = ["--data", data, "--steps", 1, "--set", "hidden=8", "--set", "bleu=none"]
    call(*TRAIN, "--run", other, *small)
    line = call("plot", "curves", run, other, *out, status=2)
    assert line.endswith("unit and one score, got symbol and sequence_error, symbol and bleu")
    assert not (tmp_path / "a.svg").exists()


def test_bleu_by_length_is_drawn(call, data, tmp_path):
    runs = [tmp_path / name for name in ("a", "b")]
    given = ["--set", "hidden=8", "--set", "bleu=none", "--data", data, "--steps", 2]
    for run in runs:
        call(*TRAIN, "--run", run, *given)
    out = tmp_path / "lengths.svg"
    lines = call("plot", "lengths", *runs, "--out", out).splitlines()
    assert [line[:2] for line in lines[:-1]] == ["a:"] * (len(lines) // 2) + ["b:"] * (
        len(lines) // 2
    )
    assert "symbols" in lines[0]
    assert out.stat().st_size > 5000


def test_the_vanishing_gradient_is_drawn(call, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("so it goes and so it went\n" * 50)
    given = ["--set", "batch_size=4", "--set", "window=8", "--set", "hidden=8"]
    runs = [tmp_path / cell for cell in ("LSTM", "RNN")]
    for run in runs:
        cell = ["--set", f"cell={run.name}", "--run", run, "--steps", 2]
        call("train", "rnnlm", "--task", "text", "--data", text, *cell, *given)
    out = tmp_path / "gradients.svg"
    call("plot", "gradients", *runs, "--out", out)
    assert out.stat().st_size > 5000


def test_reproduce(call, data, tmp_path, monkeypatch):
    recipe = replace(
        recipes.RECIPES["g2p"],
        task="pairs",
        target=0.9,
        options={"steps": 60, "lr": 1e-2, "warmup": 5, "evaluate_every": 30},
        sizes={"hidden": 16},
    )
    monkeypatch.setitem(recipes.RECIPES, "toy", recipe)
    out = call("reproduce", "toy", "--data", data, "--seeds", 2, "--out", tmp_path)
    assert out.count("target 0.9: ") == 2
    results = [json.loads((tmp_path / f"toy-seqkern-{i}/result.json").read_text()) for i in (1, 2)]
    for seed, result in enumerate(results, 1):
        assert result["seed"] == seed
        assert result["score"] == result["scores"]["sequence_error"]
        assert result["reached"] == (result["score"] <= 0.9)
        assert result["steps"] == 60
        assert result["seconds"] > 0
    assert results[0]["scores"]["loss"] != results[1]["scores"]["loss"]
    compared = replace(recipe, target=None, published="", beside="g2p")
    monkeypatch.setitem(recipes.RECIPES, "toy", compared)
    out = call("reproduce", "toy", "--data", data, "--out", tmp_path)
    assert "to be compared with g2p" in out
    assert "published" not in out
    again = json.loads((tmp_path / "toy-seqkern-1/result.json").read_text())
    assert (again["target"], again["reached"]) == (None, None)
    assert again["score"] == results[0]["score"]
    moved = data.rename(tmp_path / "moved.tsv")
    try:
        assert "to be compared" in call("reproduce", "toy", "--data", moved, "--out", tmp_path)
        other = tmp_path / "other.tsv"
        other.write_text(moved.read_text() + "aaaaaaa\tB\n")
        line = call("reproduce", "toy", "--data", other, "--out", tmp_path, status=2)
        assert "was trained on other data" in line
    finally:
        moved.rename(data)
    try:
        call("reproduce", "toy", "--data", data, "--threads", 2, "--out", tmp_path / "two")
    finally:
        torch.set_num_threads(1)
    machines = [
        json.loads((folder / "toy-seqkern-1/result.json").read_text())["machine"]
        for folder in (tmp_path, tmp_path / "two")
    ]
    assert [machine["threads"] for machine in machines] == [1, 2]
    assert "threads must be in 1 .. 1024, got 0" in call(
        "reproduce", "toy", "--threads", 0, status=2
    )
    assert "toy" in call("reproduce")
    assert "recipe must be one of" in call("reproduce", "unheard-of", status=2)


def test_one_folder_of_corpora_is_for_every_recipe(call, tmp_path, monkeypatch):
    """A recipe that reads none of them leaves it alone; a user who names one is told."""
    recipe = replace(
        recipes.RECIPES["fast-weights-20"],
        reading={"train": 40, "dev": 10, "test": 10, "pairs": 2},
        sizes={"hidden": 8, "embedding": 8, "readout": 8},
        options={"steps": 2, "batch_size": 8},
    )
    monkeypatch.setitem(recipes.RECIPES, "toy", recipe)
    out = call("reproduce", "toy", "--data", tmp_path, "--out", tmp_path)
    assert "toy, seed 1: error" in out
    line = call("evaluate", tmp_path / "toy-seqkern-1", "--data", tmp_path, status=2)
    assert line == f"seqkern: task 'retrieval' takes no data, got '{tmp_path}'"


def test_reproduce_refuses_the_run_of_another_recipe(call, data, tmp_path, monkeypatch):
    """A result of the folder's run is none of a recipe that was changed since."""
    options = {"steps": 2, "lr": 1e-2, "warmup": 0}
    toy = replace(recipes.RECIPES["g2p"], task="pairs", options=options, sizes={"hidden": 8})
    again = ("reproduce", "toy", "--data", data, "--out", tmp_path)
    monkeypatch.setitem(recipes.RECIPES, "toy", toy)
    call(*again)
    result = (tmp_path / "toy-seqkern-1/result.json").read_text()
    for changed, message in (
        ({"options": {**options, "lr": 1e-4}}, "lr is 0.0001 here and 0.01 in"),
        ({"options": {**options, "steps": 4}}, "steps is 4 here and 2 in"),
        ({"options": {"steps": 2, "lr": 1e-2}}, "warmup is 200 here and 0 in"),
        ({"sizes": {}}, "sizes is {} here and {'hidden': 8} in"),
        ({"reading": {"reverse": True}}, "reading is {'reverse': True} here and {} in"),
    ):
        monkeypatch.setitem(recipes.RECIPES, "toy", replace(toy, **changed))
        line = call(*again, status=2)
        assert line.startswith(f"seqkern: {message} {tmp_path}"), line
        assert line.endswith("choose another --out")
    assert (tmp_path / "toy-seqkern-1/result.json").read_text() == result


def test_what_train_refuses(call, run, data, tmp_path):
    line = call(*TRAIN, "--run", run, "--set", "lr=0.5", status=2)
    assert line.startswith("seqkern: lr is 0.5 here and 0.01 in")
    for unknown in ("source_symbols=9", "model=3"):
        line = call(*TRAIN, "--run", run, "--set", unknown, status=2)
        name = unknown.partition("=")[0]
        assert line.startswith(f"seqkern: no setting '{name}' of model 'rnnsearch'; there are acc")
    line = call("train", "rnnsearch", "--task", "cmudict", "--run", run, status=2)
    assert line.startswith("seqkern: task is 'cmudict' here and")
    new = [*TRAIN, "--run", tmp_path / "new"]
    assert "absent.tsv" in call(*new, "--data", tmp_path / "absent.tsv", status=2)
    for setting, message in {
        "lr=-1": "seqkern: lr must be positive, got -1.0",
        "source_tokens=bytes": "seqkern: tokens must be one of",
        "hidden=7": "seqkern: hidden must be even, half for each direction, got 7",
        "hidden=many": "seqkern: hidden must be of kind int, as 128, got 'many'",
        "source_symbols=9": "seqkern: no setting 'source_symbols'",
        "width=7": "seqkern: no setting 'width' of model 'rnnsearch'; there are",
        "threads=100000": "seqkern: threads must be in 1 .. 1024, got 100000",
        "lr": "seqkern: a setting must be NAME=VALUE, got 'lr'",
        "bleu=foo": "seqkern: bleu must be a tokenisation of sacrebleu",
        "pad=1000": "seqkern: pad must be in 0 .. ",
        "smoothing=2": "seqkern: smoothing must be in [0, 1), got 2.0",
        "smoothing=-0.5": "seqkern: smoothing must be in [0, 1), got -0.5",
        "longest=-1": "seqkern: longest must not be negative, got -1",
        "symbols=-1": "seqkern: symbols must not be negative, got -1",
    }.items():
        line = call(*new, "--data", data, "--set", setting, status=2)
        assert line.startswith(message), line
    for device in ("foo", "cuda:99"):
        line = call(*new, "--data", data, "--device", device, status=2)
        assert line.startswith(f"seqkern: device must be one that is here, got '{device}'")
    line = call(*new, "--data", data, "--device", "meta", status=2)
    assert line == "seqkern: device must be cpu or cuda, got 'meta'"
    for seed in (2**70, -1):
        line = call(*new, "--data", data, "--seed", seed, status=2)
        assert line == f"seqkern: seed must be in 0 .. 4294967295, got {seed}"
    assert "'pairs' needs data: a file" in call(*new, status=2)
    line = call(*new, "--data", data, "--layers", "cudnn", status=2)
    assert "layers must be one of" in line
    assert "model must be one of" in call("train", "bert", "--task", "pairs", status=2)
    assert "task of model 'rnnsearch' must be one of" in call(
        "train", "rnnsearch", "--task", "trees", status=2
    )
    assert "needs data: the folder that holds" in call(
        "train", "rnnsearch", "--task", "multi30k-de-en", status=2
    )
    trees = ["train", "treelstm", "--task", "listops", "--run", tmp_path / "new"]
    line = call(*trees, "--set", "operators=[[1]]", status=2)
    assert line.startswith("seqkern: operators must hold str, as ('MAX', ")
    assert line.endswith("got [[1]]")
    path, corpora = tmp_path / "labelled.tsv", ["--data", "/nowhere"]
    path.write_text("a\tx\n")
    for model, task, more, message in (
        ("fast-weights", "retrieval", corpora, "task 'retrieval' takes no data, got '/nowhere'"),
        ("graph", "listops", corpora, "task 'listops' takes no data, got '/nowhere'"),
        ("rnnsearch", "cmudict", corpora, "task 'cmudict' takes no data, got '/nowhere'"),
        (
            "textcnn",
            "labelled",
            ["--data", path, "--set", "labels=fine"],
            "['labels']: not options of task 'labelled', which has min_count, unknown, words",
        ),
        (
            "treelstm",
            "trees",
            ["--data", path, "--set", "depth=2"],
            "['depth']: not options of task 'trees', which has loss, min_count",
        ),
        (
            "graph",
            "conllu",
            ["--data", path, "--set", "loss=root"],
            "['loss']: not options of task 'conllu', which has min_count",
        ),
    ):
        line = call("train", model, "--task", task, "--run", tmp_path / "new", *more, status=2)
        assert line == f"seqkern: {message}"
    bad = tmp_path / "bad.tsv"
    bad.write_text("a\tb\nno tab\n")
    line = call(*new, "--data", bad, status=2)
    assert line.startswith(f"seqkern: {bad}:2: expected source<TAB>target")
    assert not checkpoint_path(tmp_path / "new").exists()


def test_what_evaluate_and_predict_refuse(call, run, data, tmp_path):
    path = checkpoint_path(run)
    assert "symbols ['?'] are not" in call("predict", "ab?", "--checkpoint", path, status=2)
    assert "is empty" in call("predict", "", "--checkpoint", path, status=2)
    absent = tmp_path / "absent.pt"
    assert "absent.pt" in call("predict", "ab", "--checkpoint", absent, status=2)
    cut = tmp_path / "cut.pt"
    cut.write_bytes(path.read_bytes()[:-100])
    assert "not a whole checkpoint" in call("evaluate", cut, status=2)
    assert "part must be test or dev, got 'train'" in call(
        "evaluate", path, "--part", "train", status=2
    )
    other = tmp_path / "other.tsv"
    other.write_text(data.read_text() + "aaaaaaa\tB\n")
    assert "was trained on other data" in call("evaluate", path, "--data", other, status=2)
    content = torch.load(path, weights_only=True)
    content["vocabularies"]["target"]["symbols"].pop()
    torch.save(content, cut)
    assert "weights do not fit its model: size mismatch for embed_y" in call(
        "predict", "ab", "--checkpoint", cut, status=2
    )


@pytest.mark.gpu
def test_trained_on_the_cpu_used_on_a_gpu(call, run, data, tmp_path, monkeypatch):
    """A model that has no doubts answers alike; a result of a GPU has its name."""
    gpu = ["--device", "cuda"]
    assert call("evaluate", run, *gpu) == call("evaluate", run)
    assert call("predict", "abcd", "--checkpoint", run, *gpu) == "abcd\tA B C D\n"
    assert call("translate", run, *gpu, input="abcd\n") == "A B C D\n"
    call("plot", "alignments", run, "--text", "abcd", "--out", tmp_path / "a.svg", *gpu)
    options = {"steps": 4, "evaluate_every": 2}
    recipe = replace(recipes.RECIPES["g2p"], task="pairs", options=options, sizes={"hidden": 16})
    monkeypatch.setitem(recipes.RECIPES, "toy", recipe)
    name = torch.cuda.get_device_name()
    assert f"s on {name}," in call("reproduce", "toy", "--data", data, "--out", tmp_path, *gpu)
    result = json.loads((tmp_path / "toy-seqkern-1/result.json").read_text())
    assert result["machine"]["gpu"] == name


def test_every_command_checks_its_device(call, run, tmp_path):
    """Before it reads anything."""
    for command in (
        ("evaluate", run),
        ("predict", "ab", "--checkpoint", run),
        ("plot", "alignments", run, "--text", "ab"),
        ("reproduce", "g2p", "--out", tmp_path),
    ):
        line = call(*command, "--device", "meta", status=2)
        assert line == "seqkern: device must be cpu or cuda, got 'meta'"
    line = call("translate", run, "--device", "meta", status=2, input="ab\n")
    assert line == "seqkern: device must be cpu or cuda, got 'meta'"


def test_demo(call, data, tmp_path):
    out = tmp_path / "demo"
    options = ["--steps", 60, "--batch-size", 32, "--hidden", 16, "--beam", 2]
    text = call("demo", "--data", data, "--out", out, *options)
    for row in ("training, words/s", "decoding, words/s (beam 2)", "first 50 losses"):
        assert row in text
    page = (out / "report.html").read_text()
    assert page.count("data:image/svg+xml;base64,") == 3
    assert not re.search(r'(src|href)="(?!data:)', page)  # nothing is fetched to show it
    for name in ("torch", "seqkern"):
        assert len(log_path(out / name).read_text().splitlines()) == 60
        assert "sequence_error" in call("evaluate", out / name)
    (out / "torch" / "kept.txt").write_text("of the user")
    call("demo", "--data", data, "--out", out, *options, "--steps", 1)
    assert (out / "torch" / "kept.txt").exists()
    assert "beam must be at least 1, got 0" in call("demo", "--beam", 0, status=2)
