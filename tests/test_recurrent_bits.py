"""What the C++ kernels of the recurrent ops promise: the same bits in any batch, on any number of
threads, wherever the inputs lie; and bf16 within its error budget over many rows."""

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

from seqkern.ops.choice import has_native_kernel
from seqkern.ops.recurrent import recurrent
from seqkern.reference.cells import GATES
from tests.recurrent_layers import layer_arguments, torch_layer

CAPABILITIES = ["amx", "avx512_bf16", "avx512", "avx2", "portable"]

every_capability = pytest.mark.parametrize("capability", CAPABILITIES, indirect=True)
every_mode = pytest.mark.parametrize("mode", list(GATES))
pytestmark = pytest.mark.skipif(
    not has_native_kernel("recurrent", "cpu"), reason="a promise of the C++ kernels: not built"
)


def forward_and_dx(mode: str, x: Tensor, h0, c0, weights, batch_sizes=None):
    """y and h_n without a gradient, and y, h_n, dx and dh0 with one."""
    with torch.no_grad():
        plain = recurrent(mode, x, h0, c0, weights, batch_sizes=batch_sizes)[:2]
    x, h0 = x.detach().requires_grad_(), h0.detach().requires_grad_()
    y, h_n, _ = recurrent(mode, x, h0, c0, weights, batch_sizes=batch_sizes)
    dx, dh0 = torch.autograd.grad((y * y).sum() + h_n.sum(), (x, h0))
    return *plain, y.detach(), h_n.detach(), dx, dh0


@every_capability
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@every_mode
def test_a_row_has_the_same_bits_in_any_batch(mode: str, dtype, capability: str) -> None:
    T, I, H = 5, 9, 40
    x, h0, c0, weights = layer_arguments(mode, T, 64, I, H, D=2, dtype=dtype)
    alone = forward_and_dx(mode, x[:, :1], h0[:, :1], c0 if c0 is None else c0[:, :1], weights)
    for B in (2, 5, 6, 7, 12, 16, 33, 64):
        c = None if c0 is None else c0[:, :B]
        batch = forward_and_dx(mode, x[:, :B], h0[:, :B], c, weights)
        assert all(torch.equal(a[:, :1], b) for a, b in zip(batch, alone, strict=True)), B


@every_capability
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("T", [1, 2])
def test_a_row_has_the_same_bits_in_products_of_many_terms(T: int, dtype, capability: str) -> None:
    x, h0, c0, weights = layer_arguments("LSTM", T, 50, 270, 200, dtype=dtype)
    alone = forward_and_dx("LSTM", x[:, -1:], h0[:, -1:], c0[:, -1:], weights)
    for first in (0, 24, 25, 34, 42, 47, 48):
        rows = x[:, first:], h0[:, first:], c0[:, first:]
        batch = forward_and_dx("LSTM", *rows, weights)
        assert all(torch.equal(a[:, -1:], b) for a, b in zip(batch, alone, strict=True)), first


@every_capability
@every_mode
def test_gradients_of_bf16_over_thousands_of_rows(mode: str, capability: str) -> None:
    """The backward works in chunks of up to 3,542 rows of this size, the last one not full."""
    x, h0, c0, weights = layer_arguments(mode, 101, 41, 19, 37, D=2)
    packed = pack_padded_sequence(x, list(range(101, 60, -1)))
    inputs = [packed.data, h0, *weights, *([] if c0 is None else [c0])]
    dy = torch.randn(len(packed.data), 2 * 37).bfloat16()

    def gradients(dtype: torch.dtype, factor: float = 1.0) -> tuple[Tensor, ...]:
        x, h0, *rest = (t.bfloat16().to(dtype).requires_grad_() for t in inputs)
        weights, c0 = (rest[:-1], rest[-1]) if mode == "LSTM" else (rest, None)
        y, _, _ = recurrent(mode, x, h0, c0, weights, batch_sizes=packed.batch_sizes)
        return torch.autograd.grad(y, [x, h0, *rest], dy.to(dtype) * factor)

    exact, ours = gradients(torch.float64), gradients(torch.bfloat16)
    # Every rounding, of a gate's gradient and of h, is at most eps / 2 and of either sign. Near its
    # kink relu takes the other side, which costs a whole term.
    budget = (8 if mode == "RNN_RELU" else 1.5) * torch.finfo(torch.bfloat16).eps
    for a, b in zip(ours, exact, strict=True):
        assert (a.double() - b).norm() <= budget * b.norm()
    assert all(g.isnan().any() for g in gradients(torch.bfloat16, torch.nan))
    again = gradients(torch.bfloat16)  # in memory that the call before left full of NaN
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))


