"""What the additive attention launchers do before a launch: checks of the arguments, and the form
in which the kernels take them."""
# pyright: reportCallIssue=false
# (a kernel is called with options that are no parameters)

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .additive_table import MAX_WIDTH, Config, choose
from .additive_tile import Tokens, Vector, tokens_kernel
from .attention_arguments import (
    DTYPES,
    MAX_LENGTH,
    block_of,
    check_one_of,
    check_planes,
    dense,
    precision,
    refuse,
)
from .tile import Plane, View

# Arguments of the kernels that change from call to call: a kernel compiled for one value of them
# serves every other.
SIZES = ("scale", "n_tiles", "max_q", "max_k")


@dataclass(frozen=True)
class Build:
    """What a kernel is compiled for: a constant argument of it.

    Attributes:
        BLOCK_M, BLOCK_N: rows and columns of a tile, see additive_tile.
        BLOCK_C: elements of a value that a product takes at a time.
        BLOCK_E: elements of a key that gradients are summed for at a time.
        TANH, PTX: see additive_table.Config. I64: see tile.offsets.
        PRECISION: of fp32 products, "ieee" or "tf32".
    """

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_C: int
    BLOCK_E: int
    TANH: str
    PTX: bool
    I64: bool
    PRECISION: str


@dataclass(frozen=True)
class Arguments:
    """The arguments of seqkern::additive_attention, checked; k_lens is contiguous."""

    query: Tensor
    key: Tensor
    value: Tensor
    v: Tensor
    mask: Tensor | None
    bias: Tensor | None
    k_lens: Tensor | None
    scale: float

    @property
    def B(self) -> int:
        return self.query.size(0)

    @property
    def Tq(self) -> int:
        return self.query.size(1)

    @property
    def Tk(self) -> int:
        return self.key.size(1)

    @property
    def D(self) -> int:
        return self.query.size(2)

    @property
    def DV(self) -> int:
        return self.value.size(2)

    def config(self, kernel: str) -> Config:
        """What the table has for this call of a kernel, on the active device."""
        return choose(kernel, self.query.dtype)

    def build(self, config: Config, *more: Tensor, planes: tuple[Plane | None, ...] = ()) -> Build:
        """What to compile a kernel for; `more` and `planes` are what it addresses besides."""
        return Build(
            config.block_m,
            config.block_n,
            min(config.block_c, block_of(self.DV)),
            config.block_n // 2,
            config.tanh,
            config.ptx,
            self.needs_int64(*more, planes=planes),
            precision(self.query),
        )

    def common(self) -> dict[str, Any]:
        """The arguments that all kernels take."""
        return {
            "q": view(self.query),
            "k": view(self.key),
            "mask": plane(self.mask),
            "bias": plane(self.bias),
            "k_lens": self.k_lens,
            "scale": self.scale,
            "max_q": self.Tq,
            "max_k": self.Tk,
            "D": self.D,
            "DV": self.DV,
        }

    def tokens(self, *configs: Config, plain: bool = False) -> dict[str, Any]:
        """The exponentials of queries and keys, padded to whole tiles of the kernels, and v."""
        block = max(max(config.block_m, config.block_n) for config in configs)
        tanh = configs[0].tanh
        v = torch.empty(padded(self.D), dtype=torch.float32, device=self.v.device)
        return {
            "queries": tokens_of(self.query, None, block, plain, tanh, self.v, v),
            "keys": tokens_of(self.key, self.k_lens, block, plain, tanh),
            "v": v,
        }

    def needs_int64(self, *more: Tensor, planes: tuple[Plane | None, ...] = ()) -> bool:
        """Whether an offset within one element of the batch can pass 31 bits."""
        rows = [(self.Tq, self.query), (self.Tk, self.key), (self.Tk, self.value)]
        rows += [(max(self.Tq, self.Tk), t) for t in more]
        far = [(n + 128) * t.stride(1) + (t.size(2) + 1024) * t.stride(2) for n, t in rows]
        all_planes = plane(self.mask), plane(self.bias), *planes
        far += [(self.Tq + 128) * p.i + (self.Tk + 128) * p.j for p in all_planes if p]
        return max(far) >= 2**31


def view(t: Tensor) -> View:
    """A tensor (B, T, D) as the kernels take it."""
    b, t_, d = t.stride()
    return View(t, b, 0, t_, d)


def plane(t: Tensor | None) -> Plane | None:
    """A mask or a bias (B, Tq, Tk) as the kernels take it; a boolean one as bytes."""
    if t is None:
        return None
    b, i, j = (0 if n == 1 else stride for n, stride in zip(t.shape, t.stride()))
    return Plane(t.view(torch.uint8) if t.dtype == torch.bool else t, b, 0, i, j)


