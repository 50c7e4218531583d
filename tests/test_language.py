"""Language modelling as a job: reading, windows, scores of whole texts, samples, toy tasks."""

import gzip
import itertools
import math
import random
from collections import Counter

import pytest
import torch
from torch.nn import functional as F

from seqkern.tasks import checkpoint
from seqkern.tasks.job import JobSpec
from seqkern.tasks.language import Windows, read_text, split_text
from seqkern.tasks.options import TrainOptions
from seqkern.tasks.registry import make_job
from seqkern.tasks.training import Trainer
from seqkern.tasks.vocab import BOS, EOS

PATTERN = "abcab bca."
SMALL = {
    "rnnlm": {"embedding": 8, "hidden": 32, "depth": 1},
    "nnlm": {"features": 8, "hidden": 32},
    "transformer-lm": {"width": 32, "heads": 2, "depth": 2, "context": 24},
    "hyperlstm": {"embedding": 8, "hidden": 24, "hyper": 8, "z": 4},
}
EVERY = pytest.mark.parametrize("model", SMALL)


@pytest.fixture
def pattern(tmp_path):
    path = tmp_path / "pattern.txt"
    path.write_text((PATTERN + "\n") * 300)
    return path


def job_of(model, path, sizes=None, **reading):
    spec = JobSpec(model, "text", str(path), sizes=sizes or SMALL[model], reading=reading)
    return make_job(spec)


def trained(job, steps, **options):
    trainer = Trainer(
        job, TrainOptions(**{"steps": steps, "batch_size": 8, "warmup": 10} | options)
    )
    return trainer, [loss for loss, _ in trainer.train(steps)]


# ---- reading ------------------------------------------------------------------------------


def test_a_text_by_characters_and_by_words(tmp_path):
    path = tmp_path / "text.txt.gz"
    path.write_bytes(gzip.compress("a bé\n\n c  <unk>".encode()))
    assert read_text(path, "chars") == [*"a bé\n\n c  <unk>\n"]
    assert read_text(path, "words") == ["a", "bé", "</s>", "c", "<unk>", "</s>"]


@pytest.mark.parametrize(
    ("content", "tokens", "message"),
    [
        (b"ok\na </s> b\n", "words", r"text.txt:2: the words \['</s>'\] are reserved"),
        (b"ok\n\xff\n", "chars", "text.txt:2: not UTF-8"),
        (b"", "chars", "holds no text"),
        (b" \n \n", "words", "holds no text"),
        (b"ok", "bytes", "tokens must be one of .* got 'bytes'"),
    ],
)
def test_bad_texts_are_refused(tmp_path, content, tokens, message):
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_text(path, tokens)


def test_a_file_is_split_and_a_folder_has_its_parts(tmp_path):
    parts = split_text(list("abcdefghij"))
    assert parts == (list("abcdefghi"), ["j"], [])
    with pytest.raises(ValueError, match="at least 2 symbols, got 1"):
        split_text(["a"])
    for name, words in (("train", "x y x"), ("valid", "y z"), ("test", "x")):
        (tmp_path / f"{name}.txt").write_text(words)
    job = job_of("nnlm", tmp_path, tokens="words")
    assert job.data == (["x", "y", "x", "</s>"], ["y", "z", "</s>"], ["x", "</s>"])
    assert job._numbers(job.data.dev).tolist() == [BOS, 5, 3, EOS]  # z is unknown
    (tmp_path / "valid.txt").unlink()
    with pytest.raises(ValueError, match=r"holds no valid\.txt or dev\.txt"):
        job_of("nnlm", tmp_path)
    with pytest.raises(ValueError, match="text file or a folder of them, got 'nowhere'"):
        job_of("nnlm", "nowhere")


