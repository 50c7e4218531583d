"""Translation jobs: every model learns and has equal losses on both layers; what is decoded."""

import math
import random
from itertools import pairwise

import pytest
import torch

from seqkern.tasks import translation
from seqkern.tasks.data import Pair, read_parallel
from seqkern.tasks.job import JobSpec, Parts
from seqkern.tasks.lines import blank
from seqkern.tasks.metrics import bleu, bleu_signature, perplexity
from seqkern.tasks.options import TrainOptions
from seqkern.tasks.registry import make_job
from seqkern.tasks.sides import Side
from seqkern.tasks.subwords import Subwords
from seqkern.tasks.training import Trainer, restore_job
from seqkern.tasks.vocab import EOS, UNKNOWN
from seqkern.testing.tolerance import assert_within_budget, neighbours, relative_error

SIZES = {
    "seq2seq": {"cell": "lstm", "embedding": 16, "hidden": 48, "depth": 1},
    "gru": {"cell": "gru", "embedding": 16, "hidden": 48, "depth": 1, "context": True},
    "transformer": {
        "width": 32,
        "heads": 4,
        "ffn": 64,
        "depth": 1,
        "dropout": 0.0,
        "norm_first": True,
    },
    "rnnsearch": {"embedding": 16, "hidden": 32, "attention": 16, "maxout": 16},
}


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """Words over five letters, and their letters in capitals, backwards."""
    draw = random.Random(0)
    words = sorted({"".join(draw.choices("abcde", k=draw.randint(1, 5))) for _ in range(1500)})
    path = tmp_path_factory.mktemp("data") / "words.tsv"
    path.write_text("".join(f"{word}\t{' '.join(word[::-1].upper())}\n" for word in words))
    return str(path)


def job_of(name, data, layers="seqkern", **reading):
    model = "seq2seq" if name == "gru" else name
    return make_job(JobSpec(model, "pairs", data, layers, 1, SIZES[name], reading))


@pytest.mark.parametrize("name", ["seq2seq", "gru", "transformer"])
def test_equal_losses_on_both_layers(words, name):
    """Fifty steps in float32: the two runs differ by what rounding grows to."""
    options = TrainOptions(steps=50, batch_size=32, lr=3e-3, warmup=10)
    runs = []
    for layers in ("torch", "seqkern"):
        trainer = Trainer(job_of(name, words, layers), options)
        runs.append([loss for loss, _ in trainer.train(50)])
    assert runs[0] == pytest.approx(runs[1], rel=1e-4)
    assert runs[0][:5] == pytest.approx(runs[1][:5], rel=1e-5)
    assert runs[0][-1] < 0.8 * runs[0][0]


@pytest.mark.parametrize("name", SIZES)
def test_losses_in_bfloat16(words, name):
    """As near to those of float64 as PyTorch's layers in bfloat16 come, and not float32's."""

    def losses(layers, precision="bfloat16", dtype=torch.float32):
        job = job_of(name, words, layers)
        job.model.to(dtype)
        options = TrainOptions(steps=8, batch_size=16, lr=3e-3, warmup=4, precision=precision)
        return torch.tensor([loss for loss, _ in Trainer(job, options).train(8)], dtype=dtype)

    exact = {"losses": losses("torch", "float32", torch.float64)}
    runs = [{"losses": losses("torch").bfloat16()}]
    ours = losses("seqkern")
    assert_within_budget({"losses": ours.bfloat16()}, exact, runs, torch.bfloat16)
    single = losses("seqkern", "float32")
    assert relative_error(ours, exact["losses"]) > 10 * relative_error(single, exact["losses"])


@pytest.mark.parametrize("name", SIZES)
def test_reversal_is_learned(words, name):
    job = job_of(name, words)
    lr = 8e-3 if name == "transformer" else 1e-2
    trainer = Trainer(job, TrainOptions(steps=350, batch_size=64, lr=lr, warmup=20))
    for _ in trainer.train(350):
        pass
    scores = job.evaluate("test", beam=3)
    assert scores["sequence_error"] <= 0.1, scores
    assert job.predict(["abcde"]) == ["E D C B A"]
    if name in ("transformer", "rnnsearch"):
        alignment = job.align("abcde")
        assert alignment.target == tuple("EDCBA")
        assert alignment.weights.shape == (6, 5)
        if name == "rnnsearch":  # the anti-diagonal
            read = alignment.weights[:5].argmax(1)
            assert (read - torch.arange(4, -1, -1)).abs().sum() <= 1
    else:
        with pytest.raises(ValueError, match="has no alignments"):
            job.align("abcde")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["transformer", "rnnsearch"])
