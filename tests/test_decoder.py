"""The attending decoder against a plain loop over PyTorch's cells, its bits, its refusals."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import seqkern
from seqkern.ops.choice import has_native_kernel
from seqkern.reference import decoder as reference
from seqkern.reference.cells import GATES
from seqkern.testing import decoder_case
from seqkern.testing.tolerance import assert_within_budget, neighbours

ops = torch.ops.seqkern
CELLS: dict[str, Any] = {
    "GRU": torch.nn.GRUCell,
    "LSTM": torch.nn.LSTMCell,
    "RNN_TANH": torch.nn.RNNCell,
    "RNN_RELU": lambda i, h: torch.nn.RNNCell(i, h, nonlinearity="relu"),
}


def plain_loop(x, state, key, value, w_q, b_q, v, cell, lens):
    """Attention and cell step by step, every row with a copy of its source."""
    K = x.size(0) // key.size(0)
    key, value, lens = (t.repeat_interleave(K, 0) for t in (key, value, lens))
    live = torch.arange(key.size(1)) < lens[:, None]
    out = []
    for x_i in x.unbind(1):
        s = state[0] if isinstance(state, tuple) else state
        e = torch.tanh((s @ w_q.t() + b_q)[:, None] + key) @ v
        a = e.masked_fill(~live, -torch.inf).softmax(-1)
        c = (a[..., None] * value).sum(1)
        state = cell(torch.cat([x_i, c], -1), state)
        out.append((state[0] if isinstance(state, tuple) else state, c, a))
    s, contexts, weights = (torch.stack(t, 1) for t in zip(*out, strict=True))
    return s, contexts, weights, *(state if isinstance(state, tuple) else (state,))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    mode=st.sampled_from(list(GATES)),
    T=st.integers(1, 4),
    B=st.integers(1, 5),
    K=st.sampled_from([1, 2, 5, 40]),
    Tk=st.integers(1, 19),
    sizes=st.tuples(*[st.sampled_from([1, 3, 8, 17, 33])] * 4),
    scale=st.sampled_from([0.05, 1.0, 9.0, 60.0]),
    seed=st.integers(0, 999),
)
def test_is_the_loop_over_cells(mode, T, B, K, Tk, sizes, scale, seed) -> None:
    """Values and all gradients; the scale takes tanh from nearly linear to saturated."""
    I, H, A, C = sizes
    torch.manual_seed(seed)
    cell = CELLS[mode](I + C, H).double()
    lens = torch.randint(1, Tk + 1, (B,))

    def leaf(*shape: int, times: float = 1.0) -> Tensor:
        return (torch.randn(*shape, dtype=torch.float64) * times).requires_grad_()

    x, s_0, key, value = leaf(B * K, T, I), leaf(B * K, H), leaf(B, Tk, A), leaf(B, Tk, C)
    w_q, b_q, v = leaf(A, H, times=scale), leaf(A, times=scale), leaf(A)
    state = (s_0, leaf(B * K, H)) if mode == "LSTM" else s_0
    states = list(state) if isinstance(state, tuple) else [state]
    leaves = [x, *states, key, value, w_q, b_q, v, *cell.parameters()]
    expected = plain_loop(x, state, key, value, w_q, b_q, v, cell, lens)
    weights = cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh
    *results, last = seqkern.attention_decoder(
        x, state, key, value, (w_q, b_q, v), weights, mode=mode, k_lens=lens
    )
    results += last if isinstance(last, tuple) else [last]
    torch.testing.assert_close(tuple(results), expected, rtol=1e-9, atol=1e-11)
    grads = [torch.randn_like(t) for t in results]
    ours, theirs = (torch.autograd.grad(r, leaves, grads) for r in (results, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


def arguments(mode: str, B: int, K: int, T: int = 4, Tk: int = 11) -> list:
    """Of the raw op, in float32."""
    torch.manual_seed(B)
    N, H, A, C = B * K, 37, 19, 23
    G = GATES[mode] * H
    k_lens = torch.randint(0, Tk + 1, (B,), dtype=torch.int32)
    h0, c0 = torch.randn(2, N, H).tanh()
    shapes = (A, H), (A,), (A,), (G, C), (G, H), (G,)
    weights = [torch.randn(s) * 0.3 for s in shapes]
    source = torch.randn(B, Tk, A), torch.randn(B, Tk, C)
    return [
        torch.randn(N, T, G),
        h0,
        c0 if mode == "LSTM" else None,
        *source,
        k_lens,
        *weights,
        mode,
    ]


def backward_arguments(args: list, results: tuple) -> list:
    s, contexts, weights, c_n, *kept = results
    torch.manual_seed(7)
    draws = [torch.randn_like(t) for t in (s, contexts, weights)]
    dc_n = torch.randn_like(c_n) if args[2] is not None else None
    return [*draws, dc_n, s, contexts, weights, *kept, *args]


def rows_of(args: list, sources: slice, K: int) -> list:
    """The arguments for some of the sources."""
    rows = slice(sources.start * K, sources.stop * K)
    of_rows, of_sources = (0, 1, 2), (3, 4, 5)
    return [
        t[rows] if i in of_rows and t is not None else t[sources] if i in of_sources else t
        for i, t in enumerate(args)
    ]


@pytest.mark.parametrize("mode", list(GATES))
@pytest.mark.parametrize(("B", "K"), [(150, 1), (9, 3), (5, 70)])
def test_bits_depend_neither_on_threads_nor_on_the_batch(mode: str, B: int, K: int) -> None:
    args = arguments(mode, B, K)
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results = ops.attention_decoder(*args)
            given = backward_arguments(args, results)
            runs.append((*results, *ops.attention_decoder_backward(*given)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))
    part = slice(1, 4)
    alone = ops.attention_decoder(*rows_of(args, part, K))
    together = [t[K : 4 * K] if t.dim() > 1 else t for t in runs[0][:7]]
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    given = backward_arguments(args, runs[0][:7])
    some = [t[K : 4 * K] if t is not None and t.dim() > 1 else t for t in given[:10]]
    derived = ops.attention_decoder_backward(*some, *rows_of(args, part, K))
    for i, (a, b) in enumerate(zip(derived[:6], runs[0][7:13], strict=True)):
        rows = part if i in (4, 5) else slice(K, 4 * K)
        assert torch.equal(a, b[rows] if b.dim() > 1 else b), i


@pytest.mark.skipif(
    not has_native_kernel("attention_decoder", "cpu"), reason="the C++ kernels were not built"
)
@pytest.mark.parametrize("capability", ["avx512", "avx2", "portable"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1e-4, 1e-3, 0.01])
@pytest.mark.parametrize("K", [1, 5])
@pytest.mark.usefixtures("capability")
def test_small_arguments_under_a_large_v(K: int, size: float, dtype: torch.dtype) -> None:
    """A large v makes scores of what small arguments leave of their tanhs."""
    for v in (1, 30, 1e3):
        args = arguments("GRU", 2, K, T=2, Tk=9)
        args[5] = None
        for place, scale in ((3, size), (6, size / 6), (7, size), (8, v)):  # key, w_q, b_q, v
            args[place] = torch.randn_like(args[place]) * scale
        places = [i for i, t in enumerate(args) if isinstance(t, Tensor)]
        given = [args[0], *(args[i].to(dtype) for i in places[1:])]
        grads = [torch.randn(2 * K, 2, n).to(dtype) for n in (37, 23, 9)]

        def computed(kernel, dtype, tensors, args=args, places=places, grads=grads):
            call = list(args)
            for i, t in zip(places, tensors, strict=True):
                call[i] = t.to(dtype)
            call[0] = call[0].to(torch.promote_types(dtype, torch.float32))
            forward, backward, saved = kernel
            s, contexts, weights, _, *kept = forward(*call)
            of_results = [*(g.to(dtype) for g in grads), None]
            found = backward(*of_results, *saved(s, contexts, weights, *kept), *call)
            names = "weights", "contexts", "dkey", "dvalue", "dv"
            return dict(zip(names, (weights, contexts, *found[4:]), strict=True))

        ours = ops.attention_decoder, ops.attention_decoder_backward, lambda *saved: saved
        plain = (
            reference.attention_decoder,
            reference.attention_decoder_backward,
            lambda *saved: (reference.Saved(*saved),),
        )
        exact = computed(plain, torch.float64, given)
        runs = [computed(plain, dtype, moved) for moved in neighbours(given)]
        assert_within_budget(computed(ours, dtype, given), exact, runs, dtype)


@pytest.mark.parametrize("mode", list(GATES))
def test_single_steps_are_the_sequence(mode: str) -> None:
    for B, K in ((1, 4), (40, 2)):
        gates_x, h, c, *rest = arguments(mode, B, K)
        s, contexts, weights, c_n, *_ = ops.attention_decoder(gates_x, h, c, *rest)
        for i in range(gates_x.size(1)):
            s_i, c_i, w_i, cell = ops.attention_decoder_inference(
                gates_x[:, i : i + 1], h, c, *rest
            )
            h, c = s_i[:, 0], cell if mode == "LSTM" else None
            for one, every in ((s_i, s), (c_i, contexts), (w_i, weights)):
                assert torch.equal(one[:, 0], every[:, i])
        assert torch.equal(cell, c_n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_padding_is_not_read_and_an_empty_source_gives_zeros(dtype: torch.dtype) -> None:
    case = decoder_case("GRU", T=3, B=3, K=2, Tk=5, H=7, lens=(4, 0, 1))
    clean = [t.requires_grad_() for t in case.tensors(dtype)]
    dirty = [t.detach().clone() for t in clean]
    past = torch.arange(5) >= torch.tensor([4, 0, 1])[:, None]
    for i in (2, 3):  # key and value
        dirty[i][past] = torch.nan
    dirty = [t.requires_grad_() for t in dirty]
    runs = []
    for inputs in (clean, dirty):
        out = case.op(*inputs)
        runs.append([*out, *torch.autograd.grad([t.sum() for t in out], inputs)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    _, contexts, weights, *gradients = runs[1]
    assert not contexts[2:4].any()
    assert not weights[2:4].any()
    for gradient in gradients[2:4]:
        assert not gradient[past].any()


def test_nan_stays_where_it_is() -> None:
    args = arguments("GRU", 6, 2)
    args[5].fill_(9)
    clean = ops.attention_decoder(*args)[0]
    args[1][3, 2] = torch.nan  # the state of row 3
    args[3][4, 1, 0] = torch.nan  # a key of source 4: rows 8 and 9
    s = ops.attention_decoder(*args)[0]
    touched = torch.zeros(12, dtype=torch.bool)
    touched[[3, 8, 9]] = True
    assert s[touched].isnan().all()
    assert torch.equal(s[~touched], clean[~touched])


class Names(TorchDispatchMode):
    """The names of seqkern's ops that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.called: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "seqkern":
            self.called.append(func._schema.name.removeprefix("seqkern::"))
        return func(*args, **(kwargs or {}))


