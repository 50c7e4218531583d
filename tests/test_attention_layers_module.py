"""seqkern.nn's attention layers as modules: state, copies, transforms, convert, errors."""

import copy
import inspect
import io
import pickle
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard

import seqkern
import seqkern.nn
from seqkern.convert import Swapped
from tests.attention_modules import F64, NAMES, Alone, alone, build, every_name, make, results

# torch.nn warns of layers that its fast path does not take.
pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")


# ---- construction and state ---------------------------------------------------------------

ARGUMENTS: list[tuple[str, dict[str, Any]]] = [
    *[(name, {}) for name in NAMES],
    *[(name, {"bias": False, "batch_first": False, "dropout": 0.25}) for name in NAMES],
    *[(name, {"norm_first": True, "activation": "gelu"}) for name in NAMES[1:]],
    *[(name, {"activation": torch.nn.SiLU(), "layer_norm_eps": 1e-3}) for name in NAMES[1:]],
    ("MultiheadAttention", {"kdim": 5, "vdim": 3}),
    ("MultiheadAttention", {"add_bias_kv": True, "add_zero_attn": True, "dropout": 0.5}),
    ("MultiheadAttention", {"dtype": torch.bfloat16, "kdim": 8}),
]


def attributes(module: torch.nn.Module) -> dict[str, Any]:
    plain = (bool, int, float, str)
    return {k: v for k, v in vars(module).items() if isinstance(v, plain) or callable(v)}


@pytest.mark.parametrize(("name", "kwargs"), ARGUMENTS)
def test_construction_equals_torch(name: str, kwargs: dict[str, Any]) -> None:
    torch.manual_seed(5)
    theirs = make(torch.nn, name, **kwargs)
    after_theirs = torch.rand(1)
    torch.manual_seed(5)
    ours = make(seqkern.nn, name, **kwargs)
    assert torch.equal(torch.rand(1), after_theirs)  # as many random numbers were taken
    assert repr(ours) == repr(theirs)
    expected, actual = theirs.state_dict(), ours.state_dict()
    assert list(actual) == list(expected)
    for key, value in expected.items():
        assert actual[key].dtype == value.dtype
        assert torch.equal(actual[key], value)
    for their_module, our_module in zip(theirs.modules(), ours.modules(), strict=True):
        assert attributes(our_module) == attributes(their_module)
        assert isinstance(our_module, type(their_module))
        if type(their_module).__name__ in NAMES:
            assert type(our_module).__module__.startswith("seqkern.nn.")


@every_name
def test_signatures_equal_torch(name: str) -> None:
    theirs, ours = getattr(torch.nn, name), getattr(seqkern.nn, name)
    assert inspect.signature(ours) == inspect.signature(theirs)
    for method in ("__init__", "forward"):
        expected = inspect.signature(getattr(theirs, method)).parameters
        actual = inspect.signature(getattr(ours, method)).parameters
        assert [(p.name, p.default) for p in actual.values()] == [
            (p.name, p.default) for p in expected.values()
        ]


@every_name
def test_state_dict_goes_both_ways(name: str) -> None:
    theirs, ours = alone(name)
    x = torch.randn(2, 4, 8, dtype=F64)
    torch.testing.assert_close(ours(x), theirs(x))
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(torch.randn_like(parameter))
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(x), theirs(x))


def test_custom_parts_of_a_transformer_are_taken_as_they_are() -> None:
    encoder, decoder = make(torch.nn, "TransformerEncoder"), make(torch.nn, "TransformerDecoder")
    model = seqkern.nn.Transformer(8, 2, custom_encoder=encoder, custom_decoder=decoder)
    assert model.encoder is encoder
    assert model.decoder is decoder
    assert {type(m) for m in model.modules()} & {getattr(seqkern.nn, name) for name in NAMES} == {
        seqkern.nn.Transformer
    }
    model = seqkern.nn.Transformer(8, 2, 1, 1, 12, 0.0, "relu", encoder)
    assert type(model.encoder) is torch.nn.TransformerEncoder
    assert type(model.decoder.layers[0].multihead_attn) is seqkern.nn.MultiheadAttention


