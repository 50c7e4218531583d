"""What the attention launchers do before a launch: checks of the arguments, and the form in which
the kernels take them."""

import contextlib
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime import _allocation

from .attention_table import Config, choose
from .tile import Plane, Row, Rule, View

DTYPES = torch.float16, torch.bfloat16, torch.float32
MAX_HEAD_DIM = 512
MAX_LENGTH = 2**29
# Half of the smallest second-level cache of the devices with a row in the table, 40 MB.
CACHE_BYTES = 20 * 2**20

# Arguments of the kernels that change from call to call: a kernel compiled for one value of them
# serves every other.
SIZES = (
    *("threshold", "gain", "left", "right", "n_heads", "group", "max_q", "max_k"),
    *("q_rows", "k_rows", "n_tiles", "section", "pairs"),
)


@dataclass(frozen=True)
class Build:
    """What a kernel is compiled for: a constant argument of it.

    Attributes:
        D, DV: head dimensions, in blocks BLOCK_D, BLOCK_DV.
        BLOCK_M, BLOCK_N: queries and keys of a tile. STAGES: of the pipeline of loads.
        TOP_LEFT: query i stands at key i, else the last query at the last key.
        RAW: see tile_product. I64: see offsets. DESCRIPTORS: see source.
        PRECISION: of fp32 products, "ieee" or "tf32".
    """

    D: int
    DV: int
    BLOCK_D: int
    BLOCK_DV: int
    BLOCK_M: int
    BLOCK_N: int
    STAGES: int
    TOP_LEFT: bool
    RAW: bool
    I64: bool
    DESCRIPTORS: bool
    PRECISION: str