def padded(width: int) -> int:
    """The elements of a row of exponentials."""
    return -(-width // 16) * 16


def tokens_of(
    x: Tensor, lens: Tensor | None, block: int, plain: bool, tanh: str,
    v: Tensor | None = None, padded_v: Tensor | None = None,
) -> Tokens:  # fmt: skip
    """The Tokens of x (B, T, D), whose number is padded to whole blocks; fills padded_v by v."""
    B, T, D = x.shape
    TP, DP = -(-T // block) * block, padded(D)
    options: dict[str, Any] = {"dtype": torch.float32, "device": x.device}
    turned = torch.empty(B, DP, TP, **options)
    rows = torch.empty(B, TP, DP, **options) if plain else None
    reach = torch.empty(B, TP, **options)
    n_tiles = -(-TP // 32)
    if turned.numel():
        tokens_kernel[(B * n_tiles,)](
            x=view(x),
            v=None if v is None else Vector(v, v.stride(0)),
            lens=lens,
            turned=turned,
            plain=rows,
            reach=reach,
            padded=padded_v,
            n_tiles=n_tiles,
            longest=T,
            TP=TP,
            D=D,
            DP=DP,
            BLOCK_T=32,
            BLOCK_D=64,
            HARDWARE=tanh == "hardware",
            num_warps=4,
        )
    return Tokens(turned, rows if plain else turned, reach, TP, DP)


# ---- checks -------------------------------------------------------------------------------


def check(op: str, query, key, value, v, mask, bias, k_lens, scale) -> Arguments:
    """Checks the arguments of seqkern::additive_attention.

    Raises:
        TypeError: an argument is no tensor.
        ValueError: a rank, size, dtype, device or value does not fit; fp64 is refused.
    """
    for name, t in {"query": query, "key": key, "value": value}.items():
        _check_operand(op, name, t, query, 3)
    _check_operand(op, "v", v, query, 1)
    B, Tq, D = query.shape
    Tk = key.size(1)
    if tuple(key.shape) != (B, Tk, D):
        refuse(op, "key", f"(B, Tk, D) = ({B}, Tk, {D}) to suit query", tuple(key.shape))
    if tuple(value.shape[:2]) != (B, Tk):
        refuse(op, "value", f"(B, Tk, Dv) = ({B}, {Tk}, Dv) to suit key", tuple(value.shape))
    if v.size(0) != D:
        refuse(op, "v", f"(D,) = ({D},) to suit query", tuple(v.shape))
    if max(Tq, Tk) >= MAX_LENGTH:
        refuse(op, "query, key", f"of fewer than {MAX_LENGTH} tokens", (Tq, Tk))
    check_planes(op, mask, bias, query, "B, Tq, Tk", (B, Tq, Tk))
    if k_lens is not None:
        check_one_of(op, "k_lens", k_lens, query, [(B,)], (torch.int32,))
    if not math.isfinite(scale):
        refuse(op, "scale", "finite", scale)
    return Arguments(query, key, value, v, mask, bias, dense(k_lens), float(scale))


def _check_operand(op: str, name: str, t: Tensor, like: Tensor, rank: int) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{op}: {name} must be a Tensor, got {type(t).__name__}")
    if t.dim() != rank:
        refuse(op, name, "(D,)" if rank == 1 else "(B, T, D)", tuple(t.shape))
    if t.dtype not in DTYPES:
        refuse(op, name, "fp16, bf16 or fp32 (the reference serves fp64)", t.dtype)
    if t.dtype != like.dtype or t.device != like.device:
        refuse(op, name, f"{like.dtype} on {like.device} like query", f"{t.dtype} on {t.device}")
    if not 1 <= t.size(-1) <= MAX_WIDTH:
        expected = f"of 1 to {MAX_WIDTH} elements a row, which a block holds"
        refuse(op, name, expected, tuple(t.shape))


def check_gradients(op: str, call: Arguments, do, dweights, dlse, o, lse) -> None:
    """Checks what the backward takes besides the forward's arguments."""
    rows, dtype = (call.B, call.Tq), call.query.dtype
    expected = {
        "do": (do, (*rows, call.DV), dtype),
        "o": (o, (*rows, call.DV), dtype),
        "lse": (lse, rows, torch.float32),
    }
    if dweights is not None:
        expected["dweights"] = dweights, (*rows, call.Tk), dtype
    if dlse is not None:
        expected["dlse"] = dlse, rows, torch.float32
    for name, (t, shape, kind) in expected.items():
        check_one_of(op, name, t, call.query, [shape], (kind,))
