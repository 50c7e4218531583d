"""seqkern.nn layers as modules: state, copies, hooks, parametrizations, prepack, convert."""

import copy
import io
import pickle
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils import parametrizations, parametrize, prune

import seqkern
import seqkern.nn
from seqkern.convert import Conversion, Swapped

# torch.nn.LSTM warns of its own slow path.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported")

NAMES = ("RNN", "LSTM", "GRU")
CELLS = ("RNNCell", "LSTMCell", "GRUCell")

CONSTRUCTIONS: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
    *[(name, (3, 4), {}) for name in NAMES + CELLS],
    *[(name, (3, 4), {"bias": False}) for name in NAMES + CELLS],
    *[
        (name, (3, 4, 2), {"batch_first": True, "dropout": 0.25, "bidirectional": True})
        for name in NAMES
    ],
    ("LSTM", (3, 4, 2), {"proj_size": 2, "bidirectional": True, "dtype": torch.float64}),
    ("LSTM", (3, 4), {"proj_size": 2, "bias": False}),
    ("RNN", (3, 4, 2, "relu"), {}),
    ("RNN", (3, 4), {"nonlinearity": "relu"}),
    ("RNNCell", (3, 4), {"nonlinearity": "relu"}),
    ("GRUCell", (3, 4), {"dtype": torch.bfloat16}),
]


def build(package: Any, name: str, *args: Any, **kwargs: Any) -> torch.nn.Module:
    torch.manual_seed(5)
    return getattr(package, name)(*args, **kwargs)


def layer(name: str, *args: Any, **kwargs: Any) -> Any:
    return getattr(seqkern.nn, name)(*args, **kwargs)


def output(module: torch.nn.Module, x: Tensor) -> Tensor:
    """The output of a layer, the new state h of a cell."""
    result = module(x)
    return result[0] if isinstance(result, tuple) else result


