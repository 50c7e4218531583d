"""A language model that becomes a classifier: its two losses, its two phases, and that it pays."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from seqkern.models.pretrained import PretrainedClassifier, PretrainedConfig
from seqkern.tasks.finetune import UnlabelledBatch
from seqkern.tasks.job import JobSpec
from seqkern.tasks.options import TrainOptions
from seqkern.tasks.registry import make_job
from seqkern.tasks.run import save
from seqkern.tasks.training import Trainer
from tests.cells_by_hand import lstm_states

CONFIG = PretrainedConfig(symbols=12, labels=3, embedding=5, hidden=6, head=4, dropout=0.0)


def model_of(layers="seqkern", config=CONFIG):
    torch.manual_seed(2)
    return PretrainedClassifier(config, layers).double()


def batch():
    lengths = torch.tensor([4, 1, 6, 3])
    x = torch.randint(4, 12, (4, 6)).masked_fill(torch.arange(6) >= lengths[:, None], 0)
    return x, lengths, torch.tensor([2, 0, 1, 1])


def by_hand(model, x):
    """One sentence (T,): h_0 .. h_T by the LSTM's equations."""
    p = dict(model.named_parameters())
    words = torch.tensor([1, *x.tolist()])
    return lstm_states(p, "lstm", "_l0", p["embed.weight"][words])


def test_both_losses_are_the_equations():
    model, (x, lengths, labels) = model_of(), batch()
    p = dict(model.named_parameters())
    language, label = [], []
    for row, length, y in zip(x, lengths.tolist(), labels, strict=True):
        h = by_hand(model, row[:length])
        u = torch.cat([h[-1], h.max(0).values, h.mean(0)])
        hidden = torch.relu(p["w_1.weight"] @ u + p["w_1.bias"])
        label.append(-(p["w_2.weight"] @ hidden + p["w_2.bias"]).log_softmax(-1)[y])
        for t in range(length):
            scores = p["embed.weight"] @ (p["w_p.weight"] @ h[t] + p["w_p.bias"])
            language.append(-scores.log_softmax(-1)[row[t]])
    close = {"rtol": 1e-12, "atol": 1e-13}
    torch.testing.assert_close(model.loss(x, lengths, labels), torch.stack(label).mean(), **close)
    torch.testing.assert_close(
        model.language_loss(x, lengths), torch.stack(language).mean(), **close
    )


def test_both_layers_agree_forward_and_backward():
    x, lengths, labels = batch()
    found = []
    for layers in ("seqkern", "torch"):
        model = model_of(layers)
        losses = torch.stack([model.loss(x, lengths, labels), model.language_loss(x, lengths)])
        losses.sum().backward()
        found.append([losses, *(p.grad for p in model.parameters())])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_padding_changes_nothing():
    model, (x, lengths, _) = model_of(), batch()
    wider = torch.cat([x, torch.full((4, 3), 7)], 1)
    torch.testing.assert_close(model(wider, lengths), model(x, lengths))
    torch.testing.assert_close(model.language_loss(wider, lengths), model.language_loss(x, lengths))
    with pytest.raises(ValueError, match=r"lengths must be in 1 \.\. 6, got 0 \.\. 6"):
        model(x, lengths - torch.tensor([0, 1, 0, 0]))


@pytest.fixture(scope="module")
def sentences(tmp_path_factory):
    """Sentences of two dialects. Each has twenty words of its own of which a sentence holds
    four, so two sentences of a dialect seldom share one; all of them together show it."""
    draw = random.Random(0)
    words = {"north": [f"n{i}" for i in range(20)], "south": [f"s{i}" for i in range(20)]}
    lines = []
    for _ in range(1500):
        label = draw.choice(sorted(words))
        lines.append(f"{label}\t{' '.join(draw.choices(words[label], k=4))}\n")
    path = tmp_path_factory.mktemp("data") / "dialects.tsv"
    path.write_text("".join(lines))
    return str(path)


def job_of(data, layers="seqkern", **reading):
    sizes = {"embedding": 16, "hidden": 32, "head": 16, "dropout": 0.0}
    spec = JobSpec("pretrained", "labelled", data, layers, 1, sizes, {"unknown": 0.0, **reading})
    return make_job(spec)


