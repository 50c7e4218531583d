"""Readers of labelled and tagged sentences, what they refuse, and splits."""

import json

import pytest

from seqkern.tasks.iob import TaggedSentence, read_columns, read_triples
from seqkern.tasks.labelled import (
    Labelled,
    carve_dev,
    read_clinc150,
    read_csv,
    read_labelled,
    read_side,
    read_trec,
    split,
    words_of,
)
from tests.label_files import triples, write

# --- words and lines


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("It isn't the dog's life!", ("it", "is", "n't", "the", "dog", "'s", "life", "!")),
        ("you've can't 2/7", ("you", "'ve", "ca", "n't", "2", "/", "7")),
        ("  naïve\tfilm ... ", ("naïve", "film", ".", ".", ".")),
        ("snow_day 'quoted'", ("snow_day", "'quoted", "'")),
        (" \n", ()),
    ],
)
def test_clean_words(text, words):
    assert words_of(text) == words


def test_tokenised_words_stand_as_they_are():
    assert words_of(" Add 2/7 isn't ", "spaces") == ("Add", "2/7", "isn't")
    with pytest.raises(ValueError, match=r"words must be one of .* got 'letters'"):
        words_of("a", "letters")


def test_labelled_lines(tmp_path):
    path = write(tmp_path / "a.tsv.gz", "good\tA fine film.\n\n bad \tDull\n")
    assert read_labelled(path) == [
        Labelled(("a", "fine", "film", "."), "good"),
        Labelled(("dull",), "bad"),
    ]
    assert read_labelled(path, "spaces")[0].words == ("A", "fine", "film.")


def test_trec_lines(tmp_path):
    path = write(tmp_path / "t", "HUM:ind Who was Josè ?\nNUM:date When ?\n", "latin-1")
    assert read_trec(path) == [
        Labelled(("who", "was", "josè", "?"), "HUM"),
        Labelled(("when", "?"), "NUM"),
    ]
    assert [e.label for e in read_trec(path, "fine")] == ["HUM:ind", "NUM:date"]
    with pytest.raises(ValueError, match="labels must be 'coarse' or 'fine', got 'all'"):
        read_trec(path, "all")


def test_csv_rows(tmp_path):
    path = write(tmp_path / "b.csv", 'text,category\n"Well, no",lost\n"Two\nlines ""so""",pin\n')
    assert read_csv(path) == [
        Labelled(("well", ",", "no"), "lost"),
        Labelled(("two", "lines", '"', "so", '"'), "pin"),
    ]


def test_clinc150_json(tmp_path):
    content = {
        "train": [["Hi there", "greet"]],
        "val": [["Bye", "leave"]],
        "test": [["Oh", "greet"]],
    }
    content |= {f"oos_{part}": [["What", "oos"]] for part in content}
    path = write(tmp_path / "c.json", json.dumps(content))
    parts = read_clinc150(path)
    assert parts == ([(("hi", "there"), "greet")], [(("bye",), "leave")], [(("oh",), "greet")])
    assert [len(part) for part in read_clinc150(path, out_of_scope=True)] == [2, 2, 2]
    with pytest.raises(
        ValueError, match=r"c.json: train\[1\]: expected \[text, intent\], got \['a'"
    ):
        read_clinc150(write(path, json.dumps({**content, "train": [["a", "b"], ["a", " "]]})))
    with pytest.raises(ValueError, match=r"c.json: expected an object with a list 'val'"):
        read_clinc150(write(path, json.dumps({"train": []})))
    with pytest.raises(ValueError, match=r"c.json:2: not JSON"):
        read_clinc150(write(path, "{\n]"))


CONLL = "-DOCSTART- -X- O\n\nJapan NNP B-loc\nwins VB O\n\n\nGo VB O\n"


def test_columns(tmp_path):
    path = write(tmp_path / "x.conll", CONLL)
    assert read_columns(path) == [
        TaggedSentence(("Japan", "wins"), ("B-loc", "O")),
        TaggedSentence(("Go",), ("O",)),
    ]


def of_phrases(path):
    return read_columns(path, phrases=True)


def test_tags_of_phrases(tmp_path):
    tags = ("O", "B-x-y", "I-x", "S-loc", "E-1", "B", "I", "E", "S")
    path = write(tmp_path / "x.iob", "".join(f"w {tag}\n" for tag in tags))
    assert of_phrases(path) == [TaggedSentence(("w",) * len(tags), tags)]
    path = write(tmp_path / "x.iob", "w NOUN\n")
    assert read_columns(path) == [TaggedSentence(("w",), ("NOUN",))]


