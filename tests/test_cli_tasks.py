"""The commands of the main job, called as a user calls them."""

import random
import re

import pytest
import torch
import typer
from typer.testing import CliRunner

from seqkern.cli.demo import demo
from seqkern.cli.evaluate import evaluate
from seqkern.cli.predict import predict
from seqkern.cli.train import train
from seqkern.tasks.run import checkpoint_path, log_path


@pytest.fixture(scope="module")
def app():
    app = typer.Typer()
    for command in (train, evaluate, predict, demo):
        app.command(command.__name__)(command)
    return app


@pytest.fixture(scope="module")
def call(app):
    def call(*arguments, status=0):
        """Runs a command; returns its output, or its one line of error where status is not 0."""
        result = CliRunner().invoke(app, [str(a) for a in arguments])
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


@pytest.fixture(scope="module")
def run(call, data, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "toy"
    options = ["--steps", 300, "--batch-size", 32, "--hidden", 24, "--lr", 0.01]
    assert "done" in call("train", "--run", run, "--data", data, *options)
    return run


def test_train_evaluate_predict(call, run):
    out = call("evaluate", checkpoint_path(run))
    assert "sequence error rate 0.00%" in out
    assert "dev: " in call("evaluate", checkpoint_path(run), "--part", "dev", "--beam", 1)
    for layers in ("seqkern", "torch"):
        out = call(
            "predict", "abcd", "dab", "--checkpoint", checkpoint_path(run), "--layers", layers
        )
        assert out == "abcd\tA B C D\ndab\tD A B\n"


def test_other_tokens(call, tmp_path):
    path = tmp_path / "pairs.tsv"
    path.write_text("".join(f"{a} {b}\t{b}{a}\n" for a in "abcd" for b in "xyz"))
    run = tmp_path / "run"
    options = ["--steps", 2, "--hidden", 8, "--tokens", "words:chars"]
    call("train", "--run", run, "--data", path, *options)
    out = call("predict", "a x", "--checkpoint", checkpoint_path(run))
    word, target = out.rstrip("\n").split("\t")
    assert word == "a x"
    assert " " not in target


def test_resuming_a_finished_run_changes_nothing(call, run):
    before = log_path(run).read_text()
    assert "resuming" in call("train", "--run", run)
    assert log_path(run).read_text() == before


def test_what_train_refuses(call, run, data, tmp_path):
    line = call("train", "--run", run, "--lr", 0.5, status=2)
    assert line.startswith("seqkern: lr is 0.5 here and 0.01 in")
    line = call("train", "--run", run, "--data", "cmudict", status=2)
    assert line.startswith("seqkern: data is 'cmudict' here and")
    line = call("train", "--run", tmp_path / "new", "--data", tmp_path / "absent.tsv", status=2)
    assert "absent.tsv" in line
    line = call("train", "--run", tmp_path / "new", "--data", data, "--lr", -1, status=2)
    assert line == "seqkern: lr must be positive, got -1.0"
    arguments = ["--run", tmp_path / "new", "--data", data, "--tokens", "chars"]
    assert "tokens must be one of" in call("train", *arguments, status=2)
    arguments = ["--run", tmp_path / "new", "--data", data, "--layers", "cudnn"]
    assert "layers must be one of" in call("train", *arguments, status=2)
    bad = tmp_path / "bad.tsv"
    bad.write_text("a\tb\nno tab\n")
    line = call("train", "--run", tmp_path / "new", "--data", bad, status=2)
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
    assert "was trained on other pairs" in call("evaluate", path, "--data", other, status=2)
    content = torch.load(path, weights_only=True)
    content["target"] = content["target"][:-1]
    torch.save(content, cut)
    assert "the model has 8 target symbols, the vocabulary 7" in call(
        "predict", "ab", "--checkpoint", cut, status=2
    )


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
        assert "sequence error rate" in call("evaluate", checkpoint_path(out / name))
    (out / "torch" / "kept.txt").write_text("of the user")
    call("demo", "--data", data, "--out", out, *options, "--steps", 1)
    assert (out / "torch" / "kept.txt").exists()
    assert "beam must be at least 1, got 0" in call("demo", "--beam", 0, status=2)