def test_rare_words_are_unknown(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("a a b c c c\n" + "a c\n" * 10)
    job = job_of("nnlm", path, tokens="words", min_count=2)
    assert job.vocab.symbols[4:] == ("a", "c")
    assert job_of("nnlm", path, tokens="words", most=1).vocab.symbols[4:] in [("a",), ("c",)]


# ---- windows ------------------------------------------------------------------------------


def test_windows_that_follow_each_other():
    """Each row reads its stream on; together an epoch is the text, each symbol a target once."""
    text = torch.arange(48)
    windows = Windows(text, batch_size=3, window=4, seed=1, follow=True)
    assert windows.per_epoch == 4
    epoch = [windows[step] for step in range(4)]
    assert torch.equal(torch.cat([batch.x for batch in epoch], 1), text[:45].view(3, 15))
    assert all(torch.equal(batch.y, batch.x + 1) for batch in epoch)
    assert [batch.at for batch in epoch] == [0, 1, 2, 3]
    assert [batch.units for batch in epoch] == [12, 12, 12, 9]
    assert torch.equal(windows[4].x, windows[0].x)


def test_shares_of_windows_read_streams_of_their_own():
    """Three shares of two streams are the six streams of one reader, whichever comes in turn."""
    text = torch.arange(80)
    whole = Windows(text, batch_size=6, window=4, seed=1, follow=True)
    shares = Windows(text, batch_size=2, window=4, seed=1, follow=True, shares=3)
    assert shares.per_epoch == 3 * whole.per_epoch
    for step in range(2 * whole.per_epoch):
        parts = [shares[3 * step + n] for n in range(3)]
        assert torch.equal(torch.cat([part.x for part in parts]), whole[step].x)
        assert {part.at for part in parts} == {whole[step].at}
    with pytest.raises(ValueError, match="a text of at least 9 symbols, got 3, 4 and 8 symbols"):
        Windows(torch.arange(9), 3, 4, 1, follow=True, shares=3)


def test_windows_at_random_depend_on_seed_and_step():
    windows = [Windows(torch.arange(40), 5, 8, seed, follow=False) for seed in (1, 1, 2)]
    assert torch.equal(windows[0][7].x, windows[1][7].x)
    assert not torch.equal(windows[0][7].x, windows[0][8].x)
    assert not torch.equal(windows[0][7].x, windows[2][7].x)
    starts = {int(n) for step in range(99) for n in windows[0][step].x[:, 0]}
    assert starts == set(range(32))
    assert torch.equal(windows[0][3].y, windows[0][3].x + 1)


@pytest.mark.parametrize(("batch_size", "window"), [(0, 4), (4, 0), (9, 4)])
def test_impossible_windows_are_refused(batch_size, window):
    with pytest.raises(ValueError, match=f"got {batch_size}, {window} and 8 symbols"):
        Windows(torch.arange(9), batch_size, window, 1, follow=True)


def test_a_window_beyond_the_context_is_refused(pattern):
    with pytest.raises(ValueError, match="at most the model's context, 24, got 64"):
        job_of("transformer-lm", pattern).batches(4, 1)


# ---- the loss and the state ---------------------------------------------------------------


@pytest.mark.parametrize("model", ["rnnlm", "nnlm", "hyperlstm"])
def test_the_state_is_carried_from_window_to_window(pattern, model):
    """Losses of windows in order are those of the streams read as one; an epoch starts afresh."""
    job = job_of(model, pattern, window=7)
    job.model.double().eval()
    windows = job.batches(4, 1)
    losses = [job.loss(windows[step]) * windows[step].units for step in range(5)]
    x = torch.cat([windows[step].x for step in range(5)], 1)
    y = torch.cat([windows[step].y for step in range(5)], 1)
    scores, _ = job.model(x)
    # The loss is computed in float32.
    expected = F.cross_entropy(scores.flatten(0, 1), y.flatten(), reduction="sum")
    assert sum(losses).item() == pytest.approx(expected.item(), rel=1e-6)
    first = job.loss(windows[0])
    assert job.loss(windows[windows.per_epoch]).item() == first.item()
    # A window that does not follow the one before knows nothing of it.
    other = job.loss(windows[3]).item()
    job.carry(job_of(model, pattern, window=7).carried())
    assert job.loss(windows[3]).item() == other


@EVERY
def test_an_interrupted_training_has_the_same_losses(pattern, tmp_path, model):
    options = {"steps": 6, "batch_size": 4, "warmup": 1}
    _, whole = trained(job_of(model, pattern, window=16), **options)
    trainer = Trainer(job_of(model, pattern, window=16), TrainOptions(**options))
    first = [loss for loss, _ in trainer.train(3)]
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, trainer.content())
    rest = [loss for loss, _ in Trainer.resume(path).train(3)]
    assert first + rest == whole


# ---- scores -------------------------------------------------------------------------------


@EVERY
def test_every_symbol_of_the_text_is_scored_once(pattern, model, monkeypatch):
    """Against p(w_t | all before) of one call; a model without state, of calls for each window."""
    job = job_of(model, pattern)
    job.model.double()
    text = job._numbers(job.part("dev"))
    limit = job.context or text.numel()
    total = 0.0
    for start in range(0, text.numel() - 1, limit):
        x = text[start : start + limit + 1]
        scores, _ = job.model(x[None, :-1])
        total -= scores[0].log_softmax(-1).gather(1, x[1:, None]).sum().item()
    nats = total / (text.numel() - 1)
    monkeypatch.setattr("seqkern.tasks.language.PIECE", 37)
    scores = job.evaluate("dev")
    assert scores["nats"] == pytest.approx(nats, rel=1e-10)
    assert scores["bits"] == pytest.approx(nats / math.log(2), rel=1e-10)
    assert scores["perplexity"] == pytest.approx(math.exp(nats), rel=1e-10)
    with pytest.raises(ValueError, match="has no test part"):
        job.evaluate("test")