@pytest.mark.parametrize(("B", "threads"), [(1, 1), (6, 1), (5, 2), (10, 2)])
@every_mode
def test_bits_do_not_depend_on_where_the_inputs_lie(mode: str, B: int, threads: int) -> None:
    """Rows an equal way apart are read in place, others are copied first."""
    T, I, H = 70, 17, 72
    x, h0, c0, weights = layer_arguments(mode, T, B, I, H, D=2)
    wide = torch.full((T, 2 * B, I + 3), torch.nan)
    wide[:, :B, :I] = x
    batch_first = x.transpose(0, 1).contiguous().transpose(0, 1)
    every_second = torch.stack([x, x], 2).flatten(1, 2)[:, ::2]
    torch.set_num_threads(threads)
    try:
        runs = [
            forward_and_dx(mode, layout, h0[:D], c0 if c0 is None else c0[:D], weights[: 4 * D])
            for D in (1, 2)
            for layout in (x, batch_first, wide[:, :B, :I], every_second)
        ]
    finally:
        torch.set_num_threads(1)
    for same in (runs[:4], runs[4:]):
        for run in same[1:]:
            assert all(torch.equal(a, b) for a, b in zip(run, same[0], strict=True))


@every_capability
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_mode
def test_a_ragged_row_has_the_bits_it_has_alone(mode: str, dtype, capability: str) -> None:
    lengths, I, H = [9, 9, 7, 4, 4, 1], 9, 40
    x, h0, c0, weights = layer_arguments(mode, 9, len(lengths), I, H, D=2, dtype=dtype)
    packed = pack_padded_sequence(x, lengths)
    y, h_n, _, _, dx, dh0 = forward_and_dx(mode, packed.data, h0, c0, weights, packed.batch_sizes)
    starts = [0, *packed.batch_sizes.cumsum(0).tolist()]
    for b, n in enumerate(lengths):
        rows = [starts[t] + b for t in range(n)]
        c = None if c0 is None else c0[:, b : b + 1]
        one = forward_and_dx(mode, x[:n, b : b + 1], h0[:, b : b + 1], c, weights)
        whole = (y[rows], h_n[:, b], dx[rows], dh0[:, b])
        alone = (one[0][:, 0], one[1][:, 0], one[4][:, 0], one[5][:, 0])
        assert all(torch.equal(w, a) for w, a in zip(whole, alone, strict=True)), b


@every_capability
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("B", "H"), [(1, 200), (7, 72), (64, 40)])
@every_mode
def test_bits_do_not_depend_on_the_number_of_threads(
    mode: str, B: int, H: int, dtype, capability: str
) -> None:
    x, h0, c0, weights = layer_arguments(mode, 4, B, 33, H, D=2, dtype=dtype)
    weights = [w.requires_grad_() for w in weights]
    runs = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            y, h_n, _ = recurrent(mode, x, h0, c0, weights)
            runs.append([y, h_n, *torch.autograd.grad((y * y).sum() + h_n.sum(), weights)])
            runs[-1] += forward_and_dx(mode, x, h0, c0, [w.detach() for w in weights])
        finally:
            torch.set_num_threads(1)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


# ---- sizes of 0 and values that are not finite, as torch.nn has them


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_capability
@every_mode
def test_gradients_of_an_input_without_features(mode: str, capability: str, dtype) -> None:
    """They are those of one feature that is zero. That of W_ih is empty, its pointer null."""
    x, h0, c0, weights = layer_arguments(mode, 3, 2, 1, 5, dtype=dtype)
    grads = []
    for features in (0, 1):
        leaves = [w.detach().requires_grad_() for w in (weights[0][:, :features], *weights[1:])]
        y = recurrent(mode, torch.zeros_like(x)[..., :features], h0, c0, leaves)[0]
        grads.append(torch.autograd.grad(y.square().sum(), leaves))
    assert grads[0][0].shape == (weights[0].size(0), 0)
    assert all(torch.equal(a, b) for a, b in zip(grads[0][1:], grads[1][1:], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize(("mode", "proj"), [*((mode, 0) for mode in GATES), ("LSTM", 5)])
@every_capability
def test_an_infinite_input_saturates_its_gates(capability: str, mode: str, proj: int, dtype):
    """Zero weights beside the last of 20 units make no NaN of it."""
    layer = torch_layer(mode, 3, 20, **({"proj_size": proj} if proj else {}))
    x, (h0, c0) = torch.randn(3, 2, 3), (torch.zeros(1, 2, proj or 20), torch.zeros(1, 2, 20))
    x[0, 0, 0] = -torch.inf
    with torch.no_grad():
        expected = layer(x)[0]
        weights = [w.to(dtype) for w in layer._flat_weights]
        c = c0.to(dtype) if mode == "LSTM" else None
        actual = recurrent(mode, x.to(dtype), h0.to(dtype), c, weights)[0].float()
    finite = expected.isfinite()
    assert torch.equal(actual.isfinite(), finite)
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(actual[finite], expected[finite], rtol=tolerance, atol=tolerance)


@every_capability
def test_a_gradient_passes_through_nan_of_relu(capability: str) -> None:
    x, h0, _, weights = layer_arguments("RNN_RELU", 1, 2, 3, 2)
    weights[0][0, :2] = torch.tensor([torch.inf, -torch.inf])
    leaves = [w.detach().requires_grad_() for w in weights]
    y = recurrent("RNN_RELU", torch.ones_like(x), h0, None, leaves)[0]
    assert y[..., 0].isnan().all()
    grads = torch.autograd.grad(y.square().sum(), leaves)
    assert all(grad[0].isnan().all() for grad in grads)
    assert all(grad[1].isfinite().all() for grad in grads)
