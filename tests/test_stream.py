"""seqkern.Stream against the layers it was made from."""

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import prune

import seqkern

pytest.importorskip("seqkern._stream", reason="the C++ extension was not built")

LAYERS = {
    "lstm": lambda: seqkern.nn.LSTM(8, 33, num_layers=2),
    "lstm-proj": lambda: seqkern.nn.LSTM(5, 40, num_layers=3, proj_size=7),
    "lstm-no-bias": lambda: seqkern.nn.LSTM(1, 1, bias=False),
    "gru": lambda: seqkern.nn.GRU(17, 64, num_layers=2),
    "rnn-relu": lambda: seqkern.nn.RNN(4, 5, nonlinearity="relu"),
    "torch-gru": lambda: torch.nn.GRU(3, 20, dropout=0.5, num_layers=2),
}


@pytest.fixture(params=LAYERS)
def layer(request):
    return LAYERS[request.param]().eval()


def whole_sequence(layer, x):
    with torch.no_grad():
        return seqkern_twin(layer)(x)


def seqkern_twin(layer):
    """The layer itself, or seqkern's of the same weights: bits are compared, not rounding."""
    if isinstance(layer, torch.nn.GRU):
        twin = seqkern.nn.GRU(3, 20, dropout=0.5, num_layers=2).eval().to(layer.weight_ih_l0.dtype)
        twin.load_state_dict(layer.state_dict())
        return twin
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [None, 3])
def test_steps_have_the_bits_of_the_whole_sequence(layer, batch, dtype):
    layer.to(dtype)
    stream = seqkern.Stream(layer, batch)
    x = torch.randn(6, batch or 1, layer.input_size, dtype=dtype)
    expected, final = whole_sequence(layer, x)
    for t in range(6):
        given = x[t] if batch else x[t, 0]
        want = expected[t] if batch else expected[t, 0]
        assert torch.equal(stream.step(given), want)
    h = final[0] if isinstance(final, tuple) else final
    state = stream.state[0] if isinstance(final, tuple) else stream.state
    assert torch.equal(state, h if batch else h[:, 0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_tensors(layer, dtype):
    layer.to(dtype)
    stream = seqkern.Stream(layer, 2)
    x = torch.randn(5, 2, layer.input_size).to(dtype)
    expected, _ = whole_sequence(layer, x)
    # c is rounded to the storage type between steps: a few roundings of values below one.
    band = 8 * torch.finfo(dtype).eps
    for t in range(5):
        assert (stream.step(x[t]) - expected[t]).abs().max() <= band


def test_numpy_in_numpy_out():
    layer = seqkern.nn.LSTM(8, 16)
    by_array, by_tensor = seqkern.Stream(layer), seqkern.Stream(layer)
    for _ in range(3):
        x = np.random.randn(8).astype(np.float32)
        y = by_array.step(x)
        assert isinstance(y, np.ndarray)
        assert y.shape == (16,)
        assert np.array_equal(y, by_tensor.step(torch.from_numpy(x)).numpy())


def test_the_output_is_the_streams_own_memory():
    stream = seqkern.Stream(seqkern.nn.GRU(4, 4))
    first = stream.step(torch.ones(4))
    kept = first.clone()
    assert stream.step(torch.ones(4)) is first
    assert not torch.equal(first, kept)


def test_state_round_trip(layer):
    stream = seqkern.Stream(layer, 2)
    x = torch.randn(4, 2, layer.input_size)
    stream.step(x[0])
    state = stream.state
    after = [stream.step(x[t]).clone() for t in (1, 2)]
    stream.reset(state)
    assert all(torch.equal(stream.step(x[t]), y) for t, y in zip((1, 2), after, strict=True))
    stream.reset()
    fresh = seqkern.Stream(layer, 2)
    assert torch.equal(stream.step(x[3]), fresh.step(x[3]))


def test_a_stream_is_a_snapshot():
    layer = seqkern.nn.RNN(4, 4)
    stream, untouched = seqkern.Stream(layer), seqkern.Stream(layer)
    with torch.no_grad():
        for weight in layer.parameters():
            weight.zero_()
    x = torch.ones(4)
    assert torch.equal(stream.step(x), untouched.step(x))
    assert stream.step(x).abs().max() > 0


@pytest.mark.parametrize("make", [torch.nn.GRU, seqkern.nn.GRU])
def test_the_weights_of_a_pruned_layer_are_those_of_its_next_call(make):
    layer, x = make(3, 20), torch.randn(4, 3)
    prune.random_unstructured(layer, "weight_hh_l0", 0.5)
    with torch.no_grad():
        layer.weight_hh_l0_orig.mul_(1.5)
        stream = seqkern.Stream(layer)
        steps = torch.stack([stream.step(row).clone() for row in x])
        torch.testing.assert_close(steps, layer(x)[0])


def test_where_it_is_made_does_not_matter():
    with torch.inference_mode():
        stream = seqkern.Stream(seqkern.nn.LSTM(4, 3))
        stream.step(torch.ones(4))
    ones = torch.ones(1, 3)
    stream.reset((ones, ones))
    assert torch.equal(stream.state[1], ones)
    with torch.device("meta"):
        stream = seqkern.Stream(seqkern.nn.LSTM(4, 3, device="cpu"))
    assert stream.step(torch.ones(4)).isfinite().all()


def test_a_state_brings_no_graph():
    layer = seqkern.nn.GRU(4, 3)
    stream = seqkern.Stream(layer)
    stream.reset(layer(torch.ones(2, 4))[1])
    assert not stream.state.requires_grad
    stream.reset()
    assert not stream.step(torch.ones(4)).requires_grad


def test_it_outlives_its_layer():
    stream = seqkern.Stream(seqkern.nn.LSTM(4, 4))
    assert torch.isfinite(stream.step(torch.ones(4))).all()


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(5), ValueError, r"x must be \(4,\), got \(5,\)"),
        (torch.zeros(1, 4), ValueError, r"x must be \(4,\), got \(1, 4\)"),
        (torch.zeros(4, dtype=torch.float64), TypeError, "x must be torch.float32"),
        (np.zeros(4), TypeError, "x must be float32, got float64"),
        (torch.zeros(8)[::2], ValueError, "contiguous"),
        (np.zeros(8, np.float32)[::2], ValueError, "contiguous"),
        (torch.zeros(4, device="meta"), ValueError, "on the CPU"),
        (torch._neg_view(torch.ones(4)), ValueError, "no negated view"),
        ([0.0] * 4, TypeError, "array or tensor, got list"),
    ],
)
def test_a_wrong_step_is_refused_and_changes_nothing(x, error, message):
    stream = seqkern.Stream(seqkern.nn.GRU(4, 4))
    with pytest.raises(error, match=message):
        stream.step(x)
    assert torch.equal(stream.state, torch.zeros(1, 4))


