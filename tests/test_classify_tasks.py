"""Classification and tagging as tasks: jobs from training to predicting, and the corpora."""

import random
import sys
from dataclasses import replace

import pytest
import torch

from seqkern.tasks import checkpoint
from seqkern.tasks.classify import ClassifyJob, WordDrop
from seqkern.tasks.corpora import corpus_folder
from seqkern.tasks.iob import TaggedSentence, read_snips
from seqkern.tasks.job import JobSpec
from seqkern.tasks.options import TrainOptions
from seqkern.tasks.registry import make_job
from seqkern.tasks.tagging import JointJob, TaggingJob, spell
from seqkern.tasks.training import Trainer, restore_job
from seqkern.tasks.vocab import UNKNOWN, Vocab
from tests.label_files import triples, write

QUICK = {"lr": 1e-2, "optimizer": "adam", "schedule": "constant", "warmup": 0, "batch_size": 32}
SMALL = {
    "textcnn": {"embedding": 16, "widths": (2, 3), "maps": 8},
    "bilstm": {"embedding": 16, "hidden": 16},
    "self-attentive": {"embedding": 16, "hidden": 16, "attention": 8, "rows": 2},
}


def opinions(count=240, seed=0):
    """Sentences of which one of four words tells the label; a third of the words are seen once."""
    draw, lines, others = random.Random(seed), [], ["the", "a", "film", "plot", "is", "very"]
    for i in range(count):
        key = draw.choice(["great", "fine", "dull", "bad"])
        words = draw.choices(others, k=5)
        words.insert(draw.randint(0, 5), key)
        words.insert(draw.randint(0, 6), f"name{i}")
        lines.append(f"{'pos' if key in ('great', 'fine') else 'neg'}\t{' '.join(words)}\n")
    return "".join(lines)


@pytest.fixture
def opinion_file(tmp_path):
    return write(tmp_path / "opinions.tsv", opinions())


def run(job, **options):
    trainer = Trainer(job, TrainOptions(**{**QUICK, **options}))
    return trainer, [loss for loss, _ in trainer.train(trainer.steps)]


@pytest.mark.parametrize("layers", ["torch", "seqkern"])
@pytest.mark.parametrize("model", SMALL)
def test_a_classifier_learns_and_is_restored(model, layers, opinion_file, tmp_path):
    reading = {"unknown": 0.25}
    spec = JobSpec(model, "labelled", str(opinion_file), layers, 1, SMALL[model], reading)
    job = make_job(spec)
    assert isinstance(job, ClassifyJob)
    trainer, _ = run(job, steps=60)
    scores = job.evaluate("test")
    assert scores["accuracy"] >= 0.95
    assert 0 < scores["loss"] < 0.3
    texts = ["The name999 is great", "so so name999 dull", "fine !"]
    assert job.predict(texts) == ["pos", "neg", "pos"]
    checkpoint.save(tmp_path / "c.pt", trainer.content())
    opinion_file.unlink()  # a restored job predicts without its data
    again = restore_job(checkpoint.load(tmp_path / "c.pt"))
    assert again.predict(texts) == ["pos", "neg", "pos"]
    with pytest.raises(ValueError, match=r"cannot classify ' ': it holds no word"):
        again.predict(["fine", " "])


@pytest.mark.parametrize(
    ("model", "sizes", "rows"),
    [
        ("self-attentive", {"rows": 2}, ("row 1", "row 2")),
        ("self-attentive", {"kind": "heads", "heads": 2}, ("a", "great", "film")),
        ("bilstm", {"pool": "attention", "attention": 8}, ("row 1",)),
    ],
)
def test_weights_are_shown_by_word(model, sizes, rows, opinion_file):
    """As the model gives them to the same sentence beside a longer one."""
    job = make_job(JobSpec(model, "labelled", str(opinion_file), sizes=SMALL[model] | sizes))
    run(job, steps=20)
    found = job.align("A great film")
    x = torch.zeros(2, 5, dtype=torch.int64)
    x[0, :3] = torch.tensor(job.words.encode(found.source))
    x[1], lengths = 5, torch.tensor([3, 5])
    assert (found.source, found.target) == (("a", "great", "film"), rows)
    assert found.weights.shape == (len(rows), 3)
    torch.testing.assert_close(found.weights.sum(1), torch.ones(len(rows)))
    with torch.no_grad():
        if model == "bilstm":
            expected = job.model.represent(x, lengths)[1][:1]
        else:
            expected = job.model.attend(x, lengths, need_weights=True).weights[0]
    if "kind" in sizes:
        expected = (expected[0] + expected[1])[:3] / 2  # of the heads
    torch.testing.assert_close(found.weights, expected[:, :3])
    with pytest.raises(ValueError, match="holds no word"):
        job.align(" ")