def test_gradient_norms_of_the_job(pattern):
    norms = job_of("rnnlm", pattern).gradient_norms(length=20, rows=4)
    assert len(norms) == 19
    assert norms[-1] > norms[0] > 0
    with pytest.raises(ValueError, match="'nnlm' has no recurrent layer"):
        job_of("nnlm", pattern).gradient_norms()
    with pytest.raises(ValueError, match="gradients need 10000 symbols, got 330"):
        job_of("rnnlm", pattern).gradient_norms(length=10_000)


# ---- toy tasks and samples ----------------------------------------------------------------


@EVERY
def test_a_repeated_pattern_is_learnt(pattern, model):
    """Toy task: only where a window begins can a symbol surprise; and the pattern goes on."""
    job = job_of(model, pattern, window=24)
    trained(job, 120, lr=2e-2)
    # The Transformer does not know where in the pattern each window of the score begins.
    assert job.evaluate("dev")["perplexity"] < (1.15 if job.context else 1.04)
    answers = job.sample([PATTERN[:4], PATTERN], length=60, temperature=0)
    assert answers[0].startswith(PATTERN[4:] + "\n" + PATTERN)
    assert answers[1].count(PATTERN) >= 4
    assert job.predict([PATTERN[:4]], length=60, temperature=0) == [answers[0].replace("\n", "\\n")]


def test_words_are_learnt_on_both_layers(tmp_path):
    """An LSTM on words goes on with a text; a word seen once is unknown, and never written."""
    line = "so it goes and so it went on"
    path = tmp_path / "words.txt"
    path.write_text(f"{line} once\n" + f"{line}\n" * 200)
    runs = []
    for layers in ("torch", "seqkern"):
        reading = {"tokens": "words", "min_count": 2, "window": 12}
        spec = JobSpec("rnnlm", "text", str(path), layers, 1, SMALL["rnnlm"], reading)
        job = make_job(spec)
        runs.append(trained(job, 80, lr=2e-2)[1])
        assert job.vocab.symbols[4:] == ("and", "goes", "it", "on", "so", "went")
        assert job.evaluate("dev")["perplexity"] < 1.05
        (answer,) = job.sample(["so it goes"], length=14, temperature=0)
        assert answer.split("\n")[0].split() == ["and", "so", "it", "went", "on"]
        assert answer.split("\n")[1].split() == line.split()
    assert runs[0][:50] == pytest.approx(runs[1][:50], rel=1e-4)


def test_the_transformer_copies(tmp_path):
    """Toy task: three random letters again and again; what comes next stands three places back."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=3)) for _ in range(2020)]
    path = tmp_path / "copies.txt"
    path.write_text("".join(f"{word * 8}\n" for word in words[20:]))
    sizes = {"width": 48, "heads": 2, "depth": 2, "context": 32}
    job = job_of("transformer-lm", path, sizes, window=32)
    trained(job, 250, lr=1e-2, batch_size=16, warmup=30)
    found = job.sample([f"\n{word * 2}" for word in words[:20]], length=6, temperature=0)
    assert sum(a == b * 2 for a, b in zip(found, words[:20], strict=True)) >= 18


def test_samples_follow_the_probabilities(pattern):
    """Drawn again and again, the next symbol has the model's frequencies at a temperature."""
    job = job_of("nnlm", pattern)
    x = job._numbers("ab")[None]
    scores, _ = job.model(x)
    last = scores[0, -1].double()
    last[:4] = -torch.inf
    p = (last / 0.5).softmax(-1)
    drawn = Counter(
        job.sample(["ab"], length=1, temperature=0.5, seed=seed)[0] for seed in range(600)
    )
    for symbol, n in zip(job.vocab.symbols, p.tolist(), strict=True):
        assert drawn[symbol] / 600 == pytest.approx(n, abs=5 * math.sqrt(n * (1 - n) / 600) + 1e-9)
    both = job.sample(["ab", "ca"], length=9)
    assert job.sample(["ca"], length=9) == both[1:]
    assert job.sample(["ca"], length=9, seed=2) != both[1:]