def freed() -> torch.Tensor:
    """A view of what was freed."""
    x = torch.ones(6)[2:]
    x.untyped_storage().resize_(0)
    return x


@pytest.mark.parametrize("make", [freed, lambda: torch._efficientzerotensor((4,))])
def test_a_step_reads_no_tensor_without_memory(make):
    stream = seqkern.Stream(seqkern.nn.GRU(4, 4))
    with pytest.raises(ValueError, match="values in memory"):
        stream.step(make())
    assert not stream.state.any()


def test_a_step_reads_nothing_that_is_traced():
    stream = seqkern.Stream(seqkern.nn.GRU(4, 4))
    with FakeTensorMode(), pytest.raises(TypeError, match="got FakeTensor"):
        stream.step(torch.ones(4))
    for given in (torch.ones(4), torch.ones(6)[2:]):
        with pytest.raises(ValueError, match="values in memory"):
            torch.func.functionalize(stream.step)(given)
    assert not stream.state.any()
    assert stream.step(torch.nn.Parameter(torch.ones(6)[2:])).any()


class Doubled(torch.nn.GRU):
    def forward(self, input, hx=None):
        return super().forward(2 * input, hx)


class Renamed(seqkern.nn.GRU):
    pass


def with_forward_of_its_own():
    layer = seqkern.nn.GRU(2, 2)
    layer.forward = Doubled(2, 2).forward
    return layer


def of_two_dtypes():
    layer = torch.nn.GRU(2, 2, dtype=torch.float16)
    layer.weight_hh_l0 = torch.nn.Parameter(layer.weight_hh_l0.detach().bfloat16())
    return layer