def test_a_model_without_attention_says_so(opinion_file):
    for model in ("bilstm", "textcnn"):
        job = make_job(JobSpec(model, "labelled", str(opinion_file), sizes=SMALL[model]))
        with pytest.raises(ValueError, match=f"model '{model}' has no alignments"):
            job.align("a great film")


def test_loss_and_scores_of_a_batch(opinion_file):
    """By hand from the model's probabilities, sentences of unlike length in any order."""
    job = make_job(JobSpec("textcnn", "labelled", str(opinion_file), sizes=SMALL["textcnn"]))
    dev = job.part("dev")
    job.model.eval()
    log_p = []
    with torch.no_grad():
        for e in dev:
            x = torch.tensor([job.words.encode(e.words)])
            scores = job.model(x, torch.tensor([x.size(1)]))
            log_p.append(scores[0].log_softmax(-1))
    losses = [-row[job.labels.encode(e.label)] for row, e in zip(log_p, dev, strict=True)]
    right = [job.labels[int(row.argmax())] == e.label for row, e in zip(log_p, dev, strict=True)]
    expected = {"accuracy": sum(right) / len(right), "loss": float(sum(losses) / len(losses))}
    assert job.evaluate("dev") == pytest.approx(expected, rel=1e-5)
    assert job.loss(job.collate(dev)).item() == pytest.approx(expected["loss"], rel=1e-5)


def test_words_are_dropped_in_training_alone(opinion_file):
    """With all words of a sentence unknown, its scores are those of as many UNKNOWN."""
    sizes = {**SMALL["textcnn"], "dropout": 0.0}
    spec = JobSpec("textcnn", "labelled", str(opinion_file), sizes=sizes, reading={"unknown": 1e9})
    job = make_job(spec)
    batch = job.collate(job.part("train")[:9])
    unknown = batch.x.masked_fill(batch.x > UNKNOWN, UNKNOWN)
    dropped = job.model.loss(unknown, batch.lengths, batch.labels)
    torch.testing.assert_close(job.loss(batch), dropped)
    job.model.eval()
    torch.testing.assert_close(
        job.loss(batch), job.model.loss(batch.x, batch.lengths, batch.labels)
    )


def test_a_label_that_training_has_not_is_wrong(tmp_path):
    for part, lines in (("train", "a\tx y\nb\tz\n"), ("dev", "b\tx\n"), ("test", "b\tx\nc\tx\n")):
        write(tmp_path / f"{part}.tsv", lines)
    job = make_job(JobSpec("textcnn", "labelled", str(tmp_path), sizes=SMALL["textcnn"]))
    job.model.output.bias.data[1] = 50.0  # always "b"
    assert job.evaluate("test") == {"accuracy": 0.5, "loss": pytest.approx(0, abs=1e-6)}


def test_max_norm_holds_after_every_step(opinion_file):
    sizes = {**SMALL["textcnn"], "max_norm": 0.05}
    job = make_job(JobSpec("textcnn", "labelled", str(opinion_file), sizes=sizes))
    trainer = Trainer(job, TrainOptions(**QUICK, steps=3))
    for _ in trainer.train(3):
        assert job.model.output.weight.norm(dim=1).max() <= 0.05 + 1e-6


def test_rare_words_are_dropped_most():
    torch.manual_seed(0)
    vocab = Vocab(["often", "once"])
    drop = WordDrop(vocab, [("often",) * 99 + ("once",)], 0.25)
    x = torch.tensor([[4, 5, 0, UNKNOWN]]).repeat(20_000, 1)
    shares = (drop(x) != x).double().mean(0).tolist()
    assert shares == pytest.approx([0.25 / 99.25, 0.25 / 1.25, 0, 0], abs=0.01)
    assert set(drop(x)[:, 1].tolist()) == {5, UNKNOWN}
    assert WordDrop(vocab, [("once",)], 0)(x) is x
    with pytest.raises(ValueError, match="unknown must not be negative, got -1"):
        WordDrop(vocab, [], -1)