def test_alignments_on_a_gpu_are_those_of_the_cpu(words, name):
    job = job_of(name, words, longest=8)
    state = job.model.state_dict()

    def aligned(device, dtype, tensors):
        job.model.to(device, dtype).load_state_dict(dict(zip(state, tensors, strict=True)))
        return job.align("abcde")

    start = [t.clone() for t in state.values()]
    exact = {"weights": aligned("cpu", torch.float64, start).weights}
    runs = [aligned("cpu", torch.float32, moved) for moved in neighbours(start)]
    found = aligned("cuda", torch.float32, start)
    assert (found.source, found.target) == (runs[0].source, runs[0].target)
    weights = [{"weights": run.weights} for run in runs]
    assert_within_budget({"weights": found.weights}, exact, weights, torch.float32)


def test_a_reversed_source_is_another_reading(words):
    job, reverse = (job_of("seq2seq", words, reverse=r) for r in (False, True))
    pair = job.data.train[17]
    x, y = job.collate([pair]).x, reverse.collate([pair]).x
    assert torch.equal(x, y.flip(1))
    with pytest.raises(ValueError, match=r"symbols \['\?', '!'\] are not"):
        job.predict(["a?b!"])
    with pytest.raises(ValueError, match=r"symbols \['!', '\?'\] are not"):
        reverse.predict(["a?b!"])


def test_held_out_sources_may_have_new_characters(words):
    """What a user asks is refused; what a score is taken of is decoded, the character unknown."""
    job = job_of("rnnsearch", words)
    job.data.dev.append(Pair("a?", "X"))
    assert 0 <= job.evaluate("dev")["sequence_error"] <= 1
    with pytest.raises(ValueError, match="are not in the training data"):
        job.predict(["a?"])


def test_words_named_as_special_ones_end_no_sentence(tmp_path):
    path = tmp_path / "pairs.tsv"
    path.write_text("".join(f"<pad> q{i}\tX </s> Y\n" for i in range(40)))
    job = job_of("rnnsearch", path, source_tokens="words")
    batch = job.collate([Pair("<pad> q", "X </s> Y")])
    assert batch.x.tolist() == [[UNKNOWN, UNKNOWN]]
    x, y = job.vocabs["target"].symbols.index("X"), job.vocabs["target"].symbols.index("Y")
    assert batch.y.tolist() == [[x, UNKNOWN, y, EOS]]
    assert job.target.decode(batch.y[0].tolist()) == "X <unk> Y"


def test_smoothing_is_of_training_alone(words):
    plain, smooth = (job_of("transformer", words, smoothing=s) for s in (0.0, 0.1))
    batch = plain.collate(plain.data.train[:8])
    for job in (plain, smooth):
        job.model.eval()
    assert torch.equal(plain.loss(batch), smooth.loss(batch))
    log_p = plain.model(batch.x, batch.lengths, batch.y_previous).log_softmax(-1)
    smooth.model.train()
    real = batch.y != 0
    right = -log_p.gather(-1, batch.y.unsqueeze(-1)).squeeze(-1)[real].mean()
    expected = 0.9 * right - 0.1 * log_p[real].mean()
    torch.testing.assert_close(smooth.loss(batch), expected)


def test_long_pairs_are_cut_in_training(words):
    job = job_of("seq2seq", words, longest=3)
    batch = job.collate(job.data.train[-4:])
    assert batch.x.shape[1] == 3
    assert batch.y.shape[1] == 4
    assert torch.all(batch.y[:, -1] == EOS)


def test_a_long_source_may_have_a_long_target(words):
    """A model that never ends writes as many symbols as it may, beside whichever sources."""
    job = job_of("seq2seq", words)
    job.model.output.bias.data[EOS] = -1e9
    sources = ["a" * n for n in (5, 32, 33, 64, 65)]
    targets = job.decode(sources, beam=2)
    assert [len(target.split()) for target in targets] == [64, 64, 128, 128, 256]
    assert [job.decode([source], beam=2) for source in sources] == [[target] for target in targets]
    assert len(job.predict(["a" * 33], beam=2)[0].split()) == 128
    cut = job_of("seq2seq", words, longest=3)
    cut.model.output.bias.data[EOS] = -1e9
    assert [len(target.split()) for target in cut.decode(sources)] == [3] * 5


