"""Builds the emulated kernels and launches them on CPU tensors, like the binding on CUDA ones."""

import ctypes
import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from seqkern.reference.cells import GATES

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
BUILD = ROOT / "build/simt"
MODES = list(GATES)
SKELETONS = ["block", "cluster", "grid"]
TYPES = {torch.float32: 0, torch.bfloat16: 2, torch.float16: 3, "tf32": 4}
Kind = torch.dtype | str
FLAGS = ["-O1", "-std=c++17", "-fno-strict-aliasing", "-Wall", "-Wextra", "-shared", "-fPIC"]


class _Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("bytes", ctypes.c_int64),
        ("writable", ctypes.c_int64),
    ]


class _Sizes(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int64)
        for name in [
            "T",
            "B",
            "H",
            "D",
            "N",
            "gx_row",
            "gx_direction",
            "seed",
            "skeleton",
            "groups",
            "blocks",
        ]
    ]


def build(source: Path) -> ctypes.CDLL:
    """The library of one file of tests/simt, compiled anew where anything it may read changed."""
    read = [*HERE.glob("*.h"), *(ROOT / "csrc/core").rglob("*.h"), source]
    read += (ROOT / "csrc/core/cuda").glob("*.cuh")
    digest = hashlib.sha256("\0".join(FLAGS).encode())
    for path in sorted(read):
        digest.update(path.read_bytes())
    target = BUILD / f"{source.stem}-{digest.hexdigest()[:16]}.so"
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:  # other workers of the same run wait here
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            for old in BUILD.glob(f"{source.stem}-*.so"):
                old.unlink()
            compiler = shutil.which(os.environ.get("CXX", "g++"))
            assert compiler, "the suite needs a C++ compiler, as the build does"
            part = target.with_suffix(".part")
            folders = [f"-I{ROOT / 'csrc'}", f"-I{HERE}"]
            command = [compiler, *FLAGS, *folders, str(source), "-o", str(part)]
            subprocess.run(command, check=True, timeout=300)
            part.rename(target)
    return ctypes.CDLL(str(target))


@functools.cache
def library() -> ctypes.CDLL:
    loaded = build(HERE / "kernels.cpp")
    for name in ("run_forward", "run_backward", "run_step", "run_step_backward"):
        function = getattr(loaded, name)
        function.restype = ctypes.c_char_p
    return loaded


def fits(mode: str, dtype: Kind, hidden: int, limit: int) -> bool:
    """Whether forward and backward fit a block with `limit` bytes of shared memory."""
    of = MODES.index(mode), TYPES[dtype]
    return bool(library().block_fits(*of, ctypes.c_int64(hidden), ctypes.c_int64(limit)))


class Plan(NamedTuple):
    """How a layer is spread over a card; `shared` in bytes of a block, `words` of a slice."""

    skeleton: str
    members: int
    groups: int
    warps: int
    shared: int
    words: int


def plans(
    mode: str, dtype: Kind, hidden: int, backward: bool, card: tuple[int, int, bool]
) -> list[Plan]:
    """The candidates for a card of (bytes of shared memory, multiprocessors, clusters)."""
    shared, blocks, clusters = card
    found, out = [], (ctypes.c_int64 * 6)()
    of = MODES.index(mode), TYPES[dtype], ctypes.c_int64(hidden), int(backward)
    on = ctypes.c_int64(shared), ctypes.c_int64(blocks), int(clusters)
    while library().plan_on(*of, *on, len(found), out):
        found.append(Plan(SKELETONS[out[0]], *out[1:]))
    return found


class Refused(AssertionError):
    """The emulator saw the kernel do what a GPU must not be asked to do."""


def poisoned(like: Tensor, *sizes: int) -> Tensor:
    return torch.full(sizes, float("nan"), dtype=like.dtype)


