"""The trainer on a job of its own: schedules, accumulation, several processes, what is carried."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from seqkern.cli.parallel import joined_processes
from seqkern.tasks import registry
from seqkern.tasks.corpora import corpus_folder
from seqkern.tasks.job import Job, JobSpec, Parts, restore_vocabulary
from seqkern.tasks.options import OPTIMIZERS, TrainOptions
from seqkern.tasks.run import StopRequest, best_path, read_log, run_steps, save, scores_path
from seqkern.tasks.training import Trainer
from seqkern.tasks.vocab import Labels


class Numbers(NamedTuple):
    x: Tensor
    units: int
    rows: int


class Model(nn.Module):
    """Predicts a number by a line, plus what it carries from the step before."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(1, 1, dtype=torch.float64)
        self.unused = nn.Linear(1, 1, dtype=torch.float64)


class LineJob(Job):
    """Rows of several numbers each: the loss is the mean over the numbers, not over the rows."""

    TASKS: ClassVar = {"numbers": "generated"}
    READING: ClassVar = {"noise": 0.0, "drift": 0.01}
    unit = "number"
    score = "loss"
    higher = False

    def read(self) -> Parts:
        rows = [[float(i * j % 7) for j in range(1 + i % 5)] for i in range(23)]
        return Parts(rows, rows[:4], rows[4:6])

    def build_vocabs(self):
        return {"labels": Labels(["a", "b"])}

    def build_model(self):
        self.kept = torch.zeros((), dtype=torch.float64)
        return Model()

    def length(self, example):
        return (len(example),)

    def collate(self, examples):
        x = torch.tensor([number for row in examples for number in row], dtype=torch.float64)
        return Numbers(x, len(x), len(examples))

    def loss(self, batch):
        x = batch.x[:, None]
        noise = self.reading["noise"] * torch.rand_like(x) if self.model.training else 0.0
        loss = (self.model.line(x + noise) - 3 * x + 0.1 * self.kept).square().mean()
        self.kept = self.kept + self.reading["drift"]
        return loss

    def evaluate(self, part, **options):
        kept = self.kept
        with torch.no_grad():
            self.model.eval()
            value = self.loss(self.collate(self.part(part))).item()
        self.kept = kept
        return {"loss": value}

    def predict(self, texts, **options):
        return list(texts)

    def carried(self):
        return {"kept": self.kept}

    def carry(self, state):
        self.kept = state["kept"]


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    monkeypatch.setitem(registry.MODELS, "line", registry.Entry("", "", "", "a line"))
    monkeypatch.setattr(registry, "make_job", make_line)
    monkeypatch.setattr("seqkern.tasks.training.make_job", make_line)


def make_line(spec, vocabularies=None):
    return LineJob(spec, vocabularies)


def trainer_of(noise=0.0, drift=0.01, **options):
    spec = JobSpec("line", "numbers", reading={"noise": noise, "drift": drift})
    defaults = {"steps": 12, "batch_size": 4, "lr": 0.05, "warmup": 2, "optimizer": "sgd"}
    return Trainer(make_line(spec), TrainOptions(**{**defaults, **options}))


def losses(trainer, steps=100):
    return [loss for loss, _ in trainer.train(steps)]


def test_schedules():
    options = TrainOptions(lr=2.0, warmup=4, steps=14)
    assert [options.lr_at(s, 14) for s in (0, 1, 3)] == [0.5, 1.0, 2.0]
    assert options.lr_at(9, 14) == pytest.approx(1.0)  # half of the cosine
    assert options.lr_at(14, 14) == pytest.approx(0.0)
    linear = replace(options, schedule="linear")
    assert [linear.lr_at(s, 14) for s in (4, 9, 14)] == [2.0, 1.0, 0.0]
    noam = replace(options, schedule="noam")
    # equation 3: min(n^-.5, n warmup^-1.5) in step n, over its value at n = warmup
    for n in (1, 3, 4, 5, 16, 100):
        expected = 2.0 * min(n**-0.5, n * 4**-1.5) / 4**-0.5
        assert noam.lr_at(n - 1, 14) == pytest.approx(expected)
    assert replace(options, schedule="constant").lr_at(13, 14) == 2.0


def test_epochs_are_counted_in_updates():
    assert trainer_of(epochs=3).steps == 18  # 23 rows in batches of 4
    assert trainer_of(epochs=1, accumulate=4).steps == 2
    assert trainer_of(steps=5).steps == 5
    trainer = trainer_of(epochs=1)
    rows = [rows for _, rows in trainer.train(100)]
    assert sum(rows) == 23
    assert trainer.finished


def test_accumulated_batches_are_one():
    """The gradient is that of the mean over all numbers of the batches, however they are cut."""
    trainer = trainer_of(
        accumulate=3, steps=1, clip=0.0, warmup=0, weight_decay=0.0, schedule="constant"
    )
    batches = [trainer.batches[i] for i in range(3)]
    x = torch.cat([batch.x for batch in batches])[:, None]
    line = trainer.job.model.line
    w = line.weight.detach().clone().requires_grad_()
    b = line.bias.detach().clone()
    kept = torch.cat([torch.full((b_.units, 1), 0.01 * i) for i, b_ in enumerate(batches)])
    expected = (x @ w.T + b - 3 * x + 0.1 * kept).square().mean()
    expected.backward()
    assert losses(trainer) == pytest.approx([expected.item()])
    torch.testing.assert_close(line.weight.detach(), (w - 0.05 * w.grad).detach())