def test_one_op_and_nothing_kept_without_a_gradient() -> None:
    case = decoder_case("GRU")
    inputs = case.tensors(torch.float32)
    with Names() as names:
        out = case.op(*inputs)
        assert not any(t.requires_grad for t in out)
        inputs[0].requires_grad_()
        case.op(*inputs)[0].sum().backward()
    assert names.called == [
        "attention_decoder_inference",
        "attention_decoder",
        "attention_decoder_backward",
    ]


def test_the_cpu_has_a_kernel_of_its_own() -> None:
    native = has_native_kernel("recurrent", "cpu")
    for op in ("attention_decoder", "attention_decoder_inference", "attention_decoder_backward"):
        assert has_native_kernel(op, "cpu") == native


# PyTorch's own, on the first use of forward mode in a process.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_forward_mode_and_vmap() -> None:
    case = decoder_case("LSTM", T=2, B=2, K=2, Tk=4, lens=(2, 4))
    inputs = case.tensors(torch.float64)
    tangents = tuple(torch.randn_like(t) for t in inputs)
    out, derived = torch.func.jvp(case.op, inputs, tangents)
    expected = torch.func.jvp(case.forward, inputs, tangents)
    torch.testing.assert_close((out, derived), expected)
    many = tuple(torch.stack([t, 0.5 * t]) for t in inputs)
    folded = torch.vmap(case.op)(*many)
    for i in range(2):
        one = case.op(*(t[i] for t in many))
        torch.testing.assert_close(tuple(t[i] for t in folded), one)