@dataclass(frozen=True)
class Arguments:
    """The arguments of seqkern::attention, checked.

    Attributes:
        q_lens, k_lens, sinks, cu_q, cu_k: contiguous, as the kernels read them.
        B, H, Hkv, Tq, Tk, D, DV: sizes; Tq and Tk are max_q and max_k when packed.
        left, right: the window with causal folded in, None where unbounded.
        top_left: query i stands at key position i.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    bias: Tensor | None
    q_lens: Tensor | None
    k_lens: Tensor | None
    slopes: Tensor | None
    sinks: Tensor | None
    seed: Tensor | None
    cu_q: Tensor | None
    cu_k: Tensor | None
    left: int | None
    right: int | None
    top_left: bool
    softcap: float
    dropout_p: float
    scale: float
    B: int
    H: int
    Hkv: int
    Tq: int
    Tk: int
    D: int
    DV: int

    @property
    def packed(self) -> bool:
        return self.cu_q is not None

    def view(self, t: Tensor) -> View:
        """Any (B, H, T, D) or packed (N, H, D) tensor as the kernels take it."""
        b, h, t_, d = self.strides(t)
        return View(t, b, h, t_, d)

    def strides(self, t: Tensor) -> tuple[int, ...]:
        """Strides of b, h, t, d of a dense or a packed tensor; 0 where the size is 1."""
        if self.packed:
            n, h, d = t.stride()
            return 0, h, n, d
        return t.stride()

    def row(self, t: Tensor) -> Row:
        """A contiguous (B, H, Tq) or packed (H, Nq) tensor: a number for each query."""
        b, h = (0, t.stride(0)) if self.packed else t.stride()[:2]
        return Row(t, b, h)

    def new_output(self, like: Tensor, width: int) -> Tensor:
        """Room for `width` numbers for each row of `like`, zero where no sequence is sure to
        write; in memory (B, T, H, width) where `like` is, so that joining heads costs no copy."""
        options: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
        if self.packed:
            return torch.zeros(*like.shape[:-1], width, **options)
        B, H, T, _ = like.shape
        if like.stride(1) < like.stride(2):
            return torch.empty(B, T, H, width, **options).transpose(1, 2)
        return torch.empty(B, H, T, width, **options)

    def new_rows(self, value: float) -> Tensor:
        """Room for an fp32 number for each query, `value` where no sequence is sure to write."""
        if self.packed:
            shape = self.H, self.q.size(0)
            return torch.full(shape, value, dtype=torch.float32, device=self.q.device)
        shape = self.B, self.H, self.Tq
        return torch.empty(shape, dtype=torch.float32, device=self.q.device)

    @functools.cached_property
    def common(self) -> dict[str, Any]:
        """The arguments that all kernels of the forward and the backward take."""
        return {
            "q": self.view(self.q),
            "k": self.view(self.k),
            "v": self.view(self.v),
            "mask": plane(self.mask),
            "bias": plane(self.bias),
            "q_lens": self.q_lens,
            "k_lens": self.k_lens,
            "cu_q": self.cu_q,
            "cu_k": self.cu_k,
            "slopes": slopes_of(self.slopes),
            "rule": rule_of(self.softcap, self.scale),
            "seed": self.seed,
            "threshold": int(self.dropout_p * 2**32) if self.seed is not None else None,
            "gain": 1 / (1 - self.dropout_p) if self.seed is not None else None,
            "left": self.left,
            "right": self.right,
            "n_heads": self.H,
            "group": self.H // self.Hkv,
            "max_q": self.Tq,
            "max_k": self.Tk,
            "q_rows": self.q.size(0) if self.packed else 0,
            "k_rows": self.k.size(0) if self.packed else 0,
        }

    def build(
        self, config: Config, *operands: Tensor, planes: tuple[Plane | None, ...] = ()
    ) -> Build:
        """What to compile a kernel for.

        Args:
            operands: the (B, H, T, D) tensors that it reads or writes besides q, k and v.
            planes: what it reads or writes besides mask and bias.
        """
        return Build(
            self.D,
            self.DV,
            block_of(self.D),
            block_of(self.DV),
            config.block_m,
            config.block_n,
            config.num_stages,
            self.top_left,
            self.raw,
            self.needs_int64(*operands, planes=planes),
            config.descriptors and self.descriptors_fit(self.q, self.k, self.v, *operands),
            precision(self.q),
        )

    @property
    def raw(self) -> bool:
        """Whether scores are products times a positive number and nothing else."""
        return self.softcap == 0 and self.bias is None and self.slopes is None and self.scale > 0

    @property
    def costly(self) -> bool:
        """Whether a score takes more than its place to tell: see attention_table.choose."""
        given = self.mask, self.bias, self.slopes, self.seed
        return self.softcap > 0 or any(t is not None for t in given)

    def config(self, kernel: str) -> Config:
        """What the table has for this call of a kernel, on the active device."""
        return choose(kernel, max(self.D, self.DV), self.q.dtype, costly=self.costly)

    def section(self, pairs: int, group: int) -> int:
        """How many (batch, head) pairs run side by side: their keys and values fit the cache.

        Args:
            pairs: of the whole call. group: consecutive pairs that share keys and values.
        """
        if self.right is None:
            return max(1, min(group, pairs))
        size = self.Tk * (self.D + self.DV) * self.q.element_size()
        return max(1, min(max(1, CACHE_BYTES // max(size, 1)) * group, pairs))

    def descriptors_fit(self, *tensors: Tensor) -> bool:
        """Whether the tensor memory accelerator can read rows of all these: contiguous rows, and
        addresses and strides of whole 16 bytes."""

        def fits(t: Tensor) -> bool:
            b, h, n, d = self.strides(t)
            whole = ((b | h | n) * t.element_size() | t.data_ptr()) % 16 == 0
            # A tensor that is expanded over heads or rows has strides of 0.
            return whole and d == 1 and h > 0 and n > 0

        return all(map(fits, tensors))

    def needs_int64(self, *more: Tensor, planes: tuple[Plane | None, ...] = ()) -> bool:
        """Whether an offset within one (batch, head) pair can pass 31 bits."""
        longest = max(self.Tq, self.Tk)
        far = [max(longest, 1) * t + MAX_HEAD_DIM * d for *_, t, d in map(self.strides, more)]
        far += [self.Tq * p.i + self.Tk * p.j for p in planes if p]
        return self._reach >= 2**31 or any(n >= 2**31 for n in far)

    @functools.cached_property
    def _reach(self) -> int:
        """The farthest offset within one pair of q, k, v, mask and bias."""
        reaches = [
            (self.Tq, self.strides(self.q)),
            (self.Tk, self.strides(self.k)),
            (self.Tk, self.strides(self.v)),
        ]
        far = [max(n, 1) * t + MAX_HEAD_DIM * d for n, (*_, t, d) in reaches]
        planes = self.common["mask"], self.common["bias"]
        far += [self.Tq * p.i + self.Tk * p.j for p in planes if p]
        return max(far)


def dense(t: Tensor | None) -> Tensor | None:
    """A tensor that kernels read one element after the other, whatever its strides were."""
    return None if t is None else t.contiguous()


def plane(t: Tensor | None) -> Plane | None:
    """A 4-D mask or bias as the kernels take it; a boolean one as bytes."""
    if t is None:
        return None
    strides = [0 if n == 1 else stride for n, stride in zip(t.shape, t.stride())]
    return Plane(t.view(torch.uint8) if t.dtype == torch.bool else t, *strides)


def slopes_of(t: Tensor | None) -> Row | None:
    """ALiBi's slopes (H,) or (B, H) as the kernels take them."""
    return None if t is None else Row(t, *(0, *t.stride())[-2:])


def rule_of(softcap: float, scale: float) -> Rule:
    """What takes products to scores; a softcap of 0 is none."""
    log2e = 1 / math.log(2)
    return Rule(scale / softcap, softcap * log2e) if softcap else Rule(scale * log2e, None)


