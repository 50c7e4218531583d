"""Wrong arguments into the raw decoder ops: they raise an ordinary exception, whatever comes, and
what they accept is computed without touching memory that is not theirs (`make asan`)."""

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from seqkern.ops import decoder as module
from seqkern.reference import decoder as reference
from seqkern.reference.cells import GATES
from seqkern.reference.recurrent import accumulation_dtype
from tests.fuzzing import outcome, spoilt_tensor

EXAMPLES = 200
FORWARD = reference.Arguments._fields
BACKWARD = ("ds", "dcontexts", "dweights", "dc_n", *reference.Saved._fields, *FORWARD)
NAMES = {
    "attention_decoder": FORWARD,
    "attention_decoder_inference": FORWARD,
    "attention_decoder_backward": BACKWARD,
}
KERNELS = {
    "attention_decoder": module._forward,
    "attention_decoder_inference": module._inference,
    "attention_decoder_backward": module._backward,
}


def correct_call(r: random.Random) -> dict[str, Any]:
    """Arguments of all three ops that belong together."""
    mode = r.choice(list(GATES))
    T, B, K, Tk = r.choice([1, 2, 4]), r.choice([0, 1, 3]), r.choice([0, 1, 3]), r.choice([0, 1, 6])
    H, A, C = (r.choice([1, 5, 16, 33]) for _ in range(3))
    dtype = r.choice([torch.float32, torch.float64, torch.bfloat16, torch.float16])
    N, G = B * K, GATES[mode] * H

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype)

    # Lengths are values, not sizes: any of them is clamped.
    lens = [r.choice([-5, 0, 1, 3, 6, 2**31 - 1]) for _ in range(B)]
    call: dict[str, Any] = {
        "gates_x": torch.randn(N, T, G).to(accumulation_dtype(dtype)),
        "h0": draw(N, H),
        "c0": draw(N, H) if mode == "LSTM" else None,
        "key": draw(B, Tk, A),
        "value": draw(B, Tk, C),
        "k_lens": torch.tensor(lens, dtype=torch.int32) if r.random() < 0.6 else None,
        "w_q": draw(A, H),
        "b_q": draw(A) if r.random() < 0.5 else None,
        "v": draw(A),
        "w_c": draw(G, C),
        "w_hh": draw(G, H),
        "b_hh": draw(G) if r.random() < 0.5 else None,
        "mode": mode,
    }
    s, contexts, weights, c_n, *kept = reference.attention_decoder(*call.values())
    call |= dict(zip(reference.Saved._fields, (s, contexts, weights, *kept), strict=True))
    given = {"ds": s, "dcontexts": contexts, "dweights": weights}
    call |= {name: torch.randn_like(t) if r.random() < 0.8 else None for name, t in given.items()}
    return call | {"dc_n": torch.randn_like(c_n) if mode == "LSTM" else None}


@pytest.mark.parametrize("op", NAMES)
@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1))
def test_kernel_and_reference_refuse_the_same_calls(op: str, seed: int) -> None:
    r = random.Random(seed)
    torch.manual_seed(seed)
    call = correct_call(r)
    for _ in range(r.choice([0, 1, 1, 1, 2])):
        name = r.choice(NAMES[op])
        if name == "mode":
            call[name] = r.choice([*GATES, "LSTM\0", "", "lstm", "x" * 5000])
        elif call[name] is None:
            call[name] = r.choice([call["h0"], call["v"]])
        else:
            call[name] = spoilt_tensor(r, call[name])
    arguments = [call[name] for name in NAMES[op]]
    kernel = outcome(getattr(torch.ops.seqkern, op).default, arguments)
    if not any(isinstance(t, Tensor) and t.device.type == "meta" for t in arguments):
        assert kernel == outcome(KERNELS[op], arguments)