def test_export() -> None:
    class Module(torch.nn.Module):
        def forward(self, *inputs: Tensor):
            return case.op(*inputs)

    case = decoder_case("GRU", T=3, B=3, K=2, Tk=4)
    inputs = case.tensors(torch.float32)
    exported = torch.export.export(Module(), inputs)
    for a, b in zip(exported.module()(*inputs), case.op(*inputs), strict=True):
        assert torch.equal(a, b)


def test_a_program_exported_without_gradients_has_them() -> None:
    class Module(torch.nn.Module):
        def forward(self, *inputs: Tensor):
            return case.op(*inputs)

    case = decoder_case("GRU")
    inputs = case.tensors(torch.float64)
    with torch.no_grad():
        exported = torch.export.export(Module(), inputs).module()
    leaves = [t.requires_grad_() for t in inputs]
    ours, expected = (
        torch.autograd.grad(sum(t.sin().sum() for t in run(*leaves)), leaves)
        for run in (exported, case.op)
    )
    torch.testing.assert_close(ours, expected)


def call(**changed: Any):
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    given: dict[str, Any] = {
        "x": draw(4, 2, 3),
        "state": draw(4, 5),
        "key": draw(2, 6, 7),
        "value": draw(2, 6, 8),
        "attention": [draw(7, 5), draw(7), draw(7)],
        "cell": [draw(15, 11), draw(15, 5), draw(15), draw(15)],
        "mode": "GRU",
        "k_lens": torch.tensor([6, 2]),
    }
    for name, value in changed.items():
        where, _, at = name.partition("_at_")
        if at:
            given[where][int(at)] = value
        else:
            given[where] = value
    return seqkern.attention_decoder(**given)


