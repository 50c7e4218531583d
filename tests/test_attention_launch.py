"""The attention launchers before they launch: where and for what they compile, what they refuse,
and the table."""

import contextlib
import gc
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton", reason="the kernels are Triton's")

import triton
from seqkern.kernels import (
    additive_arguments,
    additive_attention,
    additive_backward,
    additive_bias_gradient,
    additive_gradients,
    additive_row_gradients,
    additive_table,
    attention_arguments,
    attention_bias_gradient,
)
from seqkern.kernels import attention_forward as forward
from seqkern.kernels.attention_arguments import Arguments, check, workspace
from seqkern.kernels.attention_backward import attention_backward
from seqkern.kernels.attention_forward import attention_forward
from seqkern.kernels.attention_table import Config, choose
from triton.runtime import _allocation

from seqkern.ops import _additive_ops, _attention_ops, decode
from tests.offline.interpreter import interpreted, poisoned_memory

fp32, fp16, bf16 = torch.float32, torch.float16, torch.bfloat16
SMALL = Config(16, 16)


def plain(q: Tensor, k: Tensor, **named: Any) -> tuple[Any, ...]:
    """The op's arguments in their order, for values that are the keys."""
    sizes = {"max_q": q.size(2), "max_k": k.size(2)}
    return (*(GOOD | {"q": q, "k": k, "v": k} | sizes | named).values(), True)


# ---- what is compiled ---------------------------------------------------------------------


def test_64_bits_are_used_where_32_would_not_do() -> None:
    def call(q: Tensor, **named: Tensor) -> Arguments:
        return check("attention", *plain(q, q, **named)[:-1])

    long = torch.empty(1, 1, 2**16, 8, device="meta")
    assert not call(long).needs_int64()
    assert call(long.as_strided(long.shape, (1, 1, 2**15, 1))).needs_int64()
    mask = torch.empty(1, 1, 2**16, 2**16, dtype=torch.bool, device="meta")
    assert call(long, mask=mask).needs_int64()
    assert not call(long, mask=mask[:, :, :1]).needs_int64()
    # Offsets of batches and heads always have 64 bits.
    assert not call(torch.empty(2**10, 2**10, 2**10, 64, device="meta")).needs_int64()


class Recorder:
    """In the place of a kernel: remembers whether it was launched with offsets of 64 bits."""

    def __init__(self) -> None:
        self.wide: list[bool | None] = []

    def __getitem__(self, grid: Any) -> "Recorder":
        return self

    def __call__(self, **arguments: Any) -> None:
        self.wide.append(arguments["C"].I64 if "C" in arguments else arguments.get("I64"))


def test_dense_gradients_of_an_expanded_bias_have_offsets_of_64_bits(monkeypatch) -> None:
    long = torch.empty(1, 1, 2**16, 8, device="meta")
    bias = torch.empty(1, 1, 1, 2**16, device="meta").expand(1, 1, 2**16, 2**16)
    call = check("attention", *plain(long, long, bias=bias)[:-1])
    assert not call.needs_int64(long)
    kernel, rows = Recorder(), long[..., 0]
    monkeypatch.setattr(attention_bias_gradient, "dbias_kernel", kernel)
    dbias = attention_bias_gradient.bias_gradient(call, bias, long, rows, rows, SMALL)
    assert dbias.shape == bias.shape
    assert kernel.wide == [True]


@pytest.mark.parametrize("Tq", [1, 2**16])
@pytest.mark.parametrize("weighted", [False, True])
def test_additive_gradients_of_weights_and_bias_have_offsets_of_64_bits(
    Tq: int, weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = {
        additive_arguments: "tokens_kernel",
        additive_backward: "gradient_kernel",
        additive_bias_gradient: "dbias_kernel",
        additive_gradients: "delta_kernel",
        additive_row_gradients: "row_gradient_kernel",
    }
    recorders = {name: Recorder() for name in kernels.values()}
    for module, name in kernels.items():
        monkeypatch.setattr(module, name, recorders[name])
    Tk = 2**16
    query, key = (torch.empty(1, T, 8, device="meta") for T in (Tq, Tk))
    bias = torch.empty(1, 1, Tk, device="meta").expand(1, Tq, Tk)
    # Of one query too the weights of two keys may be far apart.
    dweights = torch.empty_strided((1, Tq, Tk), (1, 1, 2**16), device="meta") if weighted else None
    lse = torch.empty(1, Tq, device="meta")
    config = additive_table.Config(16, 2, 16, ptx=False)
    args = query, dweights, None, query, lse, query, key, key, query[0, 0], None, bias, None, 1.0
    additive_attention.additive_attention_backward(*args, *[True] * 5, config=config)
    recorders.pop("tokens_kernel")
    launched = {name: r.wide for name, r in recorders.items() if r.wide}
    rows = {"row_gradient_kernel": [weighted]} if Tq == 1 else {"gradient_kernel": [weighted] * 2}
    dbias = {"dbias_kernel": [weighted or Tq > 1]}
    assert launched == rows | dbias | {"delta_kernel": [weighted]}


@pytest.fixture
def tf32():
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.usefixtures("tf32")
def test_fp32_products_have_the_precision_that_torch_is_set_to() -> None:
    single, half = torch.empty(0), torch.empty(0, dtype=bf16)
    assert attention_arguments.precision(single) == "tf32"
    assert attention_arguments.precision(half) == "ieee"
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    assert attention_arguments.precision(single) == "ieee"


@pytest.mark.usefixtures("tf32")
def test_of_amds_gpus_one_has_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    for arch, expected in {"gfx942:sramecc+:xnack-": "tf32", "gfx90a": "ieee"}.items():
        found = SimpleNamespace(gcnArchName=arch)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, found=found: found)
        assert attention_arguments.precision(torch.empty(0)) == expected