def on_two_devices():
    layer = torch.nn.GRU(2, 2, num_layers=2)
    layer.bias_hh_l1 = torch.nn.Parameter(layer.bias_hh_l1.detach().to("meta"))
    return layer


def test_a_subclass_that_computes_the_same_and_a_batch_size_of_numpy():
    layer, x = Renamed(3, 5), torch.randn(2, 3)
    expected, _ = whole_sequence(layer, x[None])
    assert torch.equal(seqkern.Stream(layer, np.int64(2)).step(x), expected[0])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: seqkern.Stream(torch.nn.Linear(2, 2)), TypeError, "got Linear"),
        (lambda: seqkern.Stream(Doubled(2, 2)), TypeError, "Doubled with a forward of its own"),
        (lambda: seqkern.Stream(with_forward_of_its_own()), TypeError, "a forward of its own"),
        (lambda: seqkern.Stream(of_two_dtypes()), ValueError, "weight_hh_l0 must be torch.float16"),
        (lambda: seqkern.Stream(on_two_devices()), ValueError, "bias_hh_l1 on meta"),
        (lambda: seqkern.Stream(seqkern.nn.GRU(2, 2), 2.5), TypeError, "an int or None, got 2.5"),
        (lambda: seqkern.Stream(seqkern.nn.GRU(2, 2), True), TypeError, "got True"),
        (lambda: seqkern.Stream(seqkern.nn.GRU(2, 2), "2"), TypeError, "got '2'"),
        (
            lambda: seqkern.Stream(seqkern.nn.GRU(2, 2, bidirectional=True)),
            ValueError,
            "bidirectional",
        ),
        (lambda: seqkern.Stream(seqkern.nn.GRU(2, 2), 0), ValueError, "at least 1, got 0"),
        (
            lambda: seqkern.Stream(seqkern.nn.GRU(2, 2), 2**62),
            ValueError,
            f"Stream: batch_size must be one that memory has room for, got {2**62}",
        ),
        (lambda: seqkern.Stream(seqkern.nn.GRU(2, 2), 10**30), ValueError, "batch_size must be"),
        (lambda: seqkern.Stream(seqkern.nn.GRU(2, 2, device="meta")), ValueError, "on the CPU"),
    ],
)
def test_a_wrong_layer_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_wrong_state_is_refused():
    gru, lstm = seqkern.Stream(seqkern.nn.GRU(2, 3)), seqkern.Stream(seqkern.nn.LSTM(2, 3))
    with pytest.raises(TypeError, match="state must be h"):
        gru.reset((torch.zeros(1, 3), torch.zeros(1, 3)))
    with pytest.raises(TypeError, match="tuple"):
        lstm.reset(torch.zeros(1, 3))
    with pytest.raises(ValueError, match=r"c must be \(1, 3\), got \(1, 4\)"):
        lstm.reset((torch.ones(1, 3), torch.zeros(1, 4)))
    with pytest.raises(ValueError, match="got one of 1 tensors"):
        lstm.reset((torch.ones(1, 3),))
    with pytest.raises(ValueError, match="got one of 3 tensors"):
        lstm.reset((torch.ones(1, 3),) * 3)
    with pytest.raises(TypeError, match="c must be a Tensor, got NoneType"):
        lstm.reset((torch.ones(1, 3), None))
    for dtype in (torch.int64, torch.bool, torch.complex64):
        with pytest.raises(TypeError, match=f"reset: c must be floating-point, got {dtype}"):
            lstm.reset((torch.ones(1, 3), torch.ones(1, 3, dtype=dtype)))
    freed = torch.ones(1, 3)
    freed.untyped_storage().resize_(0)
    for empty in (freed, torch.ones(1, 3, device="meta"), torch.ones(1, 3).to_sparse()):
        with pytest.raises(ValueError, match="reset: c must have values in memory"):
            lstm.reset((torch.ones(1, 3), empty))
    with FakeTensorMode():
        fake = torch.ones(1, 3)
    with pytest.raises(TypeError, match="reset: c must be a Tensor, got FakeTensor"):
        lstm.reset((torch.ones(1, 3), fake))
    assert not lstm.state[0].any()