@every_name
def test_copies(name: str) -> None:
    _, ours = build(name)
    ours.eval()
    x = torch.randn(2, 4, 8, dtype=F64)
    expected = Alone(ours)(x)
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    copies = [
        copy.deepcopy(ours),
        pickle.loads(pickle.dumps(ours)),
        torch.load(file, weights_only=False),
    ]
    for clone in copies:
        assert [type(m) for m in clone.modules()] == [type(m) for m in ours.modules()]
        assert not clone.training
        assert torch.equal(Alone(clone)(x), expected)


@every_name
def test_meta_construction(name: str) -> None:
    ours = Alone(make(seqkern.nn, name, device="meta"))
    assert ours(torch.randn(2, 4, 8, dtype=F64, device="meta")).shape == (2, 4, 8)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # of torch.nn's stack
@pytest.mark.parametrize("padded", [False, True])
def test_stacks_and_layers_of_both_packages_mix(padded: bool) -> None:
    theirs, ours = build("TransformerEncoder")
    mixed = [
        torch.nn.TransformerEncoder(ours.layers[0], 2, ours.norm),
        seqkern.nn.TransformerEncoder(theirs.layers[0], 2, theirs.norm),
    ]
    x = torch.randn(2, 4, 8, dtype=F64)
    padding = torch.arange(4) >= torch.tensor([[4], [2]])
    for stack in mixed:
        stack.load_state_dict(theirs.state_dict())
        for module in (stack.eval(), theirs.eval()):
            module.requires_grad_(not padded)
        expected = theirs(x, src_key_padding_mask=padding)
        torch.testing.assert_close(stack(x, src_key_padding_mask=padding), expected)


def test_a_foreign_layer_gets_the_masks_that_torch_gives_it() -> None:
    class Own(torch.nn.Module):
        def forward(self, src: Tensor, **kwargs: Any) -> Tensor:
            seen.append(kwargs)
            return src

    seen: list[dict[str, Any]] = []
    x, mask = torch.randn(2, 4, 8), torch.ones(4, 4, dtype=torch.bool).triu(1)
    stack = seqkern.nn.TransformerEncoder(Own(), 1)
    stack(x, mask=mask, src_key_padding_mask=torch.zeros(2, 4, dtype=torch.bool))
    assert seen[0]["is_causal"]
    assert torch.equal(seen[0]["src_mask"], torch.nn.Transformer.generate_square_subsequent_mask(4))
    assert torch.equal(seen[0]["src_key_padding_mask"], torch.zeros(2, 4))
    stack(x, mask=torch.nn.Transformer.generate_square_subsequent_mask(4).requires_grad_())
    assert not seen[1]["is_causal"]  # a layer may drop what it hears is causal


def test_explain_of_a_stack_with_masks() -> None:
    """Whose values cannot be looked at, since nothing is computed."""
    layer = seqkern.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    stack = seqkern.nn.TransformerEncoder(layer, 2).eval()
    x, padding = torch.randn(2, 4, 8), torch.zeros(2, 4, dtype=torch.bool)
    causal = torch.ones(4, 4, dtype=torch.bool).triu(1)
    for masks in ({"mask": causal}, {"src_key_padding_mask": padding}):
        with torch.no_grad():
            assert len(seqkern.explain(stack, x, **masks)) == 2


def test_hooks_run_in_every_mode() -> None:
    _, ours = build("TransformerEncoderLayer")
    calls: list[int] = []
    for module in (ours.self_attn, ours.linear1):
        module.register_forward_hook(lambda *args: calls.append(1))
    with torch.no_grad():
        ours.eval()(torch.randn(2, 4, 8, dtype=F64))
    assert len(calls) == 2