@pytest.mark.parametrize("options", [{"length": 0}, {"temperature": -1.0}])
def test_bad_sample_options_are_refused(pattern, options):
    with pytest.raises(ValueError, match="length must be at least 1 and temperature at least 0"):
        job_of("nnlm", pattern).sample(["a"], **options)


# ---- the counted model --------------------------------------------------------------------


@pytest.fixture
def counted():
    """Text of a small language, and the counted model's class; its library is an extra."""
    pytest.importorskip("nltk", reason="the counted model needs nltk")
    from seqkern.tasks.ngram import CountedModel

    draw, text, word = random.Random(4), [], "a"
    for _ in range(400):
        word = draw.choice({"a": "bbbc", "b": "ad", "c": "abcd", "d": "a"}[word])
        text.append(word)
    return CountedModel, text


@pytest.mark.parametrize("order", [2, 3, 4])
def test_the_index_changes_no_probability(counted, order):
    """Against NLTK's own estimator, and each distribution sums to one."""
    from nltk.lm import KneserNeyInterpolated

    model, text = counted
    ours = model(text, order, rate=0.7)
    theirs = KneserNeyInterpolated(order, discount=0.7)
    padded = ["<s>"] * (order - 1) + text
    grams = [tuple(padded[i : i + order]) for i in range(len(text))]
    theirs.fit([[g[i:] for i in range(order)] for g in grams], vocabulary_text=padded)
    for context in itertools.product("abcd", repeat=order - 1):
        p = [ours.probability(word, context) for word in "abcd"]
        assert p == pytest.approx([theirs.unmasked_score(w, context) for w in "abcd"], rel=1e-12)
        assert sum(p) == pytest.approx(1, rel=1e-9)
    expected = -sum(math.log(theirs.unmasked_score(g[-1], g[:-1])) for g in grams[:50]) / 50
    assert ours.nats(text[:50]) == pytest.approx(expected, rel=1e-12)


def test_the_counted_model_stands_beside_the_learnt_one(counted, tmp_path):
    draw = random.Random(2)
    text = draw.choices("abcdefghijklmnop", weights=range(16, 0, -1), k=400)
    for name, part in (("train", text[:300]), ("valid", [*text[300:], "z"])):
        (tmp_path / f"{name}.txt").write_text(" ".join(part))
    job = job_of("nnlm", tmp_path, tokens="words")
    with pytest.raises(ValueError, match=r"has never seen \['<unk>'\]"):
        job.evaluate("dev", ngram=3)
    (tmp_path / "valid.txt").write_text(" ".join(text[300:]))
    scores = job_of("nnlm", tmp_path, tokens="words").evaluate("dev", ngram=3)
    model, _ = counted
    expected = model([*text[:300], "</s>"], 3).nats([*text[300:], "</s>"])
    assert scores["kneser_ney"] == pytest.approx(math.exp(expected))
    assert scores["ratio"] == pytest.approx(scores["perplexity"] / scores["kneser_ney"])


def test_the_discount_is_counted(counted):
    model, _ = counted
    # Of the bigrams sa ab ba ac ca ab bb two occur more than once: none; ab twice, five once.
    assert model(list("abacabb"), 2).rate == 5 / (5 + 2 * 1)
    with pytest.raises(ValueError, match="discount needs n-grams"):
        model(list("aaaa"), 2)
    with pytest.raises(ValueError, match="order must be at least 2, got 1"):
        model(list("abac"), 1)


# ---- real text, examples ------------------------------------------------------------------


def test_tiny_shakespeare(corpora):
    job = make_job(JobSpec("rnnlm", "tinyshakespeare", str(corpora), sizes=SMALL["rnnlm"]))
    assert (len(job.data.train), len(job.data.dev)) == (1_003_854, 111_540)
    assert len(job.vocab) == 65 + 4
    _, losses = trained(job, 40, batch_size=16, lr=2e-2)
    assert losses[-1] < 3.2 < losses[0]


def test_multi30k_words(corpora):
    job = make_job(JobSpec("nnlm", "multi30k-en", str(corpora), sizes={"features": 8}))
    assert [part.count("</s>") for part in job.data] == [29_000, 1014, 1000]
    assert len(job.vocab) == 5921


@pytest.mark.parametrize("name", ["char_lm", "nnlm", "transformer_lm", "fast_weights", "hyperlstm"])
def test_example(example, name):
    if name == "nnlm":
        pytest.importorskip("nltk", reason="the counted model needs nltk")
    assert "step 2: loss" in example(f"{name}.py", "--steps", "2")