def tagged(count=150, seed=0):
    """After "by" stands an artist of one or two words, of names seen once mostly."""
    draw, rows = random.Random(seed), []
    for i in range(count):
        names = [f"{draw.choice('bdg')}ono{i}", f"zz{i}"][: draw.randint(1, 2)]
        words = ["play", *draw.choices(["some", "more", "a", "song"], k=draw.randint(1, 3)), "by"]
        tags = ["O"] * len(words) + ["B-artist", "I-artist"][: len(names)]
        label = "Often" if "more" in words else "Play"
        rows.append((" ".join(words + names), " ".join(tags), label))
    return rows


@pytest.fixture
def snips_root(tmp_path):
    folder = tmp_path / "data" / "permissive" / "snips"
    for part, rows in (("train", tagged()), ("valid", tagged(20, 1)), ("test", tagged(30, 2))):
        triples(folder, part, *rows)
    return tmp_path / "data"


def test_each_different_word_is_spelt_once():
    letters = Vocab(["A", "a", "b"])
    spelt = spell([("Ab", "b"), ("ab", "Ab", "c")], letters)
    assert spelt.letters.tolist() == [[4, 6], [6, 0], [5, 6], [UNKNOWN, 0]]
    assert spelt.lengths.tolist() == [2, 1, 2, 1]
    assert spelt.word.tolist() == [[0, 1, 0], [2, 0, 3]]


@pytest.mark.parametrize("crf", [False, True])
@pytest.mark.parametrize("spellings", [False, True])
def test_slots_and_intents_are_learnt(snips_root, tmp_path, spellings, crf):
    if crf:
        pytest.importorskip("torchcrf", reason="the CRF is pytorch-crf's, which is optional")
    sizes = {"embedding": 16, "hidden": 32, "dropout": 0.1, "crf": crf}
    reading = {"spellings": spellings}
    job = make_job(JobSpec("joint", "snips", str(snips_root), sizes=sizes, reading=reading))
    assert isinstance(job, JointJob)
    trainer, losses = run(job, steps=40)
    assert losses[-1] < 0.2 * losses[0]
    scores = job.evaluate("test")
    assert scores["slot_f1"] >= 0.95
    assert scores["intent_accuracy"] >= 0.95
    assert scores["sentence_accuracy"] <= min(scores["intent_accuracy"], scores["accuracy"])
    checkpoint.save(tmp_path / "c.pt", trainer.content())
    again = restore_job(checkpoint.load(tmp_path / "c.pt"), "torch")
    answers = ["Often\tO O O B-artist I-artist", "Play\tO O O B-artist"]
    for one in (job, again):
        assert one.predict(["play more by dono999 zz999", "play some by Bono998"]) == answers


def test_slots_and_intents_of_your_own_folder(snips_root):
    """Read as SNIPS is; dev may be named valid, or is a tenth of train."""
    folder = snips_root / "permissive" / "snips"
    sizes = {"embedding": 8, "hidden": 8}
    for model in ("joint", "tagger"):
        job = make_job(JobSpec(model, "slots", str(folder), sizes=sizes))
        assert job.data == make_job(JobSpec(model, "snips", str(snips_root), sizes=sizes)).data
        assert job.score == "slot_f1"
    triples(folder, "dev", *tagged(10, 3))
    job = make_job(JobSpec("joint", "slots", str(folder), sizes=sizes))
    assert [len(part) for part in job.data] == [150, 10, 30]
    run(job, steps=1)
    assert set(job.evaluate("test")) >= {"slot_f1", "intent_accuracy", "sentence_accuracy"}
    for part in ("dev", "valid"):
        (folder / f"{part}.seq.in.gz").unlink()
    job = make_job(JobSpec("joint", "slots", str(folder), sizes=sizes))
    assert [len(part) for part in job.data] == [135, 15, 30]
    with pytest.raises(ValueError, match="'slots' needs data: a folder of train"):
        make_job(JobSpec("joint", "slots"))
    (folder / "train.label.gz").unlink()
    with pytest.raises(ValueError, match=r"holds no train\.label"):
        make_job(JobSpec("joint", "slots", str(folder), sizes=sizes))


