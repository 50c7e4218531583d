"""AdditiveAttention, DotAttention and GeneralAttention: values, exchange, parameters, bad input."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import seqkern
from seqkern.nn import AdditiveAttention, DotAttention, GeneralAttention
from tests.additive_inputs import F64, assert_close, draw

QUERY, KEY, SIZE = 6, 4, 5
LAYERS: dict[str, Callable[..., Any]] = {
    "additive": lambda **o: AdditiveAttention(QUERY, KEY, SIZE, **o),
    "unbiased": lambda **o: AdditiveAttention(QUERY, KEY, SIZE, bias=False, **o),
    "normalised": lambda **o: AdditiveAttention(QUERY, KEY, SIZE, normalize=True, **o),
    "general": lambda **o: GeneralAttention(QUERY, KEY, **o),
    "dot": lambda **o: DotAttention(),
}
every_layer = pytest.mark.parametrize("name", LAYERS)


def key_size(name: str) -> int:
    return QUERY if name == "dot" else KEY


def make(name: str, dtype: torch.dtype = F64) -> Any:
    """A layer of which every parameter differs from its initial value."""
    layer = LAYERS[name](dtype=dtype)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.3 * torch.rand_like(p))
    return layer


def inputs_of(name: str, Tq: int = 3, dtype: torch.dtype = F64, grad: bool = True) -> list[Tensor]:
    """query, key and value."""
    options: dict[str, Any] = {"dtype": dtype, "grad": grad}
    shapes = (2, Tq, QUERY), (2, 7, key_size(name)), (2, 7, 3)
    return [draw(*shape, **options) for shape in shapes]


def eager(layer: Any, query: Tensor, key: Tensor, value: Tensor, live: Tensor | float = 0.0):
    """Context and weights by the papers' formulas; live is added to the scores."""
    if isinstance(layer, AdditiveAttention):
        v = layer.v if layer.g is None else layer.g * layer.v / layer.v.norm()
        w = query @ layer.w.weight.T + (0 if layer.w.bias is None else layer.w.bias)
        scores = (w.unsqueeze(2) + (key @ layer.u.weight.T).unsqueeze(1)).tanh() @ v
    elif isinstance(layer, GeneralAttention):
        scores = query @ layer.u.weight @ key.mT
    else:
        scores = query @ key.mT
    scores = scores + live
    empty = (scores == -torch.inf).all(-1, keepdim=True)
    weights = scores.masked_fill(empty, 0).softmax(-1).masked_fill(empty, 0)
    return weights @ value, weights


def gradients(layer: Any, results, inputs) -> list[Tensor]:
    """Results, and gradients of the inputs and the parameters, for drawn gradients of results."""
    torch.manual_seed(1)
    of = [*inputs, *layer.parameters()]
    return [*results, *torch.autograd.grad(results, of, [torch.randn_like(t) for t in results])]


@every_layer
@pytest.mark.parametrize("Tq", [1, 3])
def test_values_and_gradients(name: str, Tq: int) -> None:
    layer, inputs = make(name), inputs_of(name, Tq)
    ours, expected = layer(*inputs, need_weights=True), eager(layer, *inputs)
    assert_close(gradients(layer, ours, inputs), gradients(layer, expected, inputs))
    context = layer(*inputs)
    assert_close(
        gradients(layer, [context], inputs), gradients(layer, eager(layer, *inputs)[:1], inputs)
    )


@every_layer
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("form", ["lens", "bool", "row", "both", "float"])
def test_masks(name: str, need_weights: bool, form: str) -> None:
    layer, inputs = make(name), inputs_of(name)
    k_lens = torch.tensor([5, 0])
    real = (torch.arange(7) < k_lens.unsqueeze(1)).unsqueeze(1).expand(2, 3, 7)
    mask = torch.rand(2, 3, 7) > 0.4
    row = torch.arange(7) != 2
    added = draw(2, 3, 7)
    options, live = {
        "lens": ({"k_lens": k_lens}, real),
        "bool": ({"mask": mask}, mask),
        "row": ({"mask": row}, row.expand(2, 3, 7)),
        "both": ({"k_lens": k_lens.int(), "mask": mask}, mask & real),
        "float": ({"mask": added}, None),
    }[form]
    infinite = (
        added if live is None else torch.zeros(2, 3, 7, dtype=F64).masked_fill(~live, -torch.inf)
    )
    count = 1 + need_weights
    expected = eager(layer, *inputs, infinite)[:count]
    ours = layer(*inputs, **options, need_weights=need_weights)
    ours = ours if need_weights else (ours,)
    derived = [*inputs, added] if form == "float" else inputs
    assert_close(gradients(layer, ours, derived), gradients(layer, expected, derived))