@dataclass(frozen=True)
class Emulator:
    """The launches of one schedule: threads in turn (seed 0), or in a drawn order.

    skeleton: "block", "cluster" or "grid"; the blocks of the latter two have 16 `groups` units, and
    as many of a grid as `blocks` run together.
    """

    seed: int = 0
    skeleton: str = "block"
    groups: int = 1
    blocks: int = 8

    def forward(
        self,
        gx: Tensor,
        batch_sizes: Tensor | None,
        h0: Tensor,
        c0: Tensor | None,
        w_hh: list[Tensor],
        b_ih: list[Tensor],
        b_hh: list[Tensor],
        mode: str,
        save: bool,
        tf32: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """seqkern::recurrent_block."""
        directions, batch, hidden = h0.shape
        n, lstm = gx.size(0), mode == "LSTM"
        y, h_n = poisoned(h0, n, directions * hidden), poisoned(h0, *h0.shape)
        c_n = poisoned(h0, *h0.shape) if lstm else h0.new_empty(0)
        gates = cells = h0.new_empty(0)
        if save and mode in ("LSTM", "GRU"):
            gates = poisoned(h0, directions, n, 4 * hidden)
        if save and lstm:
            cells = poisoned(h0, directions, n, hidden)
        rows = ragged_rows(batch_sizes, batch)
        inputs = [*_split(rows, batch), gx, h0, c0, *_pair(w_hh), *_pair(b_ih), *_pair(b_hh)]
        self._launch("run_forward", mode, tf32, h0, n, rows, inputs, [y, h_n, c_n, gates, cells])
        return y, h_n, c_n, gates, cells

    def backward(  # noqa: PLR0913 - the arguments of the op
        self,
        dy: Tensor | None,
        dh_n: Tensor | None,
        dc_n: Tensor | None,
        batch_sizes: Tensor | None,
        h0: Tensor,
        c0: Tensor | None,
        w_hh: list[Tensor],
        y: Tensor,
        gates: Tensor,
        cells: Tensor,
        mode: str,
        tf32: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """seqkern::recurrent_block_backward."""
        directions, batch, hidden = h0.shape
        columns = 1 if mode.startswith("RNN") else 4
        dg = poisoned(h0, directions, y.size(0), columns * hidden)
        dh0 = poisoned(h0, *h0.shape)
        dc0 = h0.new_empty(0) if c0 is None else poisoned(h0, *h0.shape)
        rows = ragged_rows(batch_sizes, batch)
        inputs = [*_split(rows, batch), h0, c0, *_pair(w_hh), y, gates, cells, dy, dh_n, dc_n]
        self._launch("run_backward", mode, tf32, h0, y.size(0), rows, inputs, [dg, dh0, dc0])
        return dg, dh0, dc0

    def step(
        self,
        gx: Tensor,
        gh: Tensor,
        b_ih: Tensor | None,
        b_hh: Tensor | None,
        h: Tensor,
        c: Tensor | None,
        y: Tensor,
        gates: Tensor | None,
        cells: Tensor | None,
        mode: str,
    ) -> None:
        """seqkern::recurrent_step."""
        sizes = [*h.shape, gx.stride(0), y.stride(0), self.seed]
        tensors = [gx, gh, b_ih, b_hh, h, c, y, gates, cells]
        _launch_step("run_step", mode, h.dtype, sizes, tensors, {4, 5, 6, 7, 8})

    def step_backward(  # noqa: PLR0913 - the arguments of the op
        self,
        dy: Tensor | None,
        sums: Tensor | None,
        dh: Tensor,
        dc: Tensor | None,
        gates: Tensor | None,
        cells: Tensor | None,
        before: Tensor | None,
        initial: Tensor | None,
        y: Tensor | None,
        dg: Tensor,
        dah: Tensor | None,
        mode: str,
    ) -> None:
        """seqkern::recurrent_step_backward."""
        rows = [0 if t is None else t.stride(0) for t in (dy, before, y)]
        counts = [0 if t is None else t.size(0) for t in (sums, before)]
        sizes = [*dh.shape, rows[0], counts[0], rows[1], counts[1], rows[2], self.seed]
        tensors = [dy, sums, dh, dc, gates, cells, before, initial, y, dg, dah]
        _launch_step("run_step_backward", mode, dg.dtype, sizes, tensors, {2, 3, 9, 10})

    def _launch(
        self,
        kernel: str,
        mode: str,
        tf32: bool,
        h0: Tensor,
        n: int,
        rows: Tensor | None,
        inputs: Sequence[Tensor | None],
        outputs: Sequence[Tensor],
    ) -> None:
        directions, batch, hidden = h0.shape
        steps = n // max(batch, 1) if rows is None else rows.numel() - batch
        width = GATES[mode] * hidden
        sizes = _Sizes(
            steps,
            batch,
            hidden,
            directions,
            n,
            directions * width,
            width,
            self.seed,
            SKELETONS.index(self.skeleton),
            self.groups,
            self.blocks,
        )
        tensors = [_tensor(t, False) for t in inputs] + [_tensor(t, True) for t in outputs]
        listed = (_Tensor * len(tensors))(*tensors)
        of = MODES.index(mode), TYPES["tf32" if tf32 else h0.dtype]
        message = getattr(library(), kernel)(*of, ctypes.byref(sizes), listed)
        if message:
            raise Refused(message.decode())


def _launch_step(
    kernel: str,
    mode: str,
    dtype: torch.dtype,
    sizes: list[int],
    tensors: list[Tensor | None],
    written: set[int],
) -> None:
    listed = (_Tensor * len(tensors))(*(_rows(t, i in written) for i, t in enumerate(tensors)))
    of = MODES.index(mode), TYPES[dtype], (ctypes.c_int64 * len(sizes))(*sizes)
    if message := getattr(library(), kernel)(*of, listed):
        raise Refused(message.decode())


def ragged_rows(batch_sizes: Tensor | None, batch: int) -> Tensor | None:
    """(B + T,) int64: the length of every row, then the rows before every step."""
    if batch_sizes is None:
        return None
    lengths = (batch_sizes > torch.arange(batch)[:, None]).sum(1)
    return torch.cat([lengths, batch_sizes.cumsum(0) - batch_sizes])


def _split(rows: Tensor | None, batch: int) -> list[Tensor | None]:
    return [None, None] if rows is None else [rows[:batch], rows[batch:]]


def _pair(tensors: list[Tensor]) -> list[Tensor | None]:
    return [*tensors, None, None][:2]


def _rows(t: Tensor | None, writable: bool) -> _Tensor:
    """Of rows that may lie apart: all from the first to the end of the last."""
    if t is None or t.numel() == 0:
        return _Tensor(None, 0, 0)
    assert t.stride(-1) == 1 or t.size(-1) == 1
    count = sum(stride * (n - 1) for n, stride in zip(t.shape, t.stride(), strict=True)) + 1
    return _Tensor(t.data_ptr(), count * t.element_size(), writable)


def _tensor(t: Tensor | None, writable: bool) -> _Tensor:
    if t is None or t.numel() == 0:
        return _Tensor(None, 0, 0)
    assert t.is_contiguous()
    return _Tensor(t.data_ptr(), t.numel() * t.element_size(), writable)