def test_triples(tmp_path):
    folder = triples(tmp_path, "valid", ("play jazz", "O B-genre", "Play"), ("hi", "O", "Greet"))
    assert read_triples(folder, "valid") == [
        TaggedSentence(("play", "jazz"), ("O", "B-genre"), "Play"),
        TaggedSentence(("hi",), ("O",), "Greet"),
    ]


@pytest.mark.parametrize(
    ("read", "content", "message"),
    [
        (
            read_labelled,
            "a\tb\nc d\n",
            r"f:2: expected label<TAB>text, two non-empty fields, got 'c",
        ),
        (read_labelled, "a\tb\n\tc\n", "f:2: expected label<TAB>text"),
        (read_labelled, "a\tb\tc\n", "f:1: expected label<TAB>text"),
        (read_labelled, "\n", "f: holds no labelled sentence"),
        (read_trec, "HUM:ind Who ?\nHUM Who ?\n", "f:2: expected COARSE:fine and a question"),
        (lambda path: read_side(path, "x"), "one\n \n", "f:2: expected a sentence, got ' '"),
        (read_csv, "text,category\na,b\nc\n", "f:3: expected text,label, two fields, got 'c'"),
        (read_csv, 'text,category\n"a\n', r"f:\d: not CSV"),
        (read_csv, "text,category\n", "f: holds no row"),
        (read_columns, "a O\nb\n", "f:2: expected 2 columns with the tag last, got 'b'"),
        (read_columns, "a X O\nb O\n", "f:2: expected 3 columns"),
        (read_columns, "a\n", "f:1: expected at least 2 columns"),
        (of_phrases, "a O\nb PER\n", "f:2: expected a tag of phrases last, .* got 'b PER'"),
        (of_phrases, "a B-x\nb I-\n", "f:2: expected a tag of phrases last"),
        (of_phrases, "a B_loc\n", "f:1: expected a tag of phrases last"),
        (of_phrases, "a o\n", "f:1: expected a tag of phrases last"),
        (read_columns, "\n", "f: holds no sentence"),
    ],
)
def test_malformed_lines_are_named(tmp_path, read, content, message):
    with pytest.raises(ValueError, match=message):
        read(write(tmp_path / "f", content))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("a b", "O", "L"), r"p.seq.out.gz:2: expected 2 tags, not 1"),
        (("", "", "L"), r"p.seq.in.gz:2: expected a sentence"),
        (("a", "O", "L M"), r"p.label.gz:2: expected one label"),
    ],
)
def test_malformed_triples_are_named(tmp_path, row, message):
    folder = triples(tmp_path, "p", ("hi", "O", "Greet"), row)
    with pytest.raises(ValueError, match=message):
        read_triples(folder, "p")


def test_triples_of_unlike_length_are_named(tmp_path):
    folder = triples(tmp_path, "p", ("hi", "O", "Greet"), ("ho", "O", "Greet"))
    write(folder / "p.seq.out.gz", "O\n")
    with pytest.raises(ValueError, match=r"p.seq.out.gz:2: expected as many lines"):
        read_triples(folder, "p")
    with pytest.raises(ValueError, match=r"holds no q.seq.in, nor one that ends in .gz"):
        read_triples(folder, "q")


# --- splits


def test_a_split_has_no_sentence_twice():
    examples = [Labelled((str(i % 50), "x"), str(i)) for i in range(100)]
    parts = split(examples, 1)
    assert [len(part) for part in parts] == [80, 10, 10]
    assert sorted(e.label for part in parts for e in part) == sorted(e.label for e in examples)
    contents = [{e.words for e in part} for part in parts]
    assert not contents[0] & contents[1]
    assert not contents[0] & contents[2]
    assert not contents[1] & contents[2]
    assert split(examples, 1) == parts
    assert split(examples, 2) != parts
    with pytest.raises(ValueError, match="more different examples than 2"):
        split(examples[:2], 1)
    with pytest.raises(ValueError, match=r"shares that sum below 1, got 0.5 and 0.5"):
        split(examples, 1, 0.5, 0.5)


def test_a_dev_part_is_carved_from_train_alone():
    train = [Labelled((str(i),), "a") for i in range(100)]
    test = [Labelled(("0",), "b")]
    parts = carve_dev(train, test, 1)
    assert [len(part) for part in parts] == [90, 10, 1]
    assert sorted(parts.train + parts.dev) == sorted(train)
