"""CoNLL-U: what is read, and what is refused with its line."""

import gzip

import pytest

from seqkern.tasks.conllu import Sentence, read_conllu


def word(number: object, form="w", head: object = 0, deprel="root", upos="X"):
    return "\t".join([str(number), form, "_", upos, "_", "_", str(head), deprel, "_", "_"])


def token(name, form="w"):
    return "\t".join([name, form, *"________"])


GOOD = [
    "# text = du bois",
    token("0.1"),
    token("1-2", "du"),
    word(1, "de", 3, "case", "ADP"),
    word(2, "le", 3, "det", "DET"),
    word(3, "bois", 0, "root", "NOUN"),
    token("3.1"),
    token("3.2"),
    "",
    word(1, "à part", 0, "root", "ADV"),
]


def write(path, lines):
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_words_heads_and_relations(tmp_path):
    """Shared tokens and empty nodes are no words; a form may hold a space; no last empty line."""
    expected = [
        Sentence(("de", "le", "bois"), ("ADP", "DET", "NOUN"), (3, 3, 0), ("case", "det", "root")),
        Sentence(("à part",), ("ADV",), (0,), ("root",)),
    ]
    assert read_conllu(write(tmp_path / "a.conllu", GOOD)) == expected
    packed = tmp_path / "a.conllu.gz"
    packed.write_bytes(gzip.compress(("\ufeff" + "\r\n".join(GOOD)).encode()))
    assert read_conllu(packed) == expected


@pytest.mark.parametrize(
    ("line", "lines", "expected"),
    [
        (2, ["# c", "1\tw\t_"], "10 columns with tabs, not 3"),
        (1, [word("x")], "the word with the ID 1"),
        (1, [word(2)], "the word with the ID 1"),
        (2, [word(1), word(3, head=1)], "the word with the ID 2"),
        (1, [word("01")], "the word with the ID 1"),
        (1, [word(1, head="_")], "a HEAD that is 0 or the number of a word"),
        (1, [word(1, head="-1")], "a HEAD that is 0 or the number of a word"),
        (2, [word(1), word(2, head=3)], r"a HEAD in 0 \.\. 2"),
        (1, [word(1, form="")], "FORM, UPOS and DEPREL that are not empty"),
        (1, [word(1, head=2), word(2, head=1)], "a sentence with a HEAD of 0"),
        (3, [word(1, head=2), word(2), word(3)], "one HEAD of 0"),
        (2, [word(1), word(2, head=2)], "heads without a cycle"),
        (4, [word(1), word(2, head=4), word(3, head=4), word(4, head=3)], "without a cycle"),
        (1, [token("2-3"), word(1)], "a token of words from 1 on"),
        (1, [token("1-1"), word(1)], "a token of words from 1 on"),
        (2, [token("1-2"), token("1-2"), word(1), word(2, head=1)], "a token of words from 1"),
        (1, [token("1-3"), word(1), word(2, head=1)], "a token that ends with word 2"),
        (1, [token("1.1"), word(1)], "an empty node after word 0"),
        (1, [token("0.1"), ""], "a sentence with a word"),
        (1, [token("0.1")], "a sentence with a word"),
    ],
)
def test_malformed_lines_are_named(tmp_path, line, lines, expected):
    """Whatever stands before: two good sentences do not shift the number or the words."""
    path = write(tmp_path / "bad.conllu", [*GOOD, "", *lines])
    with pytest.raises(ValueError, match=rf"bad\.conllu:{len(GOOD) + 1 + line}: .*{expected}"):
        read_conllu(path)


def test_a_file_without_a_sentence_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"none\.conllu: holds no sentence"):
        read_conllu(write(tmp_path / "none.conllu", ["# only this", "", ""]))


def test_the_treebanks_are_read_whole(corpora):
    """As many words as the treebank's own statistics count; every tree is one."""
    for name, sentences, words in (("ud_english_ewt", 2001, 25147), ("ud_english_atis", 572, None)):
        (path,) = corpora.glob(f"**/{name}/dev.conllu.gz")
        read = read_conllu(path)
        assert len(read) == sentences
        assert words is None or sum(len(sentence.words) for sentence in read) == words