@every_layer
def test_values_are_the_keys_where_none_are_given(name: str) -> None:
    layer, (query, key, _) = make(name), inputs_of(name)
    inputs = [query, key]
    assert_close(
        gradients(layer, [layer(query, key)], inputs),
        gradients(layer, eager(layer, query, key, key)[:1], inputs),
    )


@every_layer
def test_keys_projected_before(name: str) -> None:
    """In a loop in which the keys stay: the same results and gradients."""
    layer, inputs = make(name), inputs_of(name)
    query, key, value = inputs
    u_key = layer.u(key)
    steps = [layer(q, key, value, u_key=u_key) for q in query.split(1, 1)]
    assert_close(
        gradients(layer, [torch.cat(steps, 1)], inputs),
        gradients(layer, eager(layer, *inputs)[:1], inputs),
    )


@every_layer
def test_padding_may_hold_nan(name: str) -> None:
    layer, inputs = make(name).requires_grad_(False), inputs_of(name, grad=False)
    query, key, value = inputs
    k_lens = torch.tensor([7, 2])
    beyond = (torch.arange(7) >= k_lens.unsqueeze(1)).unsqueeze(-1)
    spoilt = [query, key.masked_fill(beyond, torch.nan), value.masked_fill(beyond, torch.nan)]
    for need_weights in (False, True):
        runs = []
        for tensors in (inputs, spoilt):
            leaves = [t.clone().requires_grad_() for t in tensors]
            out = layer(*leaves, k_lens=k_lens, need_weights=need_weights)
            context = out[0] if need_weights else out
            runs.append([context, *torch.autograd.grad(context.sum(), leaves)])
        assert_close(*runs)


@pytest.mark.parametrize("normalize", [False, True])
def test_additive_parameters(normalize: bool) -> None:
    layer = AdditiveAttention(QUERY, KEY, 64, normalize=normalize)
    shapes = {"w.weight": (64, QUERY), "w.bias": (64,), "u.weight": (64, KEY), "v": (64,)}
    shapes |= {"g": ()} if normalize else {}
    assert {n: tuple(p.shape) for n, p in layer.state_dict().items()} == shapes
    assert dict(layer.named_parameters()).keys() == shapes.keys()
    assert 0.05 < float(layer.v.abs().max().detach()) <= 64**-0.5
    if normalize:
        torch.testing.assert_close(layer.g, layer.v.norm())
    before = {n: p.clone() for n, p in layer.state_dict().items()}
    layer.reset_parameters()
    assert not any(torch.equal(p, before[n]) for n, p in layer.state_dict().items())
    assert float(layer.v.abs().max().detach()) <= 64**-0.5


def test_initialisation_under_a_seed() -> None:
    """w, u and v are drawn in this order, like two Linears and a uniform vector."""
    torch.manual_seed(5)
    layer = AdditiveAttention(QUERY, KEY, SIZE)
    torch.manual_seed(5)
    w, u = torch.nn.Linear(QUERY, SIZE), torch.nn.Linear(KEY, SIZE, bias=False)
    v = torch.empty(SIZE).uniform_(-(SIZE**-0.5), SIZE**-0.5)
    pairs = (layer.w.weight, w.weight), (layer.w.bias, w.bias), (layer.u.weight, u.weight)
    assert all(torch.equal(a, b) for a, b in (*pairs, (layer.v, v)))


def test_normalising_changes_nothing_at_first() -> None:
    plain, normal = (
        AdditiveAttention(QUERY, KEY, SIZE, normalize=n, dtype=F64) for n in (False, True)
    )
    normal.load_state_dict(plain.state_dict() | {"g": plain.v.detach().norm()})
    inputs = inputs_of("additive")
    assert_close([plain(*inputs)], [normal(*inputs)])