def test_a_share_of_each_label_is_kept(sentences):
    job = job_of(sentences, share=0.02)
    labels = [e.label for e in job.data.train]
    assert 20 <= len(labels) <= 30
    assert abs(labels.count("north") - labels.count("south")) <= 4
    assert len(job.words) == 44
    assert set(job.data.train) <= set(job_of(sentences, share=1.0).data.train)


def test_numbers_out_of_range_are_refused(sentences):
    with pytest.raises(ValueError, match=r"share must be in \(0, 1\], got 0"):
        job_of(sentences, share=0.0)
    with pytest.raises(ValueError, match="pretrain must not be negative, got -5"):
        job_of(sentences, pretrain=-5)
    for name in ("bos", "pad"):
        for number in (12, -7):
            with pytest.raises(ValueError, match=rf"{name} must be in 0 \.\. 11, got {number}"):
                replace(CONFIG, **{name: number})


def test_the_first_steps_are_the_language(sentences):
    job = job_of(sentences, share=0.02, pretrain=3)
    options = TrainOptions(
        batch_size=8, accumulate=2, epochs=2, evaluate_every=1, lr=0.01, warmup=0, schedule="linear"
    )
    trainer = Trainer(job, options)
    assert trainer.steps == 3 + 4  # 25 sentences with a label, 16 a step
    drawn, rates, due = [], [], []
    job.loss = lambda batch, loss=job.loss: drawn.append(batch) or loss(batch)
    for _ in trainer.train(trainer.steps):
        rates.append(trainer.optimizer.param_groups[0]["lr"])
        due.append(trainer.evaluation_due)
    kinds = [isinstance(batch, UnlabelledBatch) for batch in drawn]
    assert kinds == [True] * 6 + [False] * 8
    assert due == [False] * 3 + [True] * 4
    assert rates == pytest.approx([0.01 * n for n in (1, 2 / 3, 1 / 3, 1, 3 / 4, 1 / 2, 1 / 4)])
    moments = trainer.optimizer.state.values()
    assert {int(state["step"]) for state in moments} == {4}  # of the second phase alone
    text = drawn[0]
    assert text.units == int(text.lengths.sum())
    assert drawn[6].units == 8
    placed = job.place(text)
    torch.testing.assert_close(job.loss(placed), job.model.language_loss(placed.x, placed.lengths))


def test_a_run_does_not_go_on_with_other_unlabelled_text(sentences, tmp_path):
    """Those that keep their label are what they were, but the first phase reads the others."""
    path, checkpoint = tmp_path / "dialects.tsv", tmp_path / "checkpoint.pt"
    text = Path(sentences).read_text()
    path.write_text(text)
    job = job_of(str(path), share=0.02, pretrain=4)
    trainer = Trainer(job, TrainOptions(steps=2, batch_size=8, warmup=0))
    assert len(list(trainer.train(1))) == 1
    save(trainer, checkpoint)
    assert Trainer.resume(checkpoint).step == 1
    kept = {e.words for part in job.data for e in part}
    lines = text.splitlines()
    rest = (line for line in lines if tuple(line.split()[1:]) not in kept)
    changed = next(line for line in rest if lines.count(line) == 1)
    path.write_text(text.replace(changed, f"{changed.split()[0]}\tnone of these words"))
    assert job_of(str(path), share=0.02).data == job.data
    with pytest.raises(ValueError, match="was trained on other data"):
        Trainer.resume(checkpoint)


def accuracy(data, pretrain, layers="seqkern"):
    job = job_of(data, layers, share=0.001, pretrain=pretrain)
    options = TrainOptions(steps=60, batch_size=32, lr=5e-3, warmup=0, schedule="constant")
    losses = [loss for loss, _ in Trainer(job, options).train(pretrain + 60)]
    return job.evaluate("test")["accuracy"], losses


def test_pretraining_pays(sentences):
    """With two labelled sentences the words of others mean nothing unless they were read."""
    alone, _ = accuracy(sentences, 0)
    helped, losses = accuracy(sentences, 150)
    assert helped >= 0.95
    assert helped > alone + 0.1
    _, theirs = accuracy(sentences, 150, "torch")
    assert losses[:50] == pytest.approx(theirs[:50], rel=1e-4)