# torch.ao.quantization says that it will move, and quantised tensors that they will go.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_dynamic_quantisation() -> None:
    _, ours = build("TransformerEncoderLayer", dtype=torch.float32)
    x = torch.randn(2, 4, 8)
    with torch.no_grad():
        expected = ours.eval()(x)
        quantised = torch.ao.quantization.quantize_dynamic(ours)
        assert type(quantised.linear1) is not torch.nn.Linear
        # int8 weights: 1/127 of the largest; two products of them.
        torch.testing.assert_close(quantised(x), expected, rtol=0, atol=0.1)


# FSDP warns of the result of every linear map of a batch, which is a view.
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
def test_fully_shard() -> None:
    theirs, ours = alone("Transformer")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh("cpu", (1,))
        for module in [*ours.modules()][::-1]:
            if type(module).__name__ in NAMES:
                fully_shard(module, mesh=mesh)  # changes the class once more
        fully_shard(ours, mesh=mesh)
        x = torch.randn(2, 4, 8, dtype=F64)
        y, expected = ours(x), theirs(x)
        torch.testing.assert_close(y, expected)
        y.sin().sum().backward(), expected.sin().sum().backward()
        for p, their_p in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p.grad.full_tensor(), their_p.grad)
    finally:
        dist.destroy_process_group()


# ---- convert ------------------------------------------------------------------------------


class Model(torch.nn.Module):
    """Every class, one module in two places, one inside a class of the user's."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = torch.nn.ModuleDict({name: Alone(make(torch.nn, name)) for name in NAMES})
        self.shared = self.parts["MultiheadAttention"]
        self.own = Own(8, 2, 12, 0.0, batch_first=True, dtype=F64)

    def forward(self, x: Tensor) -> Tensor:
        for part in [*self.parts.values(), self.shared]:
            x = part(x)
        return self.own(x)


class Own(torch.nn.TransformerEncoderLayer):
    """A user's class that overrides what torch.nn lets it."""

    def _ff_block(self, x: Tensor) -> Tensor:
        return super()._ff_block(x).mul(0.5)


def test_convert() -> None:
    model = Model()
    parameters, keys, text = dict(model.named_parameters()), list(model.state_dict()), repr(model)
    x = torch.randn(2, 4, 8, dtype=F64)
    expected = results(model, x)
    calls: list[int] = []
    model.shared.module.register_forward_hook(lambda *args: calls.append(1))

    result = seqkern.convert(model)

    assert [entry.name for entry in result.left] == ["own"]
    assert "subclass" in result.left[0].reason
    first = Swapped(
        "parts.MultiheadAttention.module",
        torch.nn.MultiheadAttention,
        seqkern.nn.MultiheadAttention,
    )
    assert result.swapped[0] == first
    swapped = {entry.name: entry.new for entry in result.swapped}
    assert swapped["own.self_attn"] is seqkern.nn.MultiheadAttention
    theirs = {getattr(torch.nn, name) for name in NAMES}
    assert not {type(module) for module in model.modules()} & theirs
    assert (repr(model), list(model.state_dict())) == (text, keys)
    assert all(p is parameters[name] for name, p in model.named_parameters())
    torch.testing.assert_close(results(model, x), expected)
    assert len(calls) == 2
    copy.deepcopy(model)(x)
    again = seqkern.convert(model)
    assert again.swapped == []


@every_name
def test_convert_gives_what_the_constructor_gives(name: str) -> None:
    theirs, ours = build(name)
    seqkern.convert(theirs)
    assert [type(m) for m in theirs.modules()] == [type(m) for m in ours.modules()]
    for converted, built in zip(theirs.modules(), ours.modules(), strict=True):
        assert attributes(converted) == attributes(built)


def test_subclasses_may_override_the_blocks() -> None:
    class OnOurs(seqkern.nn.TransformerEncoderLayer):
        def _ff_block(self, x: Tensor) -> Tensor:
            return super()._ff_block(x).mul(0.5)

    theirs = Own(8, 2, 12, 0.0, batch_first=True, dtype=F64)
    ours = OnOurs(8, 2, 12, 0.0, batch_first=True, dtype=F64)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 4, 8, dtype=F64)
    torch.testing.assert_close(results(ours, x), results(theirs, x))
