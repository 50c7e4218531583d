"""Two gloo processes against one: DistributedDataParallel and FSDP2 over seqkern's layers, whose
workers are this file run as a script, one process a rank; and `seqkern train` under torchrun.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import seqkern
import seqkern.nn

RANKS, STEPS = 2, 3
KINDS = ("ddp", "fsdp2")


class Model(torch.nn.Module):
    """Layers of every kind, with what matters for sharding: stacks, directions, a cell."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = seqkern.nn.LSTM(5, 6, 2, bidirectional=True, proj_size=4, batch_first=True)
        self.gru = seqkern.nn.GRU(8, 6, batch_first=True)
        self.rnn = torch.nn.RNN(6, 6, batch_first=True)
        self.cell = seqkern.nn.LSTMCell(6, 4)
        seqkern.convert(self)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.lstm, self.gru, self.rnn):
            x = layer(x)[0]
        h, c = self.cell(x[:, -1], self.cell(x[:, 0]))
        return torch.cat([h, c], -1)


def new_model() -> Model:
    torch.manual_seed(0)
    return Model().double()


def batches() -> Tensor:
    """(STEPS, B, T, I), the same in every process."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(STEPS, 2 * RANKS, 7, 5, generator=generator, dtype=torch.float64)


def train(model: torch.nn.Module, data: Tensor) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for batch in data:
        optimizer.zero_grad()
        model(batch).square().sum(-1).mean().backward()
        optimizer.step()


def wrap(kind: str, model: Model) -> torch.nn.Module:
    if kind == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (RANKS,))
    for layer in (model.lstm, model.gru, model.cell):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def worker(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=RANKS
    )
    for kind in KINDS:
        model = new_model()
        train(wrap(kind, model), batches().chunk(RANKS, 1)[rank])
        weights = {
            name: weight.full_tensor() if kind == "fsdp2" else weight.detach()
            for name, weight in model.named_parameters()
        }
        if rank == 0:
            torch.save(weights, folder / f"{kind}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, run_ranks) -> Path:
    """The folder with the weights that the processes trained to, a file for each kind."""
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(__file__, RANKS, folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_train_to_the_weights_of_one(kind: str, trained: Path) -> None:
    single = new_model()
    start = {name: weight.detach().clone() for name, weight in single.named_parameters()}
    train(single, batches())
    expected = {name: weight.detach() for name, weight in single.named_parameters()}
    assert all(not torch.equal(expected[name], start[name]) for name in start)
    actual = torch.load(trained / f"{kind}.pt", weights_only=True)
    torch.testing.assert_close(actual, expected)


def test_train_under_torchrun(tmp_path: Path) -> None:
    """Two processes have the losses of one that accumulates; one of them speaks for both."""
    from seqkern.cli.train import train as train_command  # the workers above need no command
    from seqkern.tasks.run import log_path, read_log, scores_path

    data = tmp_path / "opinions.tsv"
    words = ("dull", "bad"), ("fine", "good")
    data.write_text("".join("{1}\t{0} x{2}\n".format(*words[n % 2], n % 7) for n in range(60)))
    settings = ["batch_size=8", "embedding=8", "maps=4", "dropout=0.0", "unknown=0.0"]
    settings += ["evaluate_every=2", "optimizer=adam"]
    command = ["train", "textcnn", "--task=labelled", f"--data={data}", "--steps=4"]
    command += [f"--run={tmp_path / 'two'}", *(f"--set={setting}" for setting in settings)]
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone")
    done = subprocess.run(
        [*launcher, f"--nproc-per-node={RANKS}", "-m", "--", "seqkern.cli", *command],
        capture_output=True,
        text=True,
        timeout=150,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith(("step", "done"))]
    assert [line.partition(":")[0] for line in lines] == ["step 2", "step 4", "done"]
    one, two = tmp_path / "one", tmp_path / "two"
    settings.append(f"accumulate={RANKS}")
    train_command("textcnn", "labelled", str(data), run=one, steps=4, settings=settings)
    for log in (log_path, scores_path):
        ours, theirs = read_log(log(two)), read_log(log(one))
        assert [line["step"] for line in ours] == [line["step"] for line in theirs]
        losses = [line["loss"] for line in theirs]
        assert [line["loss"] for line in ours] == pytest.approx(losses, rel=1e-5)


if __name__ == "__main__":
    worker(int(sys.argv[1]), Path(sys.argv[2]))