def test_the_call_that_is_spoilt_below_is_right() -> None:
    s, contexts, weights, last = call()
    assert s.shape == (4, 2, 5)
    assert contexts.shape == (4, 2, 8)
    assert weights.shape == (4, 2, 6)
    assert torch.equal(last, s[:, -1])
    biasless = {"attention_at_1": None, "cell_at_2": None, "cell_at_3": None}
    assert call(**biasless)[0].isfinite().all()


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"x": 1}, TypeError, "x must be a Tensor, got int"),
        ({"x": torch.ones(4, 3)}, ValueError, r"x must be \(N, T, I\), got \(4, 3\)"),
        ({"x": torch.ones(4, 0, 3)}, ValueError, r"N = 4 and T >= 1, got \(4, 0, 3\)"),
        ({"x": torch.ones(2, 2, 3)}, ValueError, r"N = 4 and T >= 1, got \(2, 2, 3\)"),
        ({"x": torch.ones(4, 2, 3).double()}, ValueError, "x must be torch.float32 beside a key"),
        ({"x": torch.ones(4, 2, 4)}, ValueError, r"w_ih must be .* = \(15, 12\), got \(15, 11\)"),
        ({"state": torch.ones(3, 5)}, ValueError, "state must have a multiple of B = 2 rows"),
        ({"state": torch.ones(4, 6)}, ValueError, r"w_ih must be .* = \(18, 11\)"),
        ({"state": torch.ones(4, 5).double()}, ValueError, "s_0 of state must be torch.float32"),
        ({"state": None}, TypeError, "state must be a Tensor, got NoneType"),
        ({"mode": "LSTM"}, TypeError, r"state must be \(s_0, c_0\), got Tensor"),
        ({"mode": "lstm"}, ValueError, "mode must be one of .* got 'lstm'"),
        ({"mode": ["GRU"]}, ValueError, r"mode must be one of .* got \['GRU'\]"),
        ({"key": torch.ones(2, 6)}, ValueError, r"key must be \(B, Tk, A\)"),
        ({"key": torch.ones(2, 6, 7).int()}, ValueError, "must be torch.int32|floating-point"),
        ({"value": torch.ones(2, 5, 8)}, ValueError, r"value must be .* = \(2, 6, 8\)"),
        ({"attention": (1, 2)}, TypeError, r"attention must be \(w_q, b_q, v\), got 2 values"),
        ({"attention_at_0": torch.ones(7, 4)}, ValueError, r"w_q must be .* = \(7, 5\)"),
        ({"attention_at_1": torch.ones(6)}, ValueError, r"b_q must be .* = \(7,\)"),
        ({"attention_at_2": None}, TypeError, "v must be a Tensor, got NoneType"),
        ({"cell": None}, TypeError, r"cell must be \(w_ih, w_hh, b_ih, b_hh\), got NoneType"),
        ({"cell_at_1": torch.ones(15, 4)}, ValueError, r"w_hh must be .* = \(15, 5\)"),
        ({"cell_at_1": torch.ones(15, 5).half()}, ValueError, "w_hh must be torch.float32"),
        ({"cell_at_2": torch.ones(14)}, ValueError, r"b_ih must be .* = \(15,\)"),
        ({"cell_at_2": torch.ones(1)}, ValueError, r"b_ih must be .* = \(15,\)"),
        ({"cell_at_2": torch.ones(1, 15)}, ValueError, r"b_ih must be .* = \(15,\)"),
        ({"cell_at_3": torch.ones(14)}, ValueError, r"b_hh must be .* = \(15,\)"),
        ({"k_lens": torch.ones(3).int()}, ValueError, r"k_lens must be \(B\) = \(2,\)"),
        ({"k_lens": torch.ones(2)}, ValueError, "k_lens must be torch.int32"),
        ({"k_lens": torch.ones(2).int().to("meta")}, ValueError, "k_lens must be on the device"),
    ],
)
def test_refusals(changed: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=f"attention_decoder: .*{message}"):
        call(**changed)
