"""The attention kernels as they ship: launched by the real launchers, compiled for every target.

Nothing runs: the tensors are on the meta device, so that they may be of any size.
"""

import itertools
import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels are Triton's")

from seqkern.kernels.attention_backward import attention_backward
from seqkern.kernels.attention_decode import attention_decode
from seqkern.kernels.attention_forward import attention_forward
from seqkern.kernels.attention_table import Config, rows_of
from seqkern.kernels.decode_arguments import LEVELS, LEVELS_FP32, Level
from triton.runtime.errors import OutOfResources

from tests.offline.aot import Budget, gate, report
from tests.offline.driver import Launch, pretend_gpu
from tests.offline.targets import Arch, target_of

bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32


def empty(*shape: int, dtype: torch.dtype = fp32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@dataclass(frozen=True)
class Call:
    """Sizes and features of one call of the op."""

    D: int = 128
    dtype: torch.dtype = bf16
    features: tuple[str, ...] = ()
    B: int = 2
    H: int = 4
    Hkv: int = 2
    T: int = 512

    def operands(self) -> tuple[Tensor, Tensor, Tensor]:
        heads = self.H, self.Hkv, self.Hkv
        q, k, v = (empty(self.B, h, self.T, self.D, dtype=self.dtype) for h in heads)
        return q, k, v

    def arguments(self) -> dict[str, Any]:
        """The op's arguments after q, k and v, by name."""
        B, H, T = self.B, self.H, self.T
        lengths = empty(B, dtype=torch.int32)
        chosen = {
            "causal": {"causal": "top_left"},
            "window": {"window_left": 100, "window_right": 50},
            "lengths": {"q_lens": lengths, "k_lens": lengths},
            "mask": {"mask": empty(B, 1, T, T, dtype=torch.bool)},
            "bias": {"bias": empty(1, H, T, T, dtype=self.dtype)},
            "alibi": {"alibi_slopes": empty(H)},
            "sinks": {"sinks": empty(H)},
            "softcap": {"softcap": 30.0},
            "dropout": {"dropout_p": 0.1, "seed": empty(1, dtype=torch.int64)},
        }
        names = [
            "mask",
            "bias",
            "q_lens",
            "k_lens",
            "alibi_slopes",
            "sinks",
            "seed",
            "cu_q",
            "cu_k",
            "causal",
        ]
        arguments = dict.fromkeys(names)
        arguments |= {"window_left": -1, "window_right": -1, "softcap": 0.0, "dropout_p": 0.0}
        arguments |= {"scale": self.D**-0.5, "max_q": T, "max_k": T, "deterministic": True}
        for feature in self.features:
            arguments |= chosen[feature]
        return arguments

    def __str__(self) -> str:
        return "-".join([str(self.D), str(self.dtype)[6:], *self.features])


def launches_of(arch: Arch, call: Call, kernel: str = "forward", **more: Any) -> list[Launch]:
    """What the launchers launch for the forward, or for one gradient: "dq", "dkdv" or "dbias"."""
    q, k, v = call.operands()
    arguments = call.arguments() | more
    with pretend_gpu(arch) as launches:
        if kernel == "forward":
            attention_forward(q, k, v, **arguments)
        else:
            lse = empty(call.B, call.H, call.T)
            needs = {f"need_{name}": name.startswith(kernel[:2]) for name in ("dq", "dkv", "dbias")}
            attention_backward(q, None, q, lse, q, k, v, **arguments, **needs)
    return launches


# ---- every target

TARGETS = (80, 89, 90, 100, "gfx942")
# Bytes that a thread of a row stores and loads for lack of registers, where there are any.
SPILLS = {
    "80-dkdv-32-bfloat16": 8,
    "80-dkdv-64-bfloat16": 8,
    "89-dkdv-32-bfloat16": 8,
    "89-dbias-128-bfloat16": 40,
    "89-dbias-256-bfloat16": 36,
    "80-dbias-32-float32": 36,
    "80-dbias-256-float32": 36,
    "89-dbias-32-float32": 56,
    "89-dbias-64-float32": 48,
    "89-dbias-256-float32": 52,
    "90-dq-128-float32": 24,
    "90-dbias-64-float32": 48,
    "90-dbias-128-float32": 48,
    "90-dbias-256-float32": 68,
    "100-dq-128-float32": 16,
    "100-dbias-32-float32": 48,
    "100-dbias-64-float32": 56,
    "100-dbias-128-float32": 12,
    "100-dbias-256-float32": 68,
}


@dataclass(frozen=True)
class Shipped:
    """A row of the launch tables on one target."""

    arch: Arch
    kernel: str
    width: int
    dtype: torch.dtype

    @property
    def budget(self) -> Budget:
        spilled = SPILLS.get(str(self), 0)
        if self.dtype == fp32:
            return Budget(spill_bytes=spilled, matrix=None)
        # Wider heads leave tiles of fewer rows than the newest instructions take.
        return Budget(spill_bytes=spilled, matrix="native" if self.width <= 128 else "any")

    @property
    def frequent(self) -> bool:
        """Whether the row is compiled in every run of the tests; the others are a sweep's."""
        if self.arch in (89, "gfx942"):
            return (self.kernel, self.width, self.dtype) == ("forward", 64, bf16)
        return True

    def __str__(self) -> str:
        return f"{self.arch}-{self.kernel}-{self.width}-{str(self.dtype)[6:]}"


def shipped() -> list[Any]:
    """Every row of the tables, on every target whose row it is."""
    rows = []
    for target, dtype in itertools.product(map(target_of, TARGETS), (bf16, fp32)):
        for kernel, widths in rows_of(target.backend, target.arch, dtype).items():
            rows += [Shipped(target.arch, kernel, width, dtype) for width in widths]
    return [pytest.param(r, marks=() if r.frequent else pytest.mark.sweep) for r in rows]


def without_products(arch: Arch) -> Budget:
    """Of the kernels beside a row's own: sums over rows, lists of tiles."""
    # ptxas 12.9 keeps a few values of sums of rows in memory, with registers to spare.
    return Budget(spill_bytes=32 if arch == 100 else 0, matrix=None)


@pytest.mark.parametrize("row", shipped(), ids=str)
def test_shipped_rows_stay_within_their_budgets(row):
    features = ("causal", "lengths", *(("bias",) if row.kernel == "dbias" else ()))
    launches = launches_of(row.arch, Call(row.width, row.dtype, features), row.kernel)
    assert {launch.kernel for launch in launches} - {"delta_kernel"} == {f"{row.kernel}_kernel"}
    for launch in launches:
        beside = launch.kernel == "delta_kernel"
        gate(report(launch), without_products(row.arch) if beside else row.budget)


COSTLY = [
    (90, "forward", ("bias", "alibi", "dropout"), Budget()),
    (90, "forward", ("softcap", "sinks", "window"), Budget()),
    (90, "forward", ("mask",), Budget()),
    (90, "dq", ("mask",), Budget()),
    (90, "dkdv", ("mask", "dropout"), Budget()),
    (80, "forward", ("mask",), Budget()),
    (80, "dq", ("bias", "softcap"), Budget()),
    (80, "dkdv", ("mask", "dropout"), Budget(spill_bytes=48)),
    (100, "forward", ("bias", "alibi", "dropout"), Budget()),
    (100, "forward", ("mask",), Budget()),
    (100, "dq", ("mask",), Budget()),
    (100, "dkdv", ("mask", "dropout"), Budget(spill_bytes=56)),
]


@pytest.mark.parametrize(("arch", "kernel", "features", "budget"), COSTLY)
def test_features_stay_within_their_budgets(arch, kernel, features, budget):
    *beside, launch = launches_of(arch, Call(128, bf16, features), kernel)
    assert ("mask" in features) == ("live_kernel" in {other.kernel for other in beside})
    gate(report(launch), budget)
    for other in beside:
        gate(report(other), without_products(arch))


def test_a_mask_is_copied_ahead_and_the_softmax_computed_once():
    """A load behind the product makes Triton compute the softmax in two layouts, and a condition
    along the keys makes each load one byte."""
    launch = launches_of(90, Call(128, bf16, ("mask",)))[-1]
    text = report(launch).kernel.asm["ptx"]
    # Two loops, over whole tiles and the last one: 128 x 64 scores of 256 threads, and the decay.
    exponentials = len(re.findall(r"ex2\.approx", text))
    assert 2 * 32 <= exponentials <= 2 * 32 + 8
    assert re.search(r"cp\.async\.c[ag]\.shared\.global [^;]*, 0x(8|10),", text)
    # Of three stages the list of tiles takes none: a tile's mask is still under way while that of
    # the one before is waited for.
    assert re.search(r"ttg\.async_wait [^\n]*\{num = 1 ", report(launch).kernel.asm["ttgir"])


def decode_launches(
    arch: Arch,
    D: int,
    dtype: torch.dtype,
    paged: bool = False,
    Tq: int = 1,
    splits: int = 4,
    H: int = 8,
) -> list[Launch]:
    """The decode of one sequence of 4096 places, in pages of 64 or in one piece."""
    cache = empty(64, 2, 64, D, dtype=dtype) if paged else empty(1, 2, 4096, D, dtype=dtype)
    table = empty(1, 64, dtype=torch.int32) if paged else None
    q, lengths = empty(1, H, Tq, D, dtype=dtype), empty(1, dtype=torch.int32)
    rule = ("bottom_right", -1, -1, 0.0, D**-0.5, splits)
    with pretend_gpu(arch) as launches:
        attention_decode(q, cache, cache, lengths, table, None, None, *rule)
    return launches


# As SPILLS.
DECODE_SPILLS = {
    "80-32-float32-16-paged-unaligned": 8,
    "80-512-float32-16": 56,
    "80-512-float32-16-paged": 8,
    "90-512-float32-16": 64,
    "90-512-float32-16-paged": 48,
    "100-64-float32-16-paged-unaligned": 16,
}


@dataclass(frozen=True)
class Decode:
    """A row of the decode's launch table on one target.

    aligned: whether keys and values start at multiples of 16 bytes; else their rows are an element
        shorter. rows: of queries in a tile.
    """

    arch: Arch
    level: Level
    dtype: torch.dtype
    paged: bool = False
    aligned: bool = True
    rows: int = 16

    @property
    def budget(self) -> Budget:
        # 16 rows are too few for the larger instructions.
        unit = "v_mfma" if self.arch == "gfx942" else "mma.sync"
        spilled = DECODE_SPILLS.get(str(self), 0)
        return Budget(spill_bytes=spilled, matrix=None if self.dtype == fp32 else unit)

    @property
    def frequent(self) -> bool:
        """As Shipped.frequent: every level, in the layout of most keys and in one of others."""
        usual = self.aligned and not self.paged
        other = {80: self.paged and not self.aligned, 90: self.paged and self.aligned}
        return self.rows == self.most_rows and (usual or other.get(self.arch, False))

    @property
    def most_rows(self) -> int:
        return 32 if self.aligned and self.dtype != fp32 else 16

    def __str__(self) -> str:
        layout = ["paged"] * self.paged + ["unaligned"] * (not self.aligned)
        size = self.level.row_bytes // self.dtype.itemsize
        return "-".join(map(str, [self.arch, size, str(self.dtype)[6:], self.rows, *layout]))


def decodes() -> list[Any]:
    levels = [*((level, bf16) for level in LEVELS), *((level, fp32) for level in LEVELS_FP32)]
    layouts = itertools.product((80, 90, 100), levels, (False, True), (True, False), (16, 32))
    rows = [Decode(arch, *of, *layout) for arch, of, *layout in layouts]
    rows = [row for row in rows if row.rows <= row.most_rows]
    rows += [Decode(89, LEVELS[1], bf16), Decode("gfx942", LEVELS[1], bf16, rows=32)]
    return [pytest.param(r, marks=() if r.frequent else pytest.mark.sweep) for r in rows]


@pytest.mark.parametrize("row", decodes(), ids=str)
def test_decode_kernels_stay_within_their_budgets(row):
    D = row.level.row_bytes // row.dtype.itemsize - (not row.aligned)
    # A query of as many heads as rows, which share a key head.
    decode, combine = decode_launches(row.arch, D, row.dtype, row.paged, H=2 * row.rows)
    assert decode.constants["BLOCK_M"] == row.rows
    assert (decode.constants["WIDE"] > 1) == row.aligned
    gate(report(decode), row.budget)
    gate(report(combine), Budget(matrix=None))


# ---- the launchers

SMALL = Config(64, 32, 2, 3)
ON_HOPPER = Config(64, 32, 4, 2, descriptors=True)


def forward(arch: Arch, config: Config, q: Tensor, k: Tensor, v: Tensor, **more: Any) -> Launch:
    """The launch of the forward kernel for these operands, (B, H, T, D)."""
    call = Call(D=q.size(3), B=q.size(0), H=q.size(1), T=q.size(2))
    with pretend_gpu(arch) as launches:
        attention_forward(q, k, v, **call.arguments() | more, config=config)
    return launches[-1]


def test_grid_and_options_are_the_configs():
    x = empty(3, 5, 100, 16, dtype=bf16)
    launch = forward(80, SMALL, x, x, x)
    assert (launch.kernel, launch.grid) == ("forward_kernel", (2 * 3 * 5, 1, 1))
    assert (launch.warps, launch.stages) == (2, 3)
    built = launch.constants["C"]
    assert (built.BLOCK_M, built.BLOCK_N, built.STAGES, built.D) == (64, 32, 3, 16)


def test_few_compiled_kernels_serve_all_lengths():
    def compiled(T: int) -> Any:
        x = empty(2, 4, T, 16, dtype=bf16)
        return forward(80, SMALL, x, x, x, window_left=T // 2, window_right=0).compiled

    # Triton tells apart whether the strides of lse, T and H T, are multiples of 16.
    assert compiled(17) is compiled(2**20 + 1)
    assert compiled(100) is compiled(2**20 + 4)
    assert compiled(112) is compiled(2**20)


@pytest.mark.parametrize(("T", "wide"), [(2**18, False), (2**19, True)])
def test_far_offsets_are_64_bits_wide(T, wide):
    x = empty(1, T, 256, 16, dtype=bf16).transpose(1, 2)
    built = forward(80, SMALL, x, x, x).constants["C"]
    assert wide == built.I64


def test_many_heads_need_no_wide_offsets():
    x = empty(2**12, 2**10, 64, 16, dtype=bf16)
    launch = forward(80, SMALL, x, x, x)
    assert not launch.constants["C"].I64
    assert launch.grid == (2**22, 1, 1)


@pytest.mark.parametrize(("T", "wide"), [(2**15, False), (2**16, True)])
def test_large_masks_are_addressed_by_64_bits(T, wide):
    x = empty(1, 1, T, 16, dtype=bf16)
    mask = empty(1, 1, T, T, dtype=torch.bool)
    built = forward(80, SMALL, x, x, x, mask=mask).constants["C"]
    assert wide == built.I64


def test_descriptors_only_where_rows_are_aligned():
    def described(k: Tensor, config: Config = ON_HOPPER) -> bool:
        launch = forward(90, config, x, k, x)
        found = report(launch).kernel.asm["ptx"].count("cp.async.bulk.tensor") > 0
        assert found == launch.constants["C"].DESCRIPTORS
        return found

    x = torch.empty(1, 2, 16, 16, dtype=bf16)
    assert described(x)
    assert described(x.transpose(1, 2).contiguous().transpose(1, 2))
    assert not described(x, SMALL)
    assert not described(torch.empty(1, 2, 16, 17, dtype=bf16)[..., :16]), "rows of 34 bytes"
    assert not described(torch.empty(1, 2, 16, 24, dtype=bf16)[..., 1:17]), "starts at byte 2"
    assert not described(x.mT), "columns"


def test_masked_calls_list_the_live_tiles_first():
    launches = launches_of(80, Call(16, bf16, ("mask",)), config=SMALL)
    assert [launch.kernel for launch in launches] == ["live_kernel", "forward_kernel"]
    assert launches[0].grid == (2 * 512 // 64, 1, 1)


def test_a_block_that_does_not_fit_is_refused():
    x = empty(1, 1, 256, 128, dtype=bf16)
    with pytest.raises(OutOfResources, match="shared memory"):
        forward(89, Config(64, 64, 4, 4), x, x, x)


def test_decode_reads_the_cache_once_for_all_heads_of_a_group():
    decode, combine = decode_launches(80, 64, bf16, Tq=3, splits=5)
    # 2 key heads, whose 4 query heads times 3 queries are one tile of 16 rows.
    assert decode.grid == (2, 5, 1)
    assert decode.constants["BLOCK_M"] == 16
    assert combine.grid == (8 * 3, 1, 1)


def test_decode_grid_depends_on_shapes_alone():
    grids = {decode_launches(80, 64, bf16, paged)[0].grid for paged in (False, True)}
    assert grids == {(2, 4, 1)}