def test_subwords():
    texts = ["a low lower lowest", "new newer newest", "wide wider widest"] * 20
    subwords = Subwords.build(texts, 40)
    side = Side("subwords", subwords)
    known = side.encode("newest wide")
    assert UNKNOWN not in known
    assert side.decode([*known, EOS, 7]) == "newest wide"
    assert "".join(side.symbols(known)).replace("\u2581", " ").strip() == "newest wide"
    again = Subwords(subwords.state()["model"])
    assert again.encode_text("lowest") == subwords.encode_text("lowest")
    with pytest.raises(ValueError, match="cannot make 4000 subwords"):
        Subwords.build(["a b"], 4000)


def test_parallel_files_in_subwords(tmp_path):
    source, target = tmp_path / "x.en", tmp_path / "x.up"
    lines = [f"{a} {b} {c}" for a in ("red", "green") for b in ("cat", "dog") for c in "xyzw"]
    source.write_text("\n".join(lines) + "\n")
    target.write_text("\n".join(line.upper() for line in lines) + "\n")
    spec = JobSpec(
        "transformer",
        "parallel",
        f"{source},{target}",
        sizes=SIZES["transformer"],
        reading={"symbols": 30},
    )
    job = make_job(spec)
    assert (job.score, job.higher) == ("bleu", True)
    trainer = Trainer(job, TrainOptions(steps=3, batch_size=4))
    assert len(list(trainer.train(3))) == 3
    again = restore_job(trainer.content())
    assert again.predict(["red cat x"]) == job.predict(["red cat x"])
    assert set(job.evaluate("dev")) == {"loss", "perplexity", "bleu"}
    with pytest.raises(ValueError, match="needs data SOURCE,TARGET"):
        make_job(JobSpec("transformer", "parallel", str(source)))


def test_one_vocabulary_for_both_sides(tmp_path):
    """What shares its embeddings shares its numbers."""
    path = tmp_path / "pairs.tsv"
    path.write_text("".join(f"{a}{b}\t{b} {a} !\n" for a in "abcd" for b in "xyz"))
    sizes = SIZES["transformer"] | {"shared": True}
    reading = {"source_tokens": "chars", "target_tokens": "chars"}
    job = make_job(JobSpec("transformer", "pairs", str(path), sizes=sizes, reading=reading))
    assert job.vocabs["source"] is job.vocabs["target"]
    assert job.vocabs["source"].symbols[4:] == tuple(" !abcdxyz")
    assert job.model.embed_x.weight is job.model.embed_y.weight
    with pytest.raises(ValueError, match="target_tokens, got 'chars' and 'words'"):
        make_job(JobSpec("transformer", "pairs", str(path), sizes=sizes))


def test_lower_case_is_of_every_corpus_and_call(monkeypatch):
    parts = Parts(*([Pair("Ab", "x"), Pair("aB", "y")] for _ in Parts._fields))
    monkeypatch.setitem(translation.CORPORA, "multi30k-de-en", lambda root: parts)
    reading = {"lower": True, "source_tokens": "chars"}
    spec = JobSpec("rnnsearch", "multi30k-de-en", sizes=SIZES["rnnsearch"], reading=reading)
    job = make_job(spec)
    assert [pair.source for part in job.data for pair in part] == ["ab"] * 6
    assert job.align("AB").source == ("a", "b")
    assert job.predict(["AB"]) == job.predict(["ab"])


def test_a_pair_without_symbols_is_found_before_the_training(tmp_path):
    """A sign of no width is no text; what only a vocabulary finds empty is named."""
    path = tmp_path / "pairs.tsv"
    lines = [f"{a}{b}\t{b}{a}\n" for a in "abcd" for b in "xyz"]
    path.write_text("".join(lines) + "ab\t\u200b\n")
    with pytest.raises(ValueError, match=r"pairs\.tsv:13: expected source<TAB>target"):
        job_of("seq2seq", str(path))
    left, right = tmp_path / "left", tmp_path / "right"
    left.write_text("a\n\u200b\n\u200b\n")
    right.write_text("b\n\ufeff\nc\n")
    with pytest.raises(ValueError, match=r"left:3: expected a line for the other side's"):
        read_parallel(left, right)
    path.write_text("".join(lines))
    job = job_of("seq2seq", str(path))
    job.data.dev.append(Pair("  ", "x"))
    with pytest.raises(ValueError, match=r"the source of \('  ', 'x'\) holds no symbol"):
        Trainer(job, TrainOptions(steps=1))