def block_of(width: int) -> int:
    """The block that holds a head dimension: a power of two that a product can take."""
    return max(16, 1 << (width - 1).bit_length())


def precision(t: Tensor) -> str:
    """How products of fp32 are computed: as torch.matmul would, where the device can."""
    # allow_tf32 says the same, but raises after somebody has set fp32_precision.
    if t.dtype != torch.float32 or torch.backends.cuda.matmul.fp32_precision != "tf32":
        return "ieee"
    # Of AMD's targets Triton 3.6 takes TF32 for one alone.
    if torch.version.hip is not None:
        arch = torch.cuda.get_device_properties(t.device).gcnArchName
        return "tf32" if arch.split(":")[0] == "gfx942" else "ieee"
    return "tf32"


def on_device(t: Tensor) -> contextlib.AbstractContextManager:
    """Makes the tensor's device the current one for launches."""
    return torch.cuda.device(t.device) if t.is_cuda else contextlib.nullcontext()


@contextlib.contextmanager
def workspace(device: torch.device) -> Iterator[None]:
    """Gives kernels the memory in which they make their descriptors."""

    def allocate(size: int, alignment: int, stream: int | None) -> Tensor:
        return torch.empty(size, dtype=torch.int8, device=device)

    # Triton keeps it for all launches to come, and it may be the user's own.
    before = _allocation._allocator.get()
    triton.set_allocator(allocate)
    try:
        yield
    finally:
        triton.set_allocator(before)


# ---- checks -------------------------------------------------------------------------------


def refuse(op: str, name: str, expected: str, got: object) -> None:
    raise ValueError(f"{op}: {name} must be {expected}, got {got}")


def check(
    op, q, k, v, mask, bias, q_lens, k_lens, alibi_slopes, sinks, seed, cu_q, cu_k, causal,
    window_left, window_right, softcap, dropout_p, scale, max_q, max_k,
) -> Arguments:  # fmt: skip
    """Checks the arguments of seqkern::attention, all but `deterministic`.

    Raises:
        TypeError: an argument is no tensor.
        ValueError: a rank, size, dtype, device or value does not fit; fp64 is refused.
    """
    packed = cu_q is not None
    for name, t in {"q": q, "k": k, "v": v}.items():
        _check_operand(op, name, t, q, 3 if packed else 4)
    sizes = _sizes(op, q, k, v, cu_q, cu_k, max_q, max_k)
    B, H, Tq, Tk = sizes["B"], sizes["H"], sizes["Tq"], sizes["Tk"]
    check_planes(op, mask, bias, q, "B, H, Tq, Tk", (B, H, Tq, Tk))
    if packed and (q_lens is not None or k_lens is not None):
        raise ValueError(f"{op}: q_lens and k_lens must be None with cu_q, got lengths")
    if (seed is None) != (dropout_p == 0):
        refuse(op, "seed", f"{'a tensor' if dropout_p else 'None'} for dropout_p={dropout_p}", seed)
    fp32, int32 = (torch.float32,), (torch.int32,)
    optional = {
        "q_lens": (q_lens, [(B,)], int32),
        "k_lens": (k_lens, [(B,)], int32),
        "alibi_slopes": (alibi_slopes, [(H,), (B, H)], fp32),
        "sinks": (sinks, [(H,)], (q.dtype, torch.float32)),
        "seed": (seed, [(1,)], (torch.int64,)),
    }
    for name, (t, shapes, dtypes) in optional.items():
        if t is not None:
            check_one_of(op, name, t, q, shapes, dtypes)
    if causal not in (None, "top_left", "bottom_right"):
        refuse(op, "causal", "None, 'top_left' or 'bottom_right'", repr(causal))
    if not 0 <= dropout_p < 1:
        refuse(op, "dropout_p", "in [0, 1)", dropout_p)
    if not 0 <= softcap < math.inf:
        refuse(op, "softcap", "a finite number, positive or 0 for none", softcap)
    if not math.isfinite(scale):
        refuse(op, "scale", "finite", scale)
    if causal is not None:
        window_right = 0
    left, right = (None if not 0 <= w < Tq + Tk else w for w in (window_left, window_right))
    q_lens, k_lens, sinks, cu_q, cu_k = map(dense, (q_lens, k_lens, sinks, cu_q, cu_k))
    return Arguments(
        q, k, v, mask, bias, q_lens, k_lens, alibi_slopes, sinks, seed, cu_q, cu_k,
        left, right, causal == "top_left", softcap, dropout_p, scale, **sizes,
    )  # fmt: skip


