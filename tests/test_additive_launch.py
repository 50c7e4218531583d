"""The additive attention launchers before they launch: what they refuse, and the table."""

import dataclasses
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="the kernels are Triton's")

from seqkern.kernels import additive_attention as kernels
from seqkern.kernels.additive_table import MAX_WIDTH, Config, choose

from seqkern.ops import _additive_ops as ops

fp32, fp16, bf16 = torch.float32, torch.float16, torch.bfloat16
SMALL = Config(16, 2, 16, ptx=False)


ROWS = torch.zeros(2, 5, 8)
GOOD = {
    **{"query": ROWS, "key": torch.zeros(2, 6, 8), "value": torch.zeros(2, 6, 3)},
    **{"v": torch.zeros(8), "mask": None, "bias": None, "k_lens": None, "scale": 1.0},
}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"query": None}, TypeError, "query must be a Tensor, got NoneType"),
        ({"query": ROWS.double()}, ValueError, r"query must be fp16, bf16 or fp32 .*float64"),
        ({"query": ROWS[0]}, ValueError, r"query must be \(B, T, D\), got \(5, 8\)"),
        ({"key": ROWS.half()}, ValueError, "key must be torch.float32 on cpu like query"),
        ({"key": ROWS[..., :7]}, ValueError, r"key must be .*\(2, Tk, 8\) .*got \(2, 5, 7\)"),
        ({"value": ROWS}, ValueError, r"value must be .*\(2, 6, Dv\) .*got \(2, 5, 8\)"),
        ({"value": torch.zeros(2, 6, 0)}, ValueError, "value must be of 1 to 65536 elements"),
        ({"v": torch.zeros(7)}, ValueError, r"v must be \(D,\) = \(8,\) .*got \(7,\)"),
        ({"v": ROWS}, ValueError, r"v must be \(D,\), got \(2, 5, 8\)"),
        ({"mask": torch.zeros(2, 5, 6)}, ValueError, "mask must be torch.bool"),
        ({"mask": torch.zeros(5, 6).bool()}, ValueError, r"mask must be .*\(2, 5, 6\), each 1"),
        ({"bias": torch.zeros(2, 4, 6)}, ValueError, r"bias must be .*got \(2, 4, 6\)"),
        ({"bias": torch.zeros(2, 5, 6).half()}, ValueError, "bias must be .*float32.*float16"),
        ({"bias": 1.0}, TypeError, "bias must be a Tensor or None, got float"),
        ({"k_lens": torch.zeros(2)}, ValueError, r"k_lens must be \(2,\) of torch.int32"),
        ({"k_lens": torch.zeros(3).int()}, ValueError, r"k_lens must be \(2,\).*\(3,\)"),
        ({"scale": float("nan")}, ValueError, "scale must be finite, got nan"),
    ],
)
def test_bad_arguments_are_refused_by_name(changes, error, message) -> None:
    with pytest.raises(error, match=f"^additive_attention: .*{message}"):
        kernels.additive_attention(*(GOOD | changes).values(), False, config=SMALL)


def test_bad_gradients_are_refused_by_name() -> None:
    o, lse = torch.zeros(2, 5, 3), torch.zeros(2, 5)
    good = {"do": o, "dweights": None, "dlse": None, "o": o, "lse": lse}
    wrong = {"do": ROWS, "dweights": o, "dlse": lse[:1], "o": o.half(), "lse": lse.double()}
    for name, t in wrong.items():
        with pytest.raises(ValueError, match=f"^additive_attention_backward: {name} must be"):
            kernels.additive_attention_backward(
                *(good | {name: t}).values(), *GOOD.values(), *[True] * 5, config=SMALL
            )
    with pytest.raises(TypeError, match="do must be a Tensor, got NoneType"):
        kernels.additive_attention_backward(
            *(good | {"do": None}).values(), *GOOD.values(), *[True] * 5, config=SMALL
        )


def test_the_backward_refuses_tanh_by_hardware() -> None:
    o, lse = torch.zeros(2, 5, 3), torch.zeros(2, 5)
    hardware = dataclasses.replace(SMALL, tanh="hardware")
    with pytest.raises(ValueError, match=r"config.tanh must be .*, got 'hardware'"):
        kernels.additive_attention_backward(
            o, None, None, o, lse, *GOOD.values(), *[True] * 5, config=hardware
        )


# ---- the table ----------------------------------------------------------------------------


@pytest.mark.parametrize("target", [*(("cuda", a) for a in (80, 86, 90, 100)), ("hip", "gfx942")])
def test_the_table_has_a_row_for_every_call(target: tuple[str, Any]) -> None:
    for kernel in ("forward", "queries", "keys"):
        for dtype in (fp16, bf16, fp32):
            config = choose(kernel, dtype, target)
            assert config.ptx == (target[0] == "cuda")
            assert config.tanh == "shared"


def test_devices_that_triton_does_not_serve_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"compute capability 8.0 or later, got 7.5"):
        choose("forward", fp16, ("cuda", 75))


def test_the_op_takes_as_wide_rows_as_the_kernels() -> None:
    assert ops.MAX_WIDTH == MAX_WIDTH
