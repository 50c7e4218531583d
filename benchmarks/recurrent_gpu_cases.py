"""What of the recurrent layers is measured on a GPU: the cells, the rows of the table with their
goals, and who is timed beside seqkern."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

from benchmarks.cells import Cell, Goal, Row

# Without TF32, and with it.
OURS, OURS_TF32 = "seqkern", "seqkern tf32"
# torch.nn as it stands, which on a GPU is cuDNN's without TF32; the same with TF32; in float16;
# with cuDNN switched off, which leaves PyTorch's own step by step; and a loop of cells.
TORCH, TF32, HALF, LOOP = "torch", "torch tf32", "torch float16", "torch step by step"
CELLS = "loop of cells"

KINDS = {"inference": "fwd", "training": "fwd+bwd"}
GRID_B = (1, 8, 16, 32, 64, 128, 256)
GRID_T = (128, 1024)
GRID_H = (64, 128, 192, 256, 512, 768, 1024, 1536, 2048)
BF16, F16, F32 = "bfloat16", "float16", "float32"
DTYPES = (BF16, F16, F32)


@dataclass(frozen=True)
class GpuCell(Cell):
    """A cell of one or more stacked layers, `stacked` of them."""

    stacked: int = 1

    @property
    def layers(self) -> int:
        return self.stacked

    def __str__(self) -> str:
        return super().__str__() + (f"-layers{self.stacked}" if self.stacked > 1 else "")


def is_persistent(cell: Cell) -> bool:
    """Whether cuDNN keeps the weights of such an LSTM resident in float16: PyTorch's own rule, of
    one direction and layer that is not ragged, with I = H, beyond what its small-H kernels take."""
    return cell.H % 128 == 0 and 256 <= cell.H <= 1024 and cell.B % 8 == 0 and cell.B <= 128


def _cells(kind: str, mode: str = "LSTM", B=GRID_B, T=GRID_T, H=GRID_H, dtypes=DTYPES, **more):
    sizes = product(dtypes, H, T, B)
    return tuple(GpuCell(kind, mode, dtype, b, t, h, **more) for dtype, h, t, b in sizes)


def _row(key: str, title: str, goal: Goal | None, cells: Iterable[GpuCell], *peers: str) -> Row:
    cells = tuple(cells)
    kind = cells[0].kind
    peers = peers or (TORCH, TF32, OURS_TF32, HALF, LOOP)
    goals = (goal,) if goal else ()
    return Row(f"gpu-{key}-{kind}", f"{title}, {KINDS[kind]}", peers, goals, cells)


def _rows(kind: str) -> list[Row]:
    """Of one pass: those with goals first, most wanted first."""
    grid = _cells(kind)
    small = [c for c in grid if c.H <= 192]
    persistent = {d: [c for c in grid if c.dtype == d and is_persistent(c)] for d in (F16, BF16)}
    few = {"B": (1, 8, 16, 32, 64), "T": (128,), "H": (128, 256, 512)}
    loop = {"B": (1, 8, 32), "T": (128,), "H": (128, 256), "dtypes": (BF16, F32)}
    open_ground = Goal(TORCH, 1.5, 4)
    stacked = [c for n in (2, 4) for c in _cells(kind, **few, stacked=n)]
    aim = 1.8 if kind == "inference" else 1.5
    rows = [
        _row("f16", "fp16 where cuDNN is persistent", Goal(TORCH, 1, aim), persistent[F16]),
        _row("bf16", "bf16, same shapes", Goal(TORCH, 2, 5), persistent[BF16]),
        _row("small-b8", "H<=192, B<=8", Goal(TORCH, 1, 1.3), (c for c in small if c.B <= 8)),
        _row("small-b32", "H<=192, B>=32", Goal(TORCH, 3, 10), (c for c in small if c.B >= 32)),
        _row("bidirectional", "bidirectional", open_ground, _cells(kind, **few, directions=2)),
        _row("layers", "2 and 4 layers", open_ground, stacked),
        _row("ragged", "ragged", open_ground, _cells(kind, **few, ragged=True)),
        _row("gru", "GRU", open_ground, _cells(kind, "GRU", **few)),
        _row(
            "cells", "vs a loop of cells", Goal(CELLS, 20, 50), _cells(kind, **loop), TORCH, CELLS
        ),
    ]
    taken = {cell for row in rows for cell in row.cells if "cells" not in row.key}
    rest = [c for c in grid if c not in taken]
    return [*rows, *(_row(f"rest-{d}", f"other {d}", None, (c for c in rest if c.dtype == d))
                     for d in DTYPES)]  # fmt: skip


ROWS = tuple(row for pair in zip(*map(_rows, KINDS), strict=True) for row in pair)


def is_quick(cell: GpuCell) -> bool:
    """Whether a cell is of those that stand for their row where minutes count."""
    if is_plain(cell):
        long = cell.B == 16 and cell.H in (128, 768)
        return long if cell.T == 1024 else cell.B in (1, 8, 64) and cell.H in (128, 256, 512, 1024)
    return cell.B in (8, 64) and cell.H in (128, 512) and cell.dtype == BF16


def is_plain(cell: GpuCell) -> bool:
    """One layer of LSTM in one direction, not ragged."""
    return (cell.mode, cell.directions, cell.layers, cell.ragged) == ("LSTM", 1, 1, False)


def cells_of(row: Row, grid: str) -> list[Cell]:
    """The cells of a row that "full", "quick" or "tiny" keeps; tiny ones of a row are its first,
    with sizes that show that the suite works."""
    if grid == "tiny":
        return [replace(row.cells[0], B=3, T=5, H=16)]
    if grid == "quick":
        return [c for c in row.cells if isinstance(c, GpuCell) and is_quick(c)]
    return list(row.cells)


def cases(grid: str, keys: list[str] | None, part: tuple[int, int]) -> list[tuple[Row, Cell]]:
    """Rows with cells: of all rows or those named, slice i of n, every n-th from the i-th on."""
    chosen = [row for row in ROWS if not keys or row.key in keys]
    found = [(row, cell) for row in chosen for cell in cells_of(row, grid)]
    return found[part[0] - 1 :: part[1]]


def parse_slice(text: str) -> tuple[int, int]:
    """ "I/N" with I from 1 to N; a ValueError for anything else."""
    i, _, n = text.partition("/")
    if not (i.isdecimal() and n.isdecimal() and 1 <= int(i) <= int(n)):
        raise ValueError(f"--slice must be I/N with I from 1 to N, got {text!r}")
    return int(i), int(n)


def peers_of(row: Row, cell: Cell) -> list[str]:
    """Those of a row's peers that are not the same as another in this cell."""
    absent = {TF32, OURS_TF32} if cell.dtype != F32 else set()
    absent |= {HALF} if cell.dtype == F16 else set()
    return [peer for peer in row.peers if peer not in absent]


class CellLoop(torch.nn.LSTMCell):
    """An LSTM layer as one writes it from cells: (T, B, I) to y and the last states."""

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:  # pyright: ignore
        state, steps = None, []
        for x_t in x:
            state = super().forward(x_t, state)
            steps.append(state[0])
        if state is None:
            raise ValueError("x must have at least one step, got none")
        h, c = state
        return torch.stack(steps), (h[None], c[None])