def test_the_loss_of_tags_is_a_mean_over_words(snips_root):
    spec = JobSpec("tagger", "snips", str(snips_root), sizes={"embedding": 8, "hidden": 8})
    job = make_job(spec)
    assert isinstance(job, TaggingJob)
    job.model.eval()
    batch = job.collate(job.part("train")[:9])
    assert batch.units == sum(len(s.words) for s in job.part("train")[:9]) == batch.lengths.sum()
    total = 0.0
    for s in job.part("train")[:9]:
        one = job.collate([s])
        scores = job.model(one.x, one.lengths).tags[0].log_softmax(-1)
        total -= sum(scores[t, job.tags.encode(tag)].item() for t, tag in enumerate(s.tags))
    assert job.loss(batch).item() == pytest.approx(total / batch.units, rel=1e-5)


def test_phrases_are_scored_as_phrases(snips_root):
    """seqeval's F1: a phrase counts where both ends and the kind are right."""
    job = make_job(JobSpec("tagger", "snips", str(snips_root), sizes={"hidden": 8}))
    right = [["B-a", "I-a", "O", "B-b"], ["O", "B-a"]]
    found = [["B-a", "O", "O", "B-b"], ["O", "B-a"]]
    assert job.score == "slot_f1"
    assert job.scores_of(right, found) == pytest.approx({"accuracy": 5 / 6, "slot_f1": 2 / 3})
    none = [["O"] * 4, ["O"] * 2]
    assert job.scores_of(right, none) == pytest.approx({"accuracy": 1 / 3, "slot_f1": 0})


UD = "1\tThe\tthe\tDET\t_\t_\t2\tdet\t_\t_\n2\tdog{0}\tdog\tNOUN\t_\t_\t0\troot\t_\t_\n\n"


def test_parts_of_speech_from_conllu(tmp_path):
    path = write(tmp_path / "a.conllu", "".join(UD.format(i) for i in range(40)))
    sizes = {"embedding": 8, "hidden": 8, "letter_embedding": 8, "spelling": 8}
    spec = JobSpec("tagger", "conllu", str(path), sizes=sizes, reading={"spellings": True})
    job = make_job(spec)
    assert [len(part) for part in job.data] == [32, 4, 4]
    assert (job.score, job.tags.names) == ("accuracy", ("DET", "NOUN"))
    run(job, steps=40)
    assert job.evaluate("test") == {"accuracy": 1.0}
    assert job.predict(["The dog999", "the The"]) == ["DET NOUN", "DET DET"]


def test_a_file_of_columns(tmp_path):
    rows = [f"say O\nx{i} B-x\n\n" for i in range(20)]
    path = write(tmp_path / "a.iob", "".join(rows))
    job = make_job(JobSpec("tagger", "iob", str(path), sizes={"hidden": 8}))
    assert (job.score, [len(part) for part in job.data]) == ("slot_f1", [16, 2, 2])
    folder = tmp_path / "parts"
    for part in ("train", "test"):
        write(folder / f"{part}.txt", "".join(rows))
    job = make_job(JobSpec("tagger", "iob", str(folder), sizes={"hidden": 8}))
    assert [len(part) for part in job.data] == [18, 2, 20]
    write(folder / "test.txt", "say O\nwhat PER\n")
    spec = JobSpec("tagger", "iob", str(folder), sizes={"hidden": 8})
    with pytest.raises(ValueError, match=r"test\.txt:2: expected a tag of phrases last"):
        make_job(spec)
    job = make_job(replace(spec, reading={"score": "accuracy"}))
    assert job.data.test == [TaggedSentence(("say", "what"), ("O", "PER"))]


@pytest.mark.parametrize(
    ("model", "task", "line", "ends"),
    [
        ("textcnn", "labelled", "yes\tw{0}\n", ("tsv", "txt")),
        ("tagger", "iob", "w{0} O\n\n", ("txt", "conll", "iob", "tsv")),
        ("tagger", "conllu", UD, ("conllu",)),
    ],
)
def test_a_folder_of_parts(model, task, line, ends, tmp_path):
    """The same for every kind of a user's own files."""
    spec = JobSpec(model, task, str(tmp_path), sizes=SMALL.get(model, {"hidden": 8}))
    lines = "".join(line.format(i) for i in range(20))
    write(tmp_path / f"train.{ends[-1]}", lines)
    with pytest.raises(ValueError, match=f"holds no test.{' or test.'.join(ends)}, nor one that"):
        make_job(spec)
    write(tmp_path / f"test.{ends[0]}", lines)
    assert [len(part) for part in make_job(spec).data] == [18, 2, 20]
    write(tmp_path / f"dev.{ends[0]}", line.format(20))
    assert [len(part) for part in make_job(spec).data] == [20, 1, 20]