# ---- the device ---------------------------------------------------------------------------


def test_the_workspace_is_on_the_device() -> None:
    with workspace(torch.device("meta")):
        room = _allocation._allocator.get()(24, 8, None)
    assert (room.device.type, room.dtype, room.shape) == ("meta", torch.int8, (24,))


def test_the_allocator_of_a_user_stays_and_holds_no_tensor() -> None:
    def mine(size: int, alignment: int, stream: int | None) -> None: ...

    def attend() -> weakref.ref:
        q = torch.randn(1, 1, 4, 8)
        with interpreted():
            o, lse = attention_forward(*plain(q, q), config=SMALL)
            attention_backward(o, None, o, lse, *plain(q, q), True, True, False, config=SMALL)
        return weakref.ref(q)

    before = _allocation._allocator.get()
    triton.set_allocator(mine)
    try:
        q = attend()
        assert _allocation._allocator.get() is mine
    finally:
        triton.set_allocator(before)
    gc.collect()
    assert q() is None


def test_the_table_is_asked_for_the_device_of_q(monkeypatch: pytest.MonkeyPatch) -> None:
    entered = []

    @contextlib.contextmanager
    def on_device(t: Tensor):
        entered.append(t)
        yield
        entered.clear()

    def config(call: Arguments, kernel: str) -> Config:
        assert entered == [call.q]
        return SMALL

    monkeypatch.setattr(forward, "on_device", on_device)
    monkeypatch.setattr(Arguments, "config", config)
    q = torch.randn(1, 1, 4, 8)
    with interpreted():
        attention_forward(*plain(q, q))