def test_bleu():
    found = ["the cat sat on the mat", "a dog barked loudly today"]
    assert bleu(found, [[text] for text in found], "none") == pytest.approx(100.0)
    two = bleu(found, [["no cat here at all", found[0]], [found[1]]], "13a")
    assert two == pytest.approx(100.0)
    # 4-grams: of 3 + 2 in the texts all but those with "mat": precisions 10/11, 8/9, 6/7, 4/5
    near = [["the cat sat on the rug"], [found[1]]]
    expected = 100 * (10 / 11 * 8 / 9 * 6 / 7 * 4 / 5) ** 0.25
    assert bleu(found, near, "none") == pytest.approx(expected)
    assert "tok:zh" in bleu_signature("zh")
    with pytest.raises(ValueError, match="N >= 1"):
        bleu([], [], "13a")
    with pytest.raises(ValueError, match=r"bleu must be a tokenisation of sacrebleu, .*'14b'"):
        bleu_signature("14b")


def test_what_shows_nothing():
    for text in ("", " \t", "\u200b", "\ufeff \u00ad", "\x00"):
        assert blank(text)
    for text in ("a", "\u3042", "\ue001", "\U0001fae8", "\u200ba"):  # of later Unicodes too
        assert not blank(text)


def test_perplexity_of_a_diverged_model():
    assert perplexity(2.0) == math.exp(2.0)
    assert perplexity(709.0) < math.inf
    assert perplexity(1e4) == math.inf


def test_bleu_by_length(tmp_path):
    """Three groups of sources of 4 to 12 letters, right up to 8 and cut short beyond."""
    draw, path = random.Random(0), tmp_path / "long.tsv"
    sources = {"".join(draw.choices("abcdef", k=draw.randint(4, 12))) for _ in range(400)}
    path.write_text("".join(f"{s}\t{' '.join(s)}\n" for s in sorted(sources)))
    job = job_of("rnnsearch", str(path), bleu="none")
    job.decode = lambda texts, beam: [" ".join(s if len(s) <= 8 else s[:6]) for s in texts]
    groups = job.bleu_by_length("test", groups=3)
    lengths = sorted(len(pair.source) for pair in job.data.test)
    assert sum(group.sources for group in groups) == len(lengths)
    for before, after in pairwise(groups):
        assert before.longest < after.shortest
    for group in groups:
        span = range(group.shortest, group.longest + 1)
        texts = [p.source for p in job.data.test if len(p.source) in span]
        right = [[" ".join(s)] for s in texts]
        assert group.sources == len(texts)
        assert group.bleu == pytest.approx(bleu(job.decode(texts, 4), right, "none"))
    assert groups[0].bleu == pytest.approx(100)
    assert groups[-1].bleu < 70
    assert len(job.bleu_by_length("test", groups=50)) == len(set(lengths))
    with pytest.raises(ValueError, match="groups must be at least 1, got 0"):
        job.bleu_by_length("test", groups=0)
    with pytest.raises(ValueError, match="no BLEU by length: its score is the error rate"):
        job_of("rnnsearch", str(path)).bleu_by_length("test")


def test_multi30k(corpora):
    job = make_job(
        JobSpec("seq2seq", "multi30k-de-en", str(corpora), sizes={"embedding": 8, "hidden": 8})
    )
    assert [len(part) for part in job.data] == [29000, 1014, 1000]
    assert job.data.train[0].target.startswith("two young , white males")
    batch = job.batches(128, 1)[0]
    assert torch.isfinite(job.loss(batch))
    assert "tok:none" in job.scorer()


def test_tatoeba(corpora):
    sizes = {"width": 16, "heads": 2, "ffn": 16, "depth": 1}
    job = make_job(JobSpec("transformer", "tatoeba-en-zh", str(corpora), sizes=sizes))
    assert [len(part) for part in job.data] == [27154, 1000, 1001]
    assert len(job.vocabs["source"]) == len(job.vocabs["target"]) == 4000
    assert job.target.decode(job.target.encode("你好。")) == "你好。"