def _check_operand(op: str, name: str, t: Tensor, q: Tensor, rank: int) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{op}: {name} must be a Tensor, got {type(t).__name__}")
    form = "(N, H, D) with cu_q" if rank == 3 else "(B, H, T, D)"
    if t.dim() != rank:
        refuse(op, name, form, tuple(t.shape))
    if t.dtype not in DTYPES:
        refuse(op, name, "fp16, bf16 or fp32 (the reference serves fp64)", t.dtype)
    if t.dtype != q.dtype or t.device != q.device:
        refuse(op, name, f"{q.dtype} on {q.device} like q", f"{t.dtype} on {t.device}")
    if not 1 <= t.size(-1) <= MAX_HEAD_DIM:
        refuse(op, name, f"of a head dimension in [1, {MAX_HEAD_DIM}]", tuple(t.shape))


def _sizes(op, q, k, v, cu_q, cu_k, max_q, max_k) -> dict[str, int]:
    if (cu_q is None) != (cu_k is None):
        raise ValueError(f"{op}: cu_q and cu_k must be given together, got one of them")
    if cu_q is not None:
        for name, cu in {"cu_q": cu_q, "cu_k": cu_k}.items():
            if cu.dim() != 1 or cu.size(0) < 1:
                refuse(op, name, "(B + 1,)", tuple(cu.shape))
            check_one_of(op, name, cu, q, [tuple(cu_q.shape)], (torch.int32,))
        B, form, kv = cu_q.size(0) - 1, "(Nk, Hkv, {})", tuple(k.shape[:2])
    else:
        B, form, kv = q.size(0), "(B, Hkv, Tk, {})", (q.size(0), *k.shape[1:3])
        if (max_q, max_k) != (q.size(2), k.size(2)):
            refuse(op, "max_q, max_k", f"{(q.size(2), k.size(2))}, Tq and Tk", (max_q, max_k))
    D, DV = q.size(-1), v.size(-1)
    if tuple(k.shape) != (*kv, D):
        refuse(op, "k", f"{form.format('D')} = {(*kv, D)} to suit q", tuple(k.shape))
    if tuple(v.shape) != (*kv, DV):
        refuse(op, "v", f"{form.format('Dv')} = {(*kv, DV)} to suit k", tuple(v.shape))
    H, Hkv = q.size(1), k.size(1)
    if Hkv == 0 or H % Hkv:
        refuse(op, "k", f"of a number of heads that divides the {H} of q", Hkv)
    if not (0 <= max_q < MAX_LENGTH and 0 <= max_k < MAX_LENGTH):
        refuse(op, "max_q, max_k", f"in [0, {MAX_LENGTH})", (max_q, max_k))
    return {"B": B, "H": H, "Hkv": Hkv, "Tq": max_q, "Tk": max_k, "D": D, "DV": DV}


def check_planes(op: str, mask, bias, q: Tensor, symbols: str, full: tuple[int, ...]) -> None:
    """Raises unless mask and bias, where given, broadcast to `full`, sizes that `symbols` names."""
    kinds = ("mask", mask, (torch.bool,)), ("bias", bias, (q.dtype, torch.float32))
    for name, t, dtypes in kinds:
        if t is None:
            continue
        if not isinstance(t, Tensor):
            raise TypeError(f"{op}: {name} must be a Tensor or None, got {type(t).__name__}")
        if t.dim() != len(full) or any(n not in (1, m) for n, m in zip(t.shape, full)):
            refuse(op, name, f"({symbols}) = {full}, each 1 or full", tuple(t.shape))
        if t.dtype not in dtypes or t.device != q.device:
            expected = f"{' or '.join(map(str, dtypes))} on {q.device}"
            refuse(op, name, expected, f"{t.dtype} on {t.device}")


def check_one_of(op: str, name: str, t: Tensor, like: Tensor, shapes, dtypes) -> None:
    """Raises unless t has one of the shapes and of the dtypes, on the device of `like`."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{op}: {name} must be a Tensor, got {type(t).__name__}")
    if tuple(t.shape) not in shapes or t.dtype not in dtypes or t.device != like.device:
        kinds = " or ".join(map(str, dtypes))
        expected = f"{' or '.join(map(str, shapes))} of {kinds} on {like.device}"
        refuse(op, name, expected, f"{tuple(t.shape)} of {t.dtype} on {t.device}")


def check_gradients(
    op: str, call: Arguments, do: Tensor, dlse: Tensor | None, o: Tensor, lse: Tensor
) -> None:
    """Checks what the backward takes besides the forward's arguments."""
    q = call.q
    rows = (call.H, q.size(0)) if call.packed else (call.B, call.H, call.Tq)
    expected = {
        "do": (do, (*q.shape[:-1], call.DV), q.dtype),
        "o": (o, (*q.shape[:-1], call.DV), q.dtype),
        "lse": (lse, rows, torch.float32),
        "dlse": (dlse, rows, torch.float32),
    }
    for name, (t, shape, dtype) in expected.items():
        if t is not None:
            check_one_of(op, name, t, q, [shape], (dtype,))