@pytest.mark.parametrize(("capability", "kernel"), [((7, 5), "reference"), ((8, 0), "triton")])
def test_older_gpus_take_the_reference(
    capability: tuple[int, int], kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FakeTensorMode():
        q = torch.empty(1, 2, 4, 16, device="cuda")
        rows, v = torch.empty(2, 4, 16, device="cuda"), torch.empty(16, device="cuda")
    monkeypatch.setattr(_attention_ops, "_capability", lambda device: capability)
    choices = [
        _attention_ops.choose(plain(q, q)),
        _additive_ops.choose((rows, rows, rows, v, None, None, None, 1.0)),
        decode.choose((q, q, q, None, None, None, None, None, -1, -1, 0.0, 1.0, 1)),
        decode._choose_by_cache(q, q),
    ]
    for choice in choices:
        assert choice.kernel == kernel
        assert (kernel == "triton") != ("capability 8.0, and this GPU has 7.5" in choice.reason)


# ---- results ------------------------------------------------------------------------------


def test_no_result_aliases_another() -> None:
    q = torch.randn(1, 1, 4, 8)
    with interpreted():
        o, lse = attention_forward(*plain(q, q), config=SMALL)
        grads = attention_backward(o, None, o, lse, *plain(q, q), *[False] * 3, config=SMALL)
    assert [g.shape for g in grads] == [(0,)] * 5
    assert len({id(g) for g in grads}) == 5


def test_no_query_heads() -> None:
    q, k = torch.zeros(2, 0, 4, 8), torch.randn(2, 1, 5, 8)
    with interpreted(), poisoned_memory():
        o, lse = attention_forward(*plain(q, k), config=SMALL)
        grads = attention_backward(o, None, o, lse, *plain(q, k), True, True, False, config=SMALL)
    assert grads[0].shape == q.shape
    for g in grads[1:3]:
        assert g.shape == k.shape
        assert not g.any()


# ---- refusals -----------------------------------------------------------------------------

q4, k4 = torch.zeros(2, 4, 8, 16), torch.zeros(2, 2, 9, 16)
SEED, CU = torch.zeros(1, dtype=torch.int64), torch.zeros(3, dtype=torch.int32)
ORDER = (
    *("q", "k", "v", "mask", "bias", "q_lens", "k_lens", "alibi_slopes", "sinks", "seed"),
    *("cu_q", "cu_k", "causal", "window_left", "window_right", "softcap", "dropout_p", "scale"),
    *("max_q", "max_k"),
)
GOOD = dict.fromkeys(ORDER) | {
    **{"q": q4, "k": k4, "v": k4, "window_left": -1, "window_right": -1},
    **{"softcap": 0.0, "dropout_p": 0.0, "scale": 1.0, "max_q": 8, "max_k": 9},
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": q4.double()}, r"q must be fp16, bf16 or fp32 .*float64"),
        ({"q": q4[0]}, r"q must be \(B, H, T, D\), got \(4, 8, 16\)"),
        ({"k": k4.half()}, "k must be torch.float32 on cpu like q, got torch.float16"),
        ({"k": k4[..., :8]}, r"k must be \(B, Hkv, Tk, D\) = \(2, 2, 9, 16\)"),
        ({"v": k4[:, :1]}, r"v must be \(B, Hkv, Tk, Dv\) = \(2, 2, 9, 16\)"),
        ({"q": torch.zeros(2, 3, 8, 16)}, "divides the 3 of q, got 2"),
        ({"q": torch.zeros(2, 4, 8, 513)}, r"head dimension in \[1, 512\]"),
        ({"max_q": 7}, r"max_q, max_k must be \(8, 9\)"),
        ({"mask": torch.zeros(2, 1, 8, 9)}, "mask must be torch.bool"),
        ({"mask": torch.zeros(2, 8, 9, dtype=torch.bool)}, "mask must be .* each 1 or full"),
        ({"bias": torch.zeros(1, 2, 8, 9)}, r"bias must be \(B, H, Tq, Tk\) = \(2, 4, 8, 9\)"),
        ({"q_lens": torch.zeros(2)}, r"q_lens must be \(2,\) of torch.int32"),
        ({"alibi_slopes": torch.zeros(2)}, r"alibi_slopes must be \(4,\) or \(2, 4\)"),
        ({"sinks": torch.zeros(1)}, r"sinks must be \(4,\)"),
        ({"seed": SEED}, "seed must be None for dropout_p=0"),
        ({"dropout_p": 0.5}, "seed must be a tensor for dropout_p=0.5, got None"),
        ({"dropout_p": 1.0, "seed": SEED}, r"dropout_p must be in \[0, 1\), got 1.0"),
        ({"causal": "left"}, "causal must be .*, got 'left'"),
        ({"softcap": -1.0}, "softcap must be"),
        ({"scale": float("nan")}, "scale must be finite"),
        ({"q": q4[0], "k": k4[0], "v": k4[0], "cu_q": CU}, "cu_q and cu_k must be given together"),
        ({"cu_q": CU, "cu_k": CU}, r"q must be \(N, H, D\) with cu_q"),
    ],
)
def test_bad_arguments_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^attention: .*{message}"):
        attention_forward(*(GOOD | changes).values(), True, config=Config(16, 16))


def test_bad_gradients_are_refused_by_name() -> None:
    o, lse = torch.zeros(2, 4, 8, 16), torch.zeros(2, 4, 8)
    rest = *GOOD.values(), True, True, True, True
    wrong = {"do": (o[..., 1:], None, o, lse), "dlse": (o, lse[0], o, lse)}
    for name, first in wrong.items():
        with pytest.raises(ValueError, match=f"^attention_backward: {name} must be"):
            attention_backward(*first, *rest, config=Config(16, 16))
    for changes, message in [
        ({"q": None}, "q must be a Tensor, got NoneType"),
        ({"bias": 1.0}, "bias must be a Tensor or None, got float"),
        ({"k_lens": [8, 8]}, "k_lens must be a Tensor, got list"),
    ]:
        with pytest.raises(TypeError, match=f"^attention: {message}"):
            attention_forward(*(GOOD | changes).values(), True, config=Config(16, 16))


# ---- the table ----------------------------------------------------------------------------

TARGETS: list[tuple[str, int | str]] = [
    *(("cuda", arch) for arch in (80, 86, 89, 90, 100, 120)),
    ("hip", "gfx942"),
]


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_the_table_has_a_row_for_every_call(target: tuple[str, int | str]) -> None:
    for kernel in ("forward", "dkdv", "dq", "dbias"):
        for width in (1, 16, 33, 64, 65, 128, 160, 256, 257, 512):
            for dtype in (fp16, bf16, fp32):
                if dtype == fp32 and width > 256:
                    continue
                plain, costly = (
                    choose(kernel, width, dtype, costly=costly, target=target)
                    for costly in (False, True)
                )
                assert costly.block_m * costly.block_n <= plain.block_m * plain.block_n
                assert min(costly.block_m, costly.block_n) >= 16
                assert not plain.descriptors or target[1] in (90, 100)


def test_devices_that_triton_does_not_serve_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"compute capability 8.0 or later, got 7.5"):
        choose("forward", 64, fp16, target=("cuda", 75))
    for target in TARGETS:
        with pytest.raises(ValueError, match=r"dq kernel takes head dimensions up to 256 in .*32"):
            choose("dq", 300, fp32, target=target)
