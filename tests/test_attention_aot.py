"""The attention kernels as they ship: launched by the real launchers, compiled for every target.

Nothing runs: the tensors are on the meta device, so that they may be of any size.
"""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels are Triton's")

from seqkern.kernels.attention_backward import attention_backward
from seqkern.kernels.attention_decode import attention_decode
from seqkern.kernels.attention_forward import attention_forward
from seqkern.kernels.attention_table import Config
from seqkern.kernels.decode_arguments import LEVELS, LEVELS_FP32
from triton.runtime.errors import OutOfResources

from tests.offline.aot import Budget, gate, report
from tests.offline.driver import Launch, pretend_gpu
from tests.offline.targets import Arch

bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
PRODUCTS = {"forward_kernel", "dq_kernel", "dkdv_kernel", "dbias_kernel"}


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


def launches_of(arch: Arch, call: Call, backward: bool = True, **more: Any) -> list[Launch]:
    """What the launchers launch for a call: the forward, and the backward with all gradients."""
    q, k, v = call.operands()
    arguments = call.arguments() | more
    with pretend_gpu(arch) as launches:
        o, lse = attention_forward(q, k, v, **arguments)
        if backward:
            grads = {"do": o, "dlse": None, "o": o, "lse": lse}
            needs = dict.fromkeys(("need_dq", "need_dkv", "need_dbias"), True)
            attention_backward(**grads, q=q, k=k, v=v, **arguments, **needs)
    return launches


# ---- every target


FORWARD = [
    (80, Call(64, bf16, ("causal",))),
    (89, Call(64, fp16, ("lengths",))),
    (90, Call(128, bf16, ("causal",))),
    (90, Call(64, fp16, ("bias", "lengths", "dropout"))),
    (90, Call(64, bf16, ("softcap", "sinks", "alibi", "window"))),
    (100, Call(128, bf16, ("causal",))),
]
BACKWARD = [
    (90, Call(64, bf16, ("causal",))),
    (100, Call(64, bf16, ("causal",))),
    ("gfx942", Call(64, bf16, ("causal",))),
]


def check_budgets(launches: list[Launch]) -> None:
    """Spills and serialised products in no kernel, the matrix unit at work in those with any."""
    for launch in launches:
        gate(report(launch), Budget(matrix="native" if launch.kernel in PRODUCTS else None))


@pytest.mark.parametrize(("arch", "call"), FORWARD, ids=str)
def test_forward_kernels_stay_within_their_budgets(arch, call):
    check_budgets(launches_of(arch, call, backward=False))


@pytest.mark.parametrize(("arch", "call"), BACKWARD, ids=str)
def test_backward_kernels_stay_within_their_budgets(arch, call):
    launches = launches_of(arch, call)
    names = [launch.kernel for launch in launches]
    assert names == ["forward_kernel", "delta_kernel", "dq_kernel", "dkdv_kernel"]
    check_budgets(launches)


def decode_launches(
    arch: Arch, D: int, dtype: torch.dtype, paged: bool = False, Tq: int = 1, splits: int = 4
) -> list[Launch]:
    """The decode of one sequence of 4096 places, in pages of 64 or in one piece."""
    cache = empty(64, 2, 64, D, dtype=dtype) if paged else empty(1, 2, 4096, D, dtype=dtype)
    table = empty(1, 64, dtype=torch.int32) if paged else None
    q, lengths = empty(1, 8, Tq, D, dtype=dtype), empty(1, dtype=torch.int32)
    rule = ("bottom_right", -1, -1, 0.0, D**-0.5, splits)
    with pretend_gpu(arch) as launches:
        attention_decode(q, cache, cache, lengths, table, None, None, *rule)
    return launches


DECODE = [
    *((90, level.row_bytes // 2, bf16, False) for level in LEVELS),
    *((90, level.row_bytes // 4, fp32, False) for level in LEVELS_FP32),
    *((arch, 128, fp16, False) for arch in (80, 89, 100, "gfx942")),
    (90, 128, bf16, True),
]


@pytest.mark.parametrize(("arch", "D", "dtype", "paged"), DECODE)
def test_decode_kernels_stay_within_their_budgets(arch, D, dtype, paged):
    decode, combine = decode_launches(arch, D, dtype, paged)
    # 16 rows are too few for the larger instructions.
    unit = "v_mfma" if arch == "gfx942" else "mma.sync"
    gate(report(decode), Budget(matrix=None if dtype == fp32 else unit))
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
    launches = launches_of(80, Call(16, bf16, ("mask",)), backward=False, config=SMALL)
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