@pytest.mark.parametrize(
    ("model", "spec", "message"),
    [
        ("textcnn", {"task": "pairs"}, "task of model 'textcnn' must be one of .* got 'pairs'"),
        ("textcnn", {"sizes": {"labels": 3}}, r"\['labels'\] follow from data and reading"),
        ("textcnn", {"reading": {"spellings": True}}, r"\['spellings'\]: not options"),
        ("textcnn", {"data": ""}, "task 'labelled' needs data: a file of label<TAB>text"),
        ("tagger", {"task": "iob", "data": ""}, "task 'iob' needs data"),
        ("tagger", {"task": "conllu", "data": ""}, "task 'conllu' needs data"),
        ("bilstm", {"task": "trec", "data": ""}, "task 'trec' needs data"),
    ],
)
def test_bad_jobs_are_refused(model, spec, message, opinion_file):
    with pytest.raises(ValueError, match=message):
        make_job(JobSpec(model, **{"task": "labelled", "data": str(opinion_file), **spec}))


def test_bad_options_of_reading_are_refused(snips_root):
    with pytest.raises(ValueError, match=r"score must be one of .* got 'bleu'"):
        make_job(JobSpec("tagger", "snips", str(snips_root), reading={"score": "bleu"}))


def test_scores_say_which_package_is_missing(opinion_file, snips_root, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    job = make_job(JobSpec("textcnn", "labelled", str(opinion_file), sizes=SMALL["textcnn"]))
    with pytest.raises(ModuleNotFoundError, match="accuracy needs the package scikit-learn: pip"):
        job.evaluate("dev")
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "seqeval.metrics", None)
    job = make_job(JobSpec("tagger", "snips", str(snips_root), sizes={"hidden": 8}))
    with pytest.raises(ModuleNotFoundError, match="F1 of phrases needs the package seqeval: pip"):
        job.evaluate("dev")


# --- the real corpora

COUNTS = {
    ("textcnn", "trec"): ((4907, 545, 500), 6),
    ("textcnn", "mr"): (None, 2),
    ("textcnn", "subj"): (None, 2),
    ("textcnn", "clinc150"): ((15000, 3000, 4500), 150),
    ("textcnn", "banking77"): ((9003, 1000, 3080), 77),
    ("textcnn", "snips"): ((13084, 700, 700), 7),
}


@pytest.mark.parametrize(("model", "task"), COUNTS)
def test_corpora_of_sentences(corpora, model, task):
    job = make_job(JobSpec(model, task, str(corpora), sizes=SMALL[model]))
    counts, labels = COUNTS[model, task]
    sizes = tuple(len(part) for part in job.data)
    assert len(job.labels) == labels
    if counts is not None:
        assert sum(sizes[:2]) == sum(counts[:2])
        assert sizes[2] == counts[2]
        assert abs(sizes[1] - counts[1]) < 0.01 * counts[0]
    else:
        assert sum(sizes) == {"mr": 10662, "subj": 10000}[task]
        assert min(sizes[1:]) > 0.09 * sum(sizes)
    _, losses = run(job, steps=30)
    assert sum(losses[-5:]) < sum(losses[:5])


@pytest.mark.parametrize(("task", "tags"), [("snips", 72), ("ewt-upos", 17)])
def test_corpora_of_tags(corpora, task, tags):
    sizes = {"embedding": 16, "hidden": 16}
    job = make_job(JobSpec("tagger", task, str(corpora), sizes=sizes))
    assert len(job.tags) == tags
    counts = {"snips": (13084, 700, 700), "ewt-upos": (12544, 2001, 2077)}
    assert tuple(len(part) for part in job.data) == counts[task]
    _, losses = run(job, steps=30)
    assert sum(losses[-5:]) < sum(losses[:5])


def test_snips_folder(corpora):
    parts = read_snips(corpus_folder(corpora, "snips"))
    assert parts.test[0].label == "AddToPlaylist"
    assert parts.test[0].words[:3] == ("add", "sabrina", "salerno")
    assert parts.test[0].tags[:3] == ("O", "B-artist", "I-artist")