@pytest.mark.parametrize(("name", "args", "kwargs"), CONSTRUCTIONS)
def test_construction_equals_torch(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    theirs = build(torch.nn, name, *args, **kwargs)
    after_theirs = torch.rand(1)
    ours = build(seqkern.nn, name, *args, **kwargs)
    assert torch.equal(torch.rand(1), after_theirs)  # as many random numbers were taken
    assert repr(ours) == repr(theirs)
    assert str(torch.nn.Sequential(ours)) == str(torch.nn.Sequential(theirs))
    expected, actual = theirs.state_dict(), ours.state_dict()
    assert list(actual) == list(expected)
    for key, value in expected.items():
        assert actual[key].dtype == value.dtype
        assert torch.equal(actual[key], value)
    for attribute in (
        "input_size",
        "hidden_size",
        "bias",
        "mode",
        "num_layers",
        "batch_first",
        "dropout",
        "bidirectional",
        "proj_size",
        "nonlinearity",
    ):
        assert getattr(ours, attribute, None) == getattr(theirs, attribute, None)


@pytest.mark.parametrize(("name", "args", "kwargs"), CONSTRUCTIONS)
def test_state_dict_round_trip(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    theirs = getattr(torch.nn, name)(*args, **kwargs)
    ours = getattr(seqkern.nn, name)(*args, **kwargs)
    dtype = kwargs.get("dtype", torch.float32)
    x = torch.randn(2, 2, 3, dtype=dtype) if name in NAMES else torch.randn(2, 3, dtype=dtype)
    theirs.eval(), ours.eval()
    ours.load_state_dict(theirs.state_dict())
    rounding = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(output(ours, x), output(theirs, x), **rounding)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.5)
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(output(ours, x), output(theirs, x), **rounding)


@pytest.mark.parametrize("name", NAMES)
def test_all_weights_and_flat_weights(name: str) -> None:
    ours = layer(name, 3, 4, 2, bidirectional=True)
    names = [name for name, _ in ours.named_parameters()]
    assert [id(w) for group in ours.all_weights for w in group] == [
        id(getattr(ours, name)) for name in names
    ]
    ours.flatten_parameters()
    ours._parameters["weight_hh_l1"] = torch.nn.Parameter(torch.zeros(1))  # as wrappers do
    assert [id(w) for w in ours._flat_weights] == [id(w) for w in ours.parameters()]
    assert isinstance(ours, torch.nn.RNNBase)


@pytest.mark.parametrize("name", NAMES + CELLS)
def test_copies(name: str) -> None:
    ours = layer(name, 3, 4).eval()
    x = torch.randn(2, 2, 3) if name in NAMES else torch.randn(2, 3)
    expected = output(ours, x)
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    clones = [
        copy.deepcopy(ours),
        copy.copy(ours),
        pickle.loads(pickle.dumps(ours)),
        torch.load(file, weights_only=False),
    ]
    for clone in clones:
        assert type(clone) is type(ours)
        assert not clone.training
        assert torch.equal(output(clone, x), expected)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.zero_()
    assert torch.equal(output(clones[0], x), expected)  # a deep copy has its own weights
    clones[2].double()(x.double())
    assert ours(x) is not None


@pytest.mark.parametrize("name", NAMES + CELLS)
def test_meta_construction(name: str) -> None:
    ours = layer(name, 3, 4, device="meta")
    assert all(parameter.is_meta for parameter in ours.parameters())
    x = torch.randn(2, 2, 3) if name in NAMES else torch.randn(2, 3)
    assert output(ours, x.to("meta")).shape == (*x.shape[:-1], 4)
    ours.to_empty(device="cpu")
    ours.reset_parameters()
    assert output(ours, x).shape == (*x.shape[:-1], 4)


@pytest.mark.parametrize("name", NAMES + CELLS)
def test_changed_weights_are_seen_at_the_next_call(name: str) -> None:
    ours = layer(name, 3, 4)
    theirs = getattr(torch.nn, name)(3, 4)
    x = torch.randn(1, 2, 3) if name in NAMES else torch.randn(2, 3)
    hidden = "weight_hh_l0" if name in NAMES else "weight_hh"
    hx: Any = torch.ones(1, 2, 4) if name in NAMES else torch.ones(2, 4)
    hx = (hx, hx) if name.startswith("LSTM") else hx

    def compare() -> Tensor:
        theirs.load_state_dict(ours.state_dict())
        with torch.no_grad():
            actual, expected = ours(x, hx), theirs(x, hx)
        actual, expected = (r[0] if isinstance(r, tuple) else r for r in (actual, expected))
        torch.testing.assert_close(actual, expected)
        return actual

    seen = [compare()]
    getattr(ours, hidden).data[1, 2] += 1.0
    seen.append(compare())
    getattr(ours, hidden).data = torch.randn_like(getattr(ours, hidden))
    seen.append(compare())
    getattr(ours, hidden).detach().numpy()[0, 0] -= 2.0
    seen.append(compare())
    setattr(ours, hidden, torch.nn.Parameter(torch.zeros_like(getattr(ours, hidden))))
    seen.append(compare())
    ours.load_state_dict({key: value + 0.1 for key, value in ours.state_dict().items()})
    seen.append(compare())
    assert all(not torch.equal(a, b) for a, b in pairwise(seen))


@pytest.mark.parametrize("name", NAMES + CELLS)
def test_forward_hooks(name: str) -> None:
    ours = layer(name, 3, 4)
    x = torch.randn(2, 2, 3) if name in NAMES else torch.randn(2, 3)
    seen = []
    ours.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    ours.register_forward_hook(lambda module, args, result: seen.append(args[0]))
    ours.register_full_backward_hook(lambda module, grads_in, grads_out: seen.append(grads_in[0]))
    x.requires_grad_()
    output(ours, x).sum().backward()
    assert torch.equal(seen[0], x * 2)
    torch.testing.assert_close(seen[1] * 2, x.grad)


class WeightDrop(torch.nn.Module):
    """Drop recurrent weights, the layer's own weight being a plain tensor set by name."""

    def __init__(self, inner: torch.nn.Module, name: str) -> None:
        super().__init__()
        self.inner, self.name = inner, name
        raw = getattr(inner, name)
        delattr(inner, name)
        self.raw = torch.nn.Parameter(raw.detach())
        setattr(inner, name, raw.detach().clone())

    def forward(self, x: Tensor) -> Any:
        weight = torch.nn.functional.dropout(self.raw, 0.5, self.training)
        setattr(self.inner, self.name, weight)
        return self.inner(x)


def names_and_input(name: str) -> tuple[str, Tensor]:
    if name in NAMES:
        return "weight_hh_l0", torch.randn(4, 2, 3)
    return "weight_ih", torch.randn(2, 3)


@pytest.mark.parametrize("name", NAMES + CELLS)
def test_weight_drop(name: str) -> None:
    results = []
    weight_name, x = names_and_input(name)
    for package in (torch.nn, seqkern.nn):
        wrapped = WeightDrop(build(package, name, 3, 4), weight_name)
        torch.manual_seed(1)
        values = [output(wrapped, x), output(wrapped, x)]
        assert not torch.equal(*values)
        values[1].square().sum().backward()
        results.append([*values, *[p.grad for p in wrapped.parameters()]])
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("name", NAMES + CELLS)
def test_weight_norm(name: str) -> None:
    results = []
    weight_name, x = names_and_input(name)
    for package in (torch.nn, seqkern.nn):
        module = parametrizations.weight_norm(build(package, name, 3, 4), weight_name)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
        values = []
        for _ in range(2):
            values.append(output(module, x))
            optimizer.zero_grad()
            values[-1].square().sum().backward()
            optimizer.step()
        gradients = [parameter.grad for parameter in module.parameters()]
        parametrize.remove_parametrizations(module, weight_name)
        results.append([*values, output(module, x), *gradients])
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("name", NAMES)
def test_parametrized_layer_can_be_deep_copied_after_a_call(name: str) -> None:
    module = parametrizations.weight_norm(layer(name, 3, 4), "weight_hh_l0")
    x = torch.randn(4, 2, 3)
    expected = output(module, x)
    clone = copy.deepcopy(module)
    assert torch.equal(output(clone, x), expected)
    assert torch.equal(output(copy.deepcopy(clone.double()), x.double()), output(clone, x.double()))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kwargs", [{}, {"num_layers": 2, "bidirectional": True}])
def test_prepack_is_a_snapshot_for_calls_without_gradient(
    name: str, kwargs: dict[str, Any]
) -> None:
    ours = layer(name, 5, 24, **kwargs)
    x = torch.randn(6, 2, 5)
    with torch.no_grad():
        before = output(ours, x)
        ours.prepack()
        torch.testing.assert_close(output(ours, x), before)
        for parameter in ours.parameters():
            parameter.data.mul_(0.5)
        torch.testing.assert_close(output(ours, x), before)
    live = output(ours, x)  # needs a gradient, so it reads the weights
    assert not torch.allclose(live, before)
    ours.unpack()
    with torch.no_grad():
        torch.testing.assert_close(output(ours, x), live.detach())
    ours.unpack()  # a second time does nothing


@pytest.mark.parametrize("name", NAMES)
def test_what_ends_a_snapshot(name: str) -> None:
    ours = layer(name, 3, 8)
    keys = list(ours.state_dict())
    x = torch.randn(4, 2, 3)

    def stale_after(change: Any) -> bool:
        ours.prepack()
        module = change() or ours
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.data.mul_(0.5)
            packed = output(module, x.to(next(module.parameters()).dtype))
            module.unpack()
            return not torch.allclose(packed, output(module, x.to(packed.dtype)))

    assert stale_after(lambda: None)
    assert list(ours.state_dict()) == keys
    assert not stale_after(lambda: pickle.loads(pickle.dumps(ours)))
    assert not stale_after(lambda: copy.deepcopy(ours))
    assert not stale_after(lambda: copy.copy(ours))
    assert not stale_after(lambda: ours.load_state_dict(ours.state_dict()) and None)
    assert not stale_after(lambda: ours.double() and None)


@pytest.mark.parametrize("name", NAMES)
def test_a_prepacked_layer_is_saved_without_its_snapshot(name: str) -> None:
    ours = layer(name, 3, 8)
    x = torch.randn(4, 2, 3)
    ours.prepack()
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    with torch.serialization.safe_globals([type(ours)]):
        loaded = torch.load(file, weights_only=True)
    with torch.no_grad():
        assert torch.equal(output(loaded, x), output(ours, x))


@pytest.mark.parametrize("name", NAMES)
def test_a_replica_of_data_parallel_reads_its_own_weights(name: str) -> None:
    ours = layer(name, 3, 8)
    x = torch.randn(4, 2, 3)
    ours.prepack()
    with torch.no_grad():
        replica = ours._replicate_for_data_parallel()
        for key, parameter in ours.named_parameters():
            parameter.mul_(0.5)
            setattr(replica, key, parameter.clone())  # as torch.nn.parallel.replicate does
        halved = output(replica, x)
        ours.unpack()
        assert torch.equal(halved, output(ours, x))


@pytest.mark.parametrize("name", NAMES)
def test_a_deep_copy_of_a_parametrized_layer_leaves_the_snapshot_behind(name: str) -> None:
    module = parametrizations.weight_norm(layer(name, 3, 8), "weight_hh_l0")
    x = torch.randn(4, 2, 3)
    module.prepack()
    with torch.no_grad():
        clone = copy.deepcopy(module)
        for parameter in clone.parameters():
            parameter.mul_(0.5)
        halved = output(clone, x)
        assert not torch.allclose(halved, output(module, x))
        clone.unpack()
        assert torch.equal(halved, output(clone, x))


def prune_half(module: Any, name: str) -> None:
    prune.random_unstructured(module, name, 0.5)


@pytest.mark.filterwarnings("ignore:.torch.nn.utils.weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "wrap", [prune_half, torch.nn.utils.weight_norm, torch.nn.utils.spectral_norm]
)
def test_prepack_takes_weights_that_hooks_recompute_as_they_are(wrap: Any) -> None:
    ours = layer("GRU", 3, 8).eval()
    wrap(ours, "weight_hh_l0")
    x = torch.randn(4, 2, 3)
    with torch.no_grad():
        for parameter in ours.parameters():  # as an optimizer and load_state_dict() do
            parameter.mul_(1.5)
        ours.prepack()
        packed = output(ours, x)
        ours.unpack()
        assert torch.equal(packed, output(ours, x))


# ---- convert ------------------------------------------------------------------------------


class Model(torch.nn.Module):
    """Every kind of layer and cell, one of them in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Linear(3, 3)
        self.layers = torch.nn.ModuleDict({n: getattr(torch.nn, n)(3, 3) for n in NAMES})
        self.cells = torch.nn.ModuleList([getattr(torch.nn, n)(3, 3) for n in CELLS])
        self.shared = self.layers["LSTM"]
        self.norm = parametrizations.weight_norm(torch.nn.GRU(3, 3), "weight_hh_l0")

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for module in [*self.layers.values(), self.shared, self.norm]:
            x = module(x)[0]
        x = x[-1]
        for cell in self.cells:
            x = output(cell, x)
        return x


def losses(model: torch.nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> list[float]:
    result = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(x).square().sum()
        loss.backward()
        optimizer.step()
        result.append(loss.item())
    return result


def test_convert_keeps_everything_but_the_class() -> None:
    model, reference = Model().double().eval(), Model().double().eval()
    reference.load_state_dict(model.state_dict())
    calls = []
    model.shared.register_forward_hook(lambda *args: calls.append(1))
    parameters = dict(model.named_parameters())
    modules = {name: id(module) for name, module in model.named_modules()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    text, keys = repr(model), list(model.state_dict())

    result = seqkern.convert(model)

    assert [entry.name for entry in result.swapped] == [
        "layers.RNN",
        "layers.LSTM",
        "layers.GRU",
        "cells.0",
        "cells.1",
        "cells.2",
        "norm",
    ]
    assert result.swapped[1] == Swapped("layers.LSTM", torch.nn.LSTM, seqkern.nn.LSTM)
    assert result.left == []
    assert model.shared is model.layers["LSTM"]
    assert isinstance(model.norm, seqkern.nn.GRU)
    assert parametrize.is_parametrized(model.norm, "weight_hh_l0")
    assert (repr(model), list(model.state_dict())) == (text, keys)
    assert not any(module.training for module in model.modules())
    assert {name: id(module) for name, module in model.named_modules()} == modules
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name]
    expected = losses(reference, torch.optim.SGD(reference.parameters(), lr=0.1), x)
    assert losses(model, optimizer, x) == pytest.approx(expected, rel=1e-10)
    assert len(calls) == 2 * 3
    copy.deepcopy(model)(x)
    parametrize.remove_parametrizations(model.norm, "weight_hh_l0")
    assert type(model.norm) is seqkern.nn.GRU

    assert seqkern.convert(model) == Conversion([], [])


@pytest.mark.parametrize("name", NAMES + CELLS)
def test_convert_of_the_root(name: str) -> None:
    module = getattr(torch.nn, name)(3, 4)
    x = torch.randn(2, 2, 3) if name in NAMES else torch.randn(2, 3)
    expected = output(module, x)
    result = seqkern.convert(module)
    assert result.swapped == [Swapped("", getattr(torch.nn, name), getattr(seqkern.nn, name))]
    assert type(module) is getattr(seqkern.nn, name)
    torch.testing.assert_close(output(module, x), expected)
    assert type(pickle.loads(pickle.dumps(module))) is getattr(seqkern.nn, name)
    if name in NAMES:
        module.prepack()
        module.double()


def test_convert_leaves_what_may_behave_otherwise_and_says_why() -> None:
    class Own(torch.nn.LSTM):
        pass

    patched = torch.nn.GRU(3, 3)
    patched.forward = lambda x: x  # type: ignore[method-assign] # what wrappers do
    model = torch.nn.ModuleList(
        [Own(3, 3), patched, parametrizations.weight_norm(Own(3, 3), "weight_hh_l0")]
    )
    types = [type(module) for module in model]
    result = seqkern.convert(model)
    assert result.swapped == []
    assert [entry.name for entry in result.left] == ["0", "1", "2"]
    assert [entry.type for entry in result.left] == types
    assert "subclass" in result.left[0].reason
    assert "forward" in result.left[1].reason
    assert [type(module) for module in model] == types


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of quantisation in torch.ao
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_convert_leaves_quantised_layers_alone() -> None:
    model = torch.ao.quantization.quantize_dynamic(torch.nn.Sequential(torch.nn.LSTM(3, 4)))
    x = torch.randn(2, 2, 3)
    before, kind = model(x)[0], type(model[0])
    assert seqkern.convert(model) == Conversion([], [])
    assert type(model[0]) is kind is not torch.nn.LSTM
    assert torch.equal(model(x)[0], before)


def test_convert_wants_a_module() -> None:
    with pytest.raises(TypeError, match=r"torch\.nn\.Module, got dict"):
        seqkern.convert({})  # type: ignore[arg-type] # the wrong call is the test