@every_layer
def test_copies_and_files(name: str) -> None:
    layer, inputs = make(name), inputs_of(name)
    expected = layer(*inputs)
    fresh = LAYERS[name](dtype=F64)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    others = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), fresh
    for other in others:
        assert torch.equal(other(*inputs), expected)
        assert repr(other) == repr(layer)


@every_layer
def test_devices_and_dtypes(name: str) -> None:
    for p in LAYERS[name](device="meta", dtype=torch.float16).parameters():
        assert p.device.type == "meta"
        assert p.dtype == torch.float16
    half, inputs = make(name, torch.bfloat16), inputs_of(name, dtype=torch.bfloat16)
    context, weights = half(*inputs, need_weights=True)
    assert context.dtype == weights.dtype == torch.bfloat16
    exact = eager(copy.deepcopy(half).double(), *(t.double() for t in inputs))
    torch.testing.assert_close(context.double(), exact[0], rtol=5e-2, atol=5e-2)
    torch.testing.assert_close(half(*inputs).double(), exact[0], rtol=5e-2, atol=5e-2)


@every_layer
@pytest.mark.parametrize("need_weights", [False, True])
def test_autocast(name: str, need_weights: bool) -> None:
    layer, inputs = make(name, torch.float32), inputs_of(name, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(*inputs, need_weights=need_weights, k_lens=torch.tensor([7, 4]))
    context = out[0] if need_weights else out
    assert context.dtype == torch.bfloat16
    of = [*inputs, *layer.parameters()]
    grads = torch.autograd.grad(context.float().square().sum(), of)
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in grads)


@every_layer
@pytest.mark.parametrize("need_weights", [False, True])
def test_floating_masks_under_autocast(name: str, need_weights: bool) -> None:
    """16 bits of either kind are cast to those of autocast, and their gradient back."""
    layer, inputs = make(name, torch.float32), inputs_of(name, dtype=torch.float32)
    mask = draw(3, 7, dtype=torch.float16)
    runs = []
    for given in (mask, mask.bfloat16()):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = layer(*inputs, mask=given, need_weights=need_weights)
        context = out[0] if need_weights else out
        runs.append((context, *torch.autograd.grad(context.float().sum(), [*inputs, mask])))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert runs[0][-1].dtype == torch.float16
    wrong = "mask must be boolean, torch.bfloat16 or torch.float32, got torch.float64"
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(ValueError, match=f"^{type(layer).__name__}: {wrong}"),
    ):
        layer(*inputs, mask=mask.double(), need_weights=need_weights)


@pytest.mark.parametrize(
    ("name", "need_weights"), [("additive", False), ("normalised", True), ("general", False)]
)
def test_compile(name: str, need_weights: bool) -> None:
    """One graph for several sizes, with gradients."""
    layer = make(name)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for Tq in (3, 4, 2):
        inputs, k_lens = inputs_of(name, Tq), torch.tensor([6, 3])
        runs = []
        for call in (layer, compiled):
            out = call(*inputs, k_lens=k_lens, need_weights=need_weights)
            runs.append(gradients(layer, out if need_weights else (out,), inputs))
        assert_close(*runs)


def test_explain() -> None:
    query, key, value = inputs_of("additive")
    (found,) = seqkern.explain(make("additive"), query, key, value)
    assert found.op == "seqkern::additive_attention"
    (found,) = seqkern.explain(make("general"), query, key, value)
    assert found.op == "seqkern::attention"


# ---- bad arguments ------------------------------------------------------------------------


