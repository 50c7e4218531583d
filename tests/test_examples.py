"""Examples run, at a tiny size, and print what they promise; those of a task are with its tests."""

import re

import pytest


def test_drop_in_lstm(example):
    out = example("drop_in_lstm.py", "--steps", "3")
    (first, last), (our_first, our_last) = re.findall(r"loss (\S+) -> (\S+) in", out)
    assert float(our_first) == pytest.approx(float(first), abs=5e-6)
    assert float(our_last) == pytest.approx(float(last), abs=5e-5)


def test_convert_model(example):
    out = example("convert_model.py")
    assert "encoder: LSTM of torch.nn is now seqkern.nn" in out
    assert float(re.search(r"outputs: (\S+)", out)[1]) < 1e-5


def test_g2p(example, tmp_path):
    data = tmp_path / "pairs.tsv"
    words = [a + b + c for a in "abcd" for b in "efgh" for c in "ijkl"]
    data.write_text("".join(f"{word}\t{' '.join(word.upper())}\n" for word in words))
    out = example("g2p.py", "--data", str(data), "--steps", "2", "aei", "dhl")
    assert re.search(r"^step 2: loss \d", out, re.MULTILINE)
    assert re.search(r"^held-out words: [\d.]+% wrong$", out, re.MULTILINE)
    assert re.findall(r"^(\w+)\t", out, re.MULTILINE) == ["aei", "dhl"]


def test_seq2seq(example):
    out = example("seq2seq.py", "--steps", "2", "--cell", "lstm", "abc", "fed")
    assert re.search(r"^step 2: loss \d", out, re.MULTILINE)
    assert re.search(r"^words of 5 letters: \d+% right$", out, re.MULTILINE)
    assert re.findall(r"^(\w+)\t", out, re.MULTILINE) == ["abc", "fed"]


def test_transformer(example):
    out = example("transformer.py", "--steps", "2", "nine hundred")
    assert re.search(r"^step 2: loss \d", out, re.MULTILINE)
    assert re.search(r"^held-out numbers: [\d.]+% wrong$", out, re.MULTILINE)
    assert out.splitlines()[2].startswith("nine hundred\t")


def test_pretrained(example):
    out = example("pretrained.py", "--pretrain", "2", "--steps", "2", "aye lass")
    assert re.findall(r"^step (\d): loss \d", out, re.MULTILINE) == ["2", "2", "4"]
    reading = re.findall(r"^2 labels, (\d) steps of reading: [\d.]+% right$", out, re.MULTILINE)
    assert reading == ["0", "2"]
    assert re.search(r"^(north|south)\taye lass$", out, re.MULTILINE)


def test_attention(example):
    out = example("attention.py", "--steps", "3")
    (first, last), (other_first, other_last) = re.findall(r"loss (\S+) -> (\S+)", out)
    assert float(other_first) == pytest.approx(float(first), abs=1e-5)
    assert float(other_last) == pytest.approx(float(last), abs=1e-5)
    assert "seqkern::attention" in out