def test_what_is_carried_is_resumed(tmp_path):
    whole = losses(trainer_of(noise=0.5))
    trainer = trainer_of(noise=0.5)
    before = losses(trainer, 5)
    save(trainer, tmp_path / "checkpoint.pt")
    resumed = Trainer.resume(tmp_path / "checkpoint.pt")
    assert before + losses(resumed) == whole
    assert len(set(whole)) == len(whole)


def test_evaluations_leave_the_losses_alone(tmp_path):
    """Training with evaluations has the losses of a training without, bit for bit."""
    trainer = trainer_of(noise=0.5, evaluate_every=2, average=3)
    seen = []
    run_steps(trainer, tmp_path, 100, StopRequest(), seen.append)
    assert seen == losses(trainer_of(noise=0.5))
    lines = read_log(scores_path(tmp_path))
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 10, 12, 12]
    best = torch.load(best_path(tmp_path), weights_only=True)
    assert best["best"][0] == min(line["loss"] for line in lines if "averaged" not in line)


def test_the_average_is_of_the_last_evaluations():
    trainer = trainer_of(evaluate_every=4, average=2, lr=0.02)
    weights = []
    for n, _ in enumerate(trainer.train(100), 1):
        if n % 4 == 0:
            trainer.evaluate()
            weights.append(trainer.job.model.line.weight.detach().clone())
    torch.testing.assert_close(trainer.averaged()["line.weight"], (weights[1] + weights[2]) / 2)


class EarlierAdagrad(torch.optim.Adagrad):
    """That of PyTorch 2.11, which fills its state when it is built and at no other time."""

    def _init_group(self, group, *lists):
        for p in group["params"]:
            if p.grad is not None:
                self.state[p]["sum"]
        return super()._init_group(group, *lists)


class TwoPhaseJob(LineJob):
    first_phase = 4

    def first_batches(self, batch_size, seed):
        return self.batches(batch_size, seed + 1)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_optimiser_starts_anew_after_the_first_phase(optimizer, monkeypatch):
    """The second phase has the losses of a training that begins with the weights it found."""
    monkeypatch.setattr(torch.optim, "Adagrad", EarlierAdagrad)
    spec = JobSpec("line", "numbers", reading={"drift": 0.0})
    options = TrainOptions(steps=5, batch_size=4, lr=0.05, warmup=2, optimizer=optimizer)
    trainer = Trainer(TwoPhaseJob(spec), options)
    losses(trainer, 4)
    fresh = Trainer(make_line(spec), options)
    fresh.job.model.load_state_dict(trainer.job.model.state_dict())
    second = losses(trainer)
    assert second == losses(fresh)
    assert len(set(second)) == 5


def test_a_loss_that_is_not_finite_ends_the_training():
    with pytest.raises(ValueError, match=r"the loss of step \d+ is (inf|nan); try a smaller lr"):
        losses(trainer_of(lr=1e200, clip=0.0))


def test_bad_specs_are_refused():
    with pytest.raises(ValueError, match="task of model 'line' must be one of numbers, got 'text'"):
        make_line(JobSpec("line", "text"))
    with pytest.raises(
        ValueError, match=r"\['size'\]: not options of task 'numbers'.* has drift, noise"
    ):
        make_line(JobSpec("line", "numbers", reading={"size": 3}))
    job = make_line(JobSpec("line", "numbers"))
    with pytest.raises(ValueError, match="part must be one of"):
        job.part("valid")
    job.data.test.clear()
    with pytest.raises(ValueError, match="the data has no test part"):
        job.evaluate("test")
    with pytest.raises(ValueError, match="kind 'bytes' is not known"):
        restore_vocabulary({"kind": "bytes"})


def test_corpora_are_found_by_name(tmp_path):
    (tmp_path / "free" / "trec").mkdir(parents=True)
    assert corpus_folder(tmp_path, "trec") == tmp_path / "free" / "trec"
    assert corpus_folder(tmp_path / "free", "trec") == tmp_path / "free" / "trec"
    for root, message in ((tmp_path, "holds no corpus"), ("", "needs data"), ("/no", "must be")):
        with pytest.raises(ValueError, match=message):
            corpus_folder(root, "sst")


def test_processes_share_the_work(tmp_path):
    """Two processes take the steps of one that accumulates twice as much, and resume alike."""
    script = tmp_path / "train.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import test_training\n"
        "test_training.as_process()\n"
    )
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone")
    subprocess.run(
        [*launcher, "--nproc-per-node=2", str(script)],
        check=True,
        capture_output=True,
        timeout=180,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
    )
    found = json.loads((tmp_path / "losses.json").read_text())
    assert found == pytest.approx(losses(trainer_of(drift=0.0, accumulate=4, steps=12)))
    # What has a gradient in no process is left alone, by weight decay too.
    weights = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["model"]
    assert torch.equal(weights["unused.weight"], trainer_of().job.model.unused.weight.detach())
    with pytest.raises(ValueError, match="was trained by 2 processes, here are 1"):
        Trainer.resume(tmp_path / "checkpoint.pt")


def as_process() -> None:
    """What torchrun starts: trains five steps, and the others from the checkpoint of these."""
    training = sys.modules["seqkern.tasks.training"]
    vars(training)["make_job"] = make_line  # as the fixture does for the tests
    path = Path("checkpoint.pt")
    with joined_processes():
        trainer = trainer_of(drift=0.0, accumulate=2, steps=12)
        found = losses(trainer, 5)
        save(trainer, path)
        dist.barrier()
        found += losses(Trainer.resume(path))
        if trainer.rank == 0:
            Path("losses.json").write_text(json.dumps(found))