@every_layer
def test_refuses_by_name(name: str) -> None:
    layer, (query, key, value) = make(name), inputs_of(name)
    owner = type(layer).__name__
    projected = layer.u(key)
    wrong: list[tuple[tuple, dict, str]] = [
        ((query[0], key, value), {}, r"query must be \(B, Tq, \w+\), got \(3, 6\)"),
        ((query, key[:, 0], value), {}, r"key must be \(B, Tk, \w+\), got \(2"),
        ((query, key[..., :-1], value), {}, r"key must be \(B, Tk, \d\), got \(2, 7"),
        ((query, key, value[:, :-1]), {}, r"value must have the B, Tk = \(2, 7\) of key"),
        ((query, key, value[0]), {}, r"value must be \(B, Tk, D\)"),
        ((query, key), {"u_key": projected[:, 1:]}, r"u_key must have the B, Tk = \(2, 7\)"),
    ]
    for args, options, message in wrong:
        with pytest.raises(ValueError, match=f"{owner}: {message}"):
            layer(*args, **options)
    with pytest.raises(TypeError, match=f"{owner}: query must be a Tensor, got NoneType"):
        layer(None, key)
    for need_weights in (False, True):
        with pytest.raises(ValueError, match=f"^{owner}: query must have the batch size 2 of key"):
            layer(query[:1], key, value, need_weights=need_weights)
        for mask, error, message in [
            (1, TypeError, "a Tensor, got int"),
            (torch.ones(3, 6).bool(), ValueError, r"broadcast to .* \(2, 3, 7\), got \(1, 3, 6\)"),
            (torch.ones(9, 3, 7), ValueError, r"broadcast to .* \(2, 3, 7\), got \(9, 3, 7\)"),
            (torch.ones(1, 2, 3, 7), ValueError, r"broadcast to .* got \(1, 2, 3, 7\)"),
            (torch.ones(3, 7).int(), ValueError, "boolean, .* got torch.int32"),
            (torch.ones(3, 7).to("meta"), ValueError, "on the device of query, cpu, got meta"),
        ]:
            with pytest.raises(error, match=f"^{owner}: mask must .*{message}"):
                layer(query, key, value, mask=mask, need_weights=need_weights)
        for k_lens, error, message in [
            (torch.tensor([1, 2, 3]), ValueError, r"\(2,\), got \(3,\)"),
            (torch.tensor([1]), ValueError, r"\(2,\), got \(1,\)"),
            (torch.tensor([1.0, 2.0]), ValueError, "torch.int32 .*torch.int64, got torch.float32"),
            ([1, 2], TypeError, "a Tensor, got list"),
        ]:
            with pytest.raises(error, match=f"k_lens must be .*{message}"):
                layer(query, key, value, k_lens=k_lens, need_weights=need_weights)


@pytest.mark.parametrize("name", ["dot", "general"])
@pytest.mark.parametrize("need_weights", [False, True])
def test_refuses_lengths_beyond_the_keys(name: str, need_weights: bool) -> None:
    for k_lens in ([8, 1], [-1, 1]):
        with pytest.raises(ValueError, match=r"k_lens must be within \[0, 7\], got \["):
            make(name)(*inputs_of(name), k_lens=torch.tensor(k_lens), need_weights=need_weights)


def test_refuses_features_of_other_layers() -> None:
    query, key, value = inputs_of("additive")
    for name in ("additive", "general"):
        layer = make(name)
        with pytest.raises(ValueError, match=rf"query must be \(B, Tq, {QUERY}\)"):
            layer(query[..., :-1], key, value)
        with pytest.raises(ValueError, match=r"u_key must be \(B, Tk, \d\), got"):
            layer(query, key, value, u_key=layer.u(key)[..., :-1])


@pytest.mark.parametrize("sizes", [(0, 4, 5), (6, 0, 5), (6, 4, -1)])
def test_refuses_sizes(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="AdditiveAttention: sizes must be at least 1, got"):
        AdditiveAttention(*sizes)
    if sizes[2] > 0:
        with pytest.raises(ValueError, match="GeneralAttention: sizes must be at least 1, got 0"):
            GeneralAttention(*sizes[:2])


@pytest.mark.parametrize("wrong", ["x", 1.5, True])
def test_refuses_what_is_no_size(wrong: Any) -> None:
    for make_one in (AdditiveAttention, GeneralAttention):
        with pytest.raises(TypeError, match="sizes must be whole numbers, got"):
            make_one(wrong, *[4] * (2 if make_one is AdditiveAttention else 1))


@every_layer
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_refuses_another_dtype_or_device(name: str, need_weights: bool, place: int) -> None:
    layer, names = make(name), ("query", "key", "value")
    if name == "dot" and place == 0:
        names = ("key", "key", "value")  # it is compared with the query
    for change, message in [
        (lambda t: t.float(), r"must have the dtype of .* torch\.float\d+, got torch\.float\d+"),
        (lambda t: t.to("meta"), "must be on the device of .* (cpu|meta), got (cpu|meta)"),
    ]:
        given = inputs_of(name, grad=False)
        given[place] = change(given[place])
        owner = type(layer).__name__
        with pytest.raises(ValueError, match=f"^{owner}: {names[place]} {message}"):
            layer(*given, need_weights=need_weights)
