"""seqkern.nn's attention and Transformer layers against torch.nn: values, gradients, masks."""

import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import seqkern.nn
from seqkern.testing import assert_within_budget

F64 = torch.float64

# torch.nn warns of a mask pair of two dtypes, of layers that its fast path does not take, and of
# the nested tensors that it makes itself.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Support for mismatched"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
]


def pair(name: str, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """torch's module and ours with the same weights, in float64 unless said; no weight is zero."""
    kwargs = {"dtype": F64, **kwargs}
    with warnings.catch_warnings():  # see above; pytest's marks do not reach hypothesis' setup
        warnings.simplefilter("ignore")
        theirs = getattr(torch.nn, name)(*args, **kwargs)
        ours = getattr(seqkern.nn, name)(*args, **kwargs)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def stacks(kind: str, layers: int = 2, *, norm: bool = True, **kwargs: Any) -> tuple[Any, Any]:
    """A stack ("Encoder" or "Decoder") of each package with E = 8, on torch's weights."""
    built = []
    for package in (torch.nn, seqkern.nn):
        layer = getattr(package, f"Transformer{kind}Layer")(8, 2, 12, dtype=F64, **kwargs)
        last = torch.nn.LayerNorm(8, dtype=F64) if norm else None
        built.append(getattr(package, f"Transformer{kind}")(layer, layers, last))
    with torch.no_grad():
        for parameter in built[0].parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    built[1].load_state_dict(built[0].state_dict())
    return built[0], built[1]


def run(module: Any, inputs: list[Any], kwargs: dict[str, Any], seed: int = 3) -> list[Any]:
    """The results and all gradients of a loss that weighs every output differently.

    What is one tensor in ``inputs`` stays one, and floating masks take gradients too, but for one
    that is said to be causal: torch.nn drops it and its gradient.
    """
    leaves: dict[int, Tensor] = {}
    kwargs = dict(kwargs)
    promised = {n: kwargs.pop(n) for n in ("attn_mask",) if kwargs.get("is_causal")}

    def leaf(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        return leaves.setdefault(id(value), value.detach().clone().requires_grad_())

    arguments = [leaf(v) for v in inputs]
    options = {k: leaf(v) for k, v in kwargs.items()} | promised
    torch.manual_seed(seed)
    result = module(*arguments, **options)
    outputs = [t for t in (result if isinstance(result, tuple) else (result,)) if t is not None]
    generator = torch.Generator().manual_seed(1)
    loss = torch.stack(
        [(t * torch.randn(t.shape, generator=generator, dtype=F64)).sum() for t in outputs]
    ).sum()
    wanted = [*leaves.values(), *module.parameters()]
    gradients = torch.autograd.grad(loss, wanted, allow_unused=True)
    return [t.detach() for t in outputs] + list(gradients)


def assert_equal_runs(theirs: Any, ours: Any, inputs: list[Any], kwargs: dict[str, Any]) -> None:
    expected, actual = run(theirs, inputs, kwargs), run(ours, inputs, kwargs)
    for a, e in zip(actual, expected, strict=True):
        if e is None or a is None:  # no gradient is a gradient of zero
            a, e = (torch.zeros((), dtype=F64) if t is None else t.abs().max() for t in (a, e))
        torch.testing.assert_close(a, e)


def assert_equal_values(theirs: Any, ours: Any, inputs: list[Any], kwargs: dict[str, Any]) -> None:
    results = []
    for module in (theirs, ours):
        torch.manual_seed(3)
        with torch.no_grad():
            results.append(module(*inputs, **kwargs))
    torch.testing.assert_close(results[1], results[0])


def causal_mask(T: int, kind: str, dtype: torch.dtype = F64) -> Tensor:
    mask = torch.ones(T, T, dtype=torch.bool).triu(1)
    return mask if kind == "bool" else torch.zeros(T, T, dtype=dtype).masked_fill(mask, -torch.inf)


def make_mask(kind: str | None, *shape: int) -> Tensor | None:
    """Leaves the first key to every query: what torch.nn does without any is tested below."""
    if kind is None:
        return None
    excluded = torch.rand(shape) < 0.4
    excluded[..., 0] = False
    if kind == "bool":
        return excluded
    mask = torch.randn(shape, dtype=F64)
    return mask.masked_fill(excluded, -torch.inf) if kind == "-inf" else mask


KINDS = st.sampled_from([None, "bool", "float", "-inf"])


@st.composite
def attention_calls(draw: st.DrawFn) -> dict[str, Any]:
    """Constructor arguments of MultiheadAttention, and a call that suits them."""
    H = draw(st.sampled_from([1, 2, 3]))
    E = H * draw(st.integers(1, 4))
    form = draw(st.sampled_from(["self", "one memory", "three inputs"]))
    sizes = {} if form == "self" or draw(st.booleans()) else {"kdim": 5, "vdim": 7}
    if form == "one memory" and sizes:
        sizes["vdim"] = 5
    return {
        "args": (E, H),
        "kwargs": {
            "dropout": draw(st.sampled_from([0.0, 0.3, 1.0])),
            "bias": draw(st.booleans()),
            "add_bias_kv": draw(st.booleans()),
            "add_zero_attn": draw(st.booleans()),
            "batch_first": draw(st.booleans()),
            **sizes,
        },
        "form": form,
        "sizes": (draw(st.integers(1, 3)), draw(st.integers(1, 6)), draw(st.integers(1, 6))),
        "batched": draw(st.booleans()),
        "padding": draw(KINDS),
        "mask": draw(KINDS),
        "per_head": draw(st.booleans()),
        "causal": draw(st.sampled_from([None, None, "bool", "-inf"])) if form == "self" else None,
        "need_weights": draw(st.booleans()),
        "average": draw(st.booleans()),
        "training": draw(st.booleans()),
    }


def make_attention_call(call: dict[str, Any]) -> tuple[list[Tensor], dict[str, Any]]:
    """Inputs and keywords of a drawn call."""
    (E, H), kwargs, (B, Tq, Tk) = call["args"], call["kwargs"], call["sizes"]
    batched = call["batched"]
    Tk = Tq if call["form"] == "self" else Tk

    def draw(T: int, features: int) -> Tensor:
        if not batched:
            return torch.randn(T, features, dtype=F64)
        rows = (B, T) if kwargs["batch_first"] else (T, B)
        return torch.randn(*rows, features, dtype=F64)

    query = draw(Tq, E)
    key = query if call["form"] == "self" else draw(Tk, kwargs.get("kdim", E))
    same = call["form"] != "three inputs"
    value = key if same else draw(Tk, kwargs.get("vdim", E))
    shape = ((B if batched else 1) * H, Tq, Tk) if call["per_head"] else (Tq, Tk)
    mask = make_mask(call["mask"], *shape)
    if call["causal"]:
        mask = causal_mask(Tq, call["causal"])
    return [query, key, value], {
        "key_padding_mask": make_mask(call["padding"], *((B, Tk) if batched else (Tk,))),
        "attn_mask": mask,
        "need_weights": call["need_weights"],
        "average_attn_weights": call["average"],
        "is_causal": bool(call["causal"]),
    }


@settings(max_examples=120, deadline=None, derandomize=True)
@given(attention_calls())
def test_attention_values_and_gradients_equal_torch(call: dict[str, Any]) -> None:
    theirs, ours = pair("MultiheadAttention", *call["args"], **call["kwargs"])
    theirs.train(call["training"]), ours.train(call["training"])
    inputs, kwargs = make_attention_call(call)
    assert_equal_runs(theirs, ours, inputs, kwargs)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(attention_calls())
def test_attention_without_gradient_equals_torchs_fast_path(call: dict[str, Any]) -> None:
    """torch.nn computes otherwise in eval mode without gradient, where it can."""
    call["kwargs"] |= {"batch_first": True, "add_bias_kv": False, "add_zero_attn": False}
    theirs, ours = pair("MultiheadAttention", *call["args"], **call["kwargs"])
    theirs.eval(), ours.eval()
    inputs, kwargs = make_attention_call(call)
    with torch.no_grad():
        expected, actual = theirs(*inputs, **kwargs), ours(*inputs, **kwargs)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_is_within_the_budget(dtype: torch.dtype, need_weights: bool) -> None:
    exact, ours = pair("MultiheadAttention", 32, 4)
    theirs = torch.nn.MultiheadAttention(32, 4, dtype=dtype)
    theirs.load_state_dict(exact.state_dict())
    ours = seqkern.nn.MultiheadAttention(32, 4, dtype=dtype)
    ours.load_state_dict(exact.state_dict())
    exact.load_state_dict(theirs.state_dict())  # the rounded weights
    x = torch.randn(17, 3, 32, dtype=dtype)
    padding = torch.arange(17) >= torch.tensor([[17], [5], [1]])
    kwargs = {"key_padding_mask": padding, "need_weights": need_weights}
    expected = run(theirs, [x] * 3, kwargs)
    actual = run(ours, [x] * 3, kwargs)
    wanted = run(exact, [x.double()] * 3, kwargs)
    names = [str(i) for i in range(len(actual))]
    actual, expected, wanted = (dict(zip(names, r)) for r in (actual, expected, wanted))
    assert_within_budget(actual, wanted, [expected], dtype)


# ---- layers and stacks --------------------------------------------------------------------


@st.composite
def layer_calls(draw: st.DrawFn) -> dict[str, Any]:
    """Constructor arguments of the layers, and a call that suits them.

    Batch first, torch.nn's attention gives its result in another order in memory, in which the
    dropout that follows takes its random numbers; that is compared by distribution below.
    """
    T = draw(st.integers(1, 5))
    batch_first = draw(st.booleans())
    return {
        "kwargs": {
            "dropout": 0.0 if batch_first else draw(st.sampled_from([0.0, 0.3])),
            "activation": draw(st.sampled_from(["relu", "gelu", torch.tanh])),
            "batch_first": batch_first,
            "norm_first": draw(st.booleans()),
            "bias": draw(st.booleans()),
        },
        "sizes": (draw(st.integers(1, 3)), T, draw(st.integers(1, 5))),
        "batched": draw(st.booleans()),
        "padding": (draw(KINDS), draw(KINDS)),
        "mask": (draw(KINDS), draw(KINDS)),
        "causal": draw(st.sampled_from([None, "bool", "-inf"])),
        "training": draw(st.booleans()),
    }


def make_sequences(call: dict[str, Any]) -> tuple[Tensor, Tensor, list[Any], list[Any]]:
    """Target, memory, their padding masks and their attention masks."""
    B, T, S = call["sizes"]

    def draw(n: int) -> Tensor:
        if not call["batched"]:
            return torch.randn(n, 8, dtype=F64)
        rows = (B, n) if call["kwargs"]["batch_first"] else (n, B)
        return torch.randn(*rows, 8, dtype=F64)

    first = (B,) if call["batched"] else ()
    paddings = [make_mask(kind, *first, n) for kind, n in zip(call["padding"], (T, S), strict=True)]
    masks = [make_mask(kind, T, n) for kind, n in zip(call["mask"], (T, S), strict=True)]
    if call["causal"]:
        masks[0] = causal_mask(T, call["causal"])
    return draw(T), draw(S), paddings, masks


@settings(max_examples=40, deadline=None, derandomize=True)
@given(layer_calls())
def test_encoder_values_and_gradients_equal_torch(call: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as above
        theirs, ours = stacks("Encoder", **call["kwargs"])
        theirs.train(call["training"]), ours.train(call["training"])
        src, _, paddings, masks = make_sequences(call)
        kwargs = {"mask": masks[0], "src_key_padding_mask": paddings[0]}
        if call["causal"]:
            # torch.nn drops the gradient of a mask that it finds to be causal.
            assert_equal_values(theirs, ours, [src], kwargs)
            return
        assert_equal_runs(theirs, ours, [src], kwargs)
        options = {"src_mask": masks[0], "src_key_padding_mask": paddings[0]}
        assert_equal_runs(theirs.layers[0], ours.layers[0], [src], options)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(layer_calls())
def test_decoder_values_and_gradients_equal_torch(call: dict[str, Any]) -> None:
    theirs, ours = stacks("Decoder", **call["kwargs"])
    theirs.train(call["training"]), ours.train(call["training"])
    tgt, memory, paddings, masks = make_sequences(call)
    kwargs = {
        "tgt_mask": masks[0],
        "memory_mask": masks[1],
        "tgt_key_padding_mask": paddings[0],
        "memory_key_padding_mask": paddings[1],
        "tgt_is_causal": False,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as above
        assert_equal_runs(theirs, ours, [tgt, memory], kwargs)
        if call["causal"]:
            kwargs["tgt_is_causal"] = None
            assert_equal_values(theirs, ours, [tgt, memory], kwargs)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(layer_calls(), st.sampled_from(["right", "any", "all"]), st.booleans())
def test_encoder_without_gradient_equals_torchs_fast_path(
    call: dict[str, Any], padded: str, norm: bool
) -> None:
    """Values at padded positions too: zeros where torch.nn leaves the padding out."""
    call["kwargs"] |= {"batch_first": True}
    B, T, _ = call["sizes"]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # as above
        theirs, ours = stacks("Encoder", norm=norm, **call["kwargs"])
        theirs.eval(), ours.eval()
        x = torch.randn(B, T, 8, dtype=F64)
        mask = torch.rand(B, T) < 0.5
        if padded == "right":
            mask = torch.arange(T) >= torch.randint(1, T + 1, (B, 1))
        mask[:, 0] = False
        if padded == "all":  # torch.nn fails if there is no real position in the batch
            mask[0] = B > 1
            mask[1:, 0] = False
        if call["padding"][0] == "-inf":
            mask = torch.zeros(B, T, dtype=F64).masked_fill(mask, -torch.inf)
        expected = theirs(x, src_key_padding_mask=mask)
        actual = ours(x, src_key_padding_mask=mask)
        # Where nothing is left to attend to, torch.nn's paths disagree, and one gives NaN.
        defined = ~(mask.bool().all(1) & expected.isnan().flatten(1).any(1))
        torch.testing.assert_close(actual[defined], expected[defined])
        assert not actual.isnan().any()


@settings(max_examples=15, deadline=None, derandomize=True)
@given(layer_calls())
def test_transformer_equals_torch(call: dict[str, Any]) -> None:
    theirs, ours = pair("Transformer", 8, 2, 1, 2, 12, **call["kwargs"])
    theirs.train(call["training"]), ours.train(call["training"])
    tgt, memory, paddings, masks = make_sequences(call)
    kwargs = {
        "tgt_mask": masks[0],
        "memory_mask": masks[1],
        "src_key_padding_mask": paddings[1],
        "tgt_key_padding_mask": paddings[0],
        "memory_key_padding_mask": paddings[1],
        "tgt_is_causal": False,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as above
        assert_equal_runs(theirs, ours, [memory, tgt], kwargs)


@pytest.mark.parametrize("kwargs", [{}, {"norm_first": True}])
def test_dropout_batch_first_has_the_distribution_of_torch(kwargs: dict[str, Any]) -> None:
    n = 20000
    theirs, ours = pair(
        "TransformerEncoderLayer", 4, 2, 6, 0.4, batch_first=True, dtype=torch.float32, **kwargs
    )
    x = torch.randn(1, 3, 4).expand(n, 3, 4)
    with torch.no_grad():
        expected, actual = theirs(x), ours(x)
    # Means and second moments of n independent samples, each within 5 of its standard errors.
    for power in (1, 2):
        a, e = actual.double() ** power, expected.double() ** power
        error = (a.var(0) / n + e.var(0) / n).sqrt()
        assert ((a.mean(0) - e.mean(0)).abs() <= 5 * error).all()
    assert (actual.var(0) > 0.01).all()
