"""What is measured: the cells of the grid, and the rows of the table with their goals."""

import math
from dataclasses import dataclass, replace
from itertools import product

GATES = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}

GRID_B = (1, 4, 16, 64)
GRID_T = (1, 16, 128, 512)
GRID_H = (32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Cell:
    """One measured call of a one-layer recurrent module with input size I = H.

    kind "inference" is a forward without gradients, "training" a forward and the gradients of
    x and of every weight, "step" one streaming time step that keeps its state.
    ragged: the batch is a PackedSequence with lengths spread evenly over T/4 .. T.
    """

    kind: str
    mode: str
    dtype: str
    B: int
    T: int
    H: int
    P: int = 0
    directions: int = 1
    ragged: bool = False
    threads: int = 1

    def __str__(self) -> str:
        parts = [self.mode, self.kind, self.dtype]
        parts += ["bi"] if self.directions == 2 else []
        parts += ["ragged"] if self.ragged else []
        parts += [f"threads{self.threads}"] if self.threads > 1 else []
        return "-".join([*parts, *self.sizes.split()])

    @property
    def sizes(self) -> str:
        """The sizes alone, where the rest is known."""
        return f"B{self.B} T{self.T} H{self.H}" + (f" P{self.P}" if self.P else "")

    @property
    def layers(self) -> int:
        """Stacked ones: here one, so that a record of a cell needs no such field."""
        return 1

    @property
    def lengths(self) -> list[int]:
        """Length of each sequence, longest first."""
        if not self.ragged or self.B == 1:
            return [self.T] * self.B
        shortest = -(-self.T // 4)
        span = self.T - shortest
        return [self.T - span * row // (self.B - 1) for row in range(self.B)]

    @property
    def flops(self) -> int:
        """Multiply-adds of the products (x 2), without the pointwise part."""
        G, out = GATES[self.mode], self.P or self.H
        per_row = 2 * G * self.H * (self.H + out) + 2 * self.P * self.H
        passes = 3 if self.kind == "training" else 1
        return passes * self.directions * per_row * sum(self.lengths)


@dataclass(frozen=True)
class Goal:
    """What the geometric mean over a row's cells has to reach against a peer, and the aim.

    peer "best" is in each cell the fastest of the row's peers. cell_floor, where given, binds
    every single cell.
    """

    peer: str
    floor: float
    aim: float
    cell_floor: float | None = None


@dataclass(frozen=True)
class Row:
    """One line of the table: its cells, who is timed beside seqkern, and the goals."""

    key: str
    title: str
    peers: tuple[str, ...]
    goals: tuple[Goal, ...]
    cells: tuple[Cell, ...]


def _grid(kind: str, mode: str, dtype: str, B=GRID_B, T=GRID_T, H=GRID_H, **more) -> tuple:
    """Cells over the product of sizes; half_projection=True sets P = H/2 in each."""
    half = more.pop("half_projection", False)
    return tuple(
        Cell(kind, mode, dtype, b, t, h, P=h // 2 if half else 0, **more)
        for h, t, b in product(H, T, B)
    )


F32, BF16 = "float32", "bfloat16"
TORCH, BOTH = ("torch",), ("torch", "onnxruntime")
LARGE_B = (16, 64)
RAGGED = {"B": (4, 16, 64), "T": (16, 128, 512), "ragged": True}
TWO_THREADS = {"directions": 2, "threads": 2}


def _torch_goal(floor: float, aim: float) -> tuple[Goal, ...]:
    return (Goal("torch", floor, aim),)


# A session of ONNX Runtime holds its weights packed; against it stands a layer that does too.
PREPACKED = "seqkern prepacked"

ROWS = (
    Row(
        "lstm-f32-inference-step",
        "LSTM fp32 inference T=1, B=1, through the layer",
        BOTH,
        _torch_goal(3, 6),
        _grid("inference", "LSTM", F32, B=(1,), T=(1,)),
    ),
    Row(
        "lstm-f32-inference-b1",
        "LSTM fp32 inference B=1, T>=16, H<=256",
        BOTH,
        (Goal("torch", 1.4, 2), Goal("best", 1.1, 1.6)),
        _grid("inference", "LSTM", F32, B=(1,), T=(16, 128, 512), H=(32, 64, 128, 256)),
    ),
    Row(
        "lstm-f32-inference-b2-8",
        "LSTM fp32 inference B=2..8",
        BOTH,
        _torch_goal(1.3, 2),
        _grid("inference", "LSTM", F32, B=(2, 4, 8)),
    ),
    Row(
        "lstm-f32-inference-b16",
        "LSTM fp32 inference B>=16",
        BOTH,
        (Goal("best", 1.0, 1.3, cell_floor=0.9),),
        _grid("inference", "LSTM", F32, B=LARGE_B),
    ),
    Row(
        "lstm-bf16-inference-b1",
        "LSTM bf16 inference B=1",
        TORCH,
        _torch_goal(1.4, 2.5),
        _grid("inference", "LSTM", BF16, B=(1,)),
    ),
    Row(
        "lstm-bf16-inference-b16",
        "LSTM bf16 inference B>=16",
        TORCH,
        _torch_goal(0.95, 1.5),
        _grid("inference", "LSTM", BF16, B=LARGE_B),
    ),
    Row(
        "lstm-f32-training-b1",
        "LSTM fp32 training B=1",
        TORCH,
        _torch_goal(1.4, 2),
        _grid("training", "LSTM", F32, B=(1,)),
    ),
    Row(
        "lstm-f32-training-b16",
        "LSTM fp32 training B>=16",
        TORCH,
        _torch_goal(1.05, 1.3),
        _grid("training", "LSTM", F32, B=LARGE_B),
    ),
    Row(
        "lstm-f32-training-ragged",
        "LSTM fp32 ragged training",
        TORCH,
        _torch_goal(3, 6),
        _grid("training", "LSTM", F32, **RAGGED),
    ),
    Row(
        "lstm-bf16-training-ragged",
        "LSTM bf16 ragged training",
        TORCH,
        _torch_goal(5, 15),
        _grid("training", "LSTM", BF16, **RAGGED),
    ),
    Row(
        "gru-f32-inference",
        "GRU fp32 inference",
        BOTH,
        _torch_goal(2, 5),
        _grid("inference", "GRU", F32),
    ),
    Row(
        "gru-f32-training",
        "GRU fp32 training",
        TORCH,
        _torch_goal(2, 5),
        _grid("training", "GRU", F32),
    ),
    Row(
        "lstmp-f32-inference",
        "LSTM fp32 inference, proj_size=H/2",
        TORCH,
        _torch_goal(2, 4),
        _grid("inference", "LSTM", F32, half_projection=True),
    ),
    Row(
        "lstmp-f32-training",
        "LSTM fp32 training, proj_size=H/2",
        TORCH,
        _torch_goal(2, 4),
        _grid("training", "LSTM", F32, half_projection=True),
    ),
    Row(
        "bilstm-f32-inference",
        "BiLSTM fp32 inference on 2 threads",
        BOTH,
        _torch_goal(1.3, 2),
        _grid("inference", "LSTM", F32, **TWO_THREADS),
    ),
    Row(
        "bilstm-f32-training",
        "BiLSTM fp32 training on 2 threads",
        TORCH,
        _torch_goal(1.3, 2),
        _grid("training", "LSTM", F32, **TWO_THREADS),
    ),
    Row(
        "stream-h64",
        "Stream.step, H=64, vs one step",
        BOTH,
        (Goal("torch", 10, 30), Goal("onnxruntime", 1.5, 3)),
        _grid("step", "LSTM", F32, B=(1,), T=(1,), H=(64,)),
    ),
    Row(
        "stream-h256",
        "Stream.step, H=256, vs one step",
        BOTH,
        (Goal("torch", 5, 10), Goal("onnxruntime", 1.5, 3)),
        _grid("step", "LSTM", F32, B=(1,), T=(1,), H=(256,)),
    ),
)

# Peak memory of a training step over torch's; measured apart from time, a process each.
MEMORY_CELLS = tuple(
    Cell("training", mode, F32, B, T, H, ragged=ragged)
    for mode, B, T, H, ragged in (
        ("LSTM", 64, 128, 256, False),
        ("LSTM", 16, 128, 1024, False),
        ("LSTM", 64, 128, 256, True),
        ("GRU", 64, 128, 256, False),
    )
)

# The sizes a grid keeps; "quick" stands for each region of the table with few cells, "tiny" is
# for testing the suite itself.
GRIDS = {
    "full": {"B": (1, 2, 4, 8, 16, 64), "T": GRID_T, "H": GRID_H},
    "quick": {"B": (1, 4, 16), "T": (1, 128), "H": (64, 256, 512)},
    "tiny": {"B": (1, 4, 16), "T": (1, 16), "H": (32, 64)},
}


def cells_of(row: Row, grid: str, longest: float = math.inf) -> list[Cell]:
    """The cells of a row that a grid of GRIDS keeps; a row is never left empty.

    `longest` leaves out the cells that would take more seconds a call at 100 GFLOP/s.
    """
    sizes = GRIDS[grid]
    kept = [c for c in row.cells if c.B in sizes["B"] and c.T in sizes["T"] and c.H in sizes["H"]]
    kept = [cell for cell in kept if cell.flops <= 1e11 * longest]
    return kept or [min(row.cells, key=lambda cell: cell.flops)]


def memory_cells(grid: str) -> list[Cell]:
    """The cells whose peak memory is measured; the tiny grid shortens the sequences."""
    if grid != "tiny":
        return list(MEMORY_CELLS)
    return [replace(MEMORY_CELLS[0], T=16, B=16, H=64)]
