"""seqkern.nn's attention layers: what becomes of masks, rows without keys, nested tensors."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import seqkern.nn
import seqkern.nn.attention
from seqkern.testing.tolerance import assert_within_budget

F64 = torch.float64

# torch.nn warns of layers that its fast path does not take, and PyTorch of nested tensors.
pytestmark = [
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
]


def pair(name: str, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """torch's module and ours with the same weights, in float64; no weight is zero."""
    theirs = getattr(torch.nn, name)(*args, dtype=F64, **kwargs)
    ours = getattr(seqkern.nn, name)(*args, dtype=F64, **kwargs)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def stack(kind: str, layers: int = 2, **kwargs: Any) -> Any:
    """Our stack ("Encoder" or "Decoder") with E = 8."""
    layer = getattr(seqkern.nn, f"Transformer{kind}Layer")(8, 2, 12, dtype=F64, **kwargs)
    return getattr(seqkern.nn, f"Transformer{kind}")(layer, layers)


def causal_mask(T: int, kind: str) -> Tensor:
    mask = torch.ones(T, T, dtype=torch.bool).triu(1)
    return mask if kind == "bool" else torch.zeros(T, T, dtype=F64).masked_fill(mask, -torch.inf)


# ---- what goes to the op ------------------------------------------------------------------


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The keywords of every call of the op, which is made nevertheless."""
    calls = []
    real = seqkern.nn.attention.attention

    def record(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return real(*args, **kwargs)

    monkeypatch.setattr(seqkern.nn.attention, "attention", record)
    return calls


def test_masks_go_to_the_op_as_what_they_are(seen: list[dict[str, Any]]) -> None:
    B, H, T = 2, 3, 4
    ours = seqkern.nn.MultiheadAttention(6, H, batch_first=True)
    x = torch.randn(B, T, 6)
    causal = causal_mask(T, "bool")
    padding, floating = torch.zeros(B, T, dtype=torch.bool), torch.randn(B * H, T, T)
    for kwargs in (
        {"key_padding_mask": padding},
        {"attn_mask": floating, "key_padding_mask": padding},
        {"attn_mask": causal},
        {"attn_mask": causal, "is_causal": True},
        {"attn_mask": causal, "is_causal": True, "key_padding_mask": padding},
        {"attn_mask": floating.clone().requires_grad_(), "is_causal": True},
    ):
        ours(x, x, x, need_weights=False, **kwargs)

    def shape(mask: Tensor | None) -> Any:
        return None if mask is None else tuple(mask.shape)

    assert [(c["causal"], shape(c["mask"]), shape(c["bias"])) for c in seen] == [
        (None, (B, 1, 1, T), None),
        (None, (B, 1, 1, T), (B, H, T, T)),
        (None, (1, 1, T, T), None),
        ("top_left", None, None),
        ("top_left", (B, 1, 1, T), None),
        (None, None, (B, H, T, T)),
    ]


@pytest.mark.parametrize("kind", ["bool", "-inf"])
def test_stacks_find_out_that_a_mask_is_causal(kind: str, seen: list[dict[str, Any]]) -> None:
    mask = causal_mask(5, kind)
    x = torch.randn(5, 2, 8, dtype=F64)
    encoder = stack("Encoder", 1)
    decoder = stack("Decoder", 1)
    encoder(x, mask=mask)
    decoder(x, x, tgt_mask=mask)
    assert [call["causal"] for call in seen] == ["top_left", "top_left", None]
    seen.clear()
    mask[1, 0] = mask[0, 1]
    encoder(x, mask=mask)
    encoder(x, mask=causal_mask(5, kind)[None].expand(4, 5, 5))
    encoder(x, mask=causal_mask(5, kind), is_causal=False)
    learnt = causal_mask(5, "-inf").requires_grad_()
    encoder(x, mask=learnt).sum().backward()
    assert learnt.grad is not None
    assert [call["causal"] for call in seen] == [None] * 4


def test_beside_padding_of_a_memory_the_mask_is_read() -> None:
    theirs, ours = pair("MultiheadAttention", 6, 3, batch_first=True)
    x, memory = torch.randn(2, 3, 6, dtype=F64), torch.randn(2, 5, 6, dtype=F64)
    kwargs = {
        "attn_mask": torch.ones(3, 5, dtype=torch.bool).triu(3),  # the last two corners meet
        "key_padding_mask": torch.arange(5) >= torch.tensor([[5], [3]]),
        "need_weights": False,
        "is_causal": True,
    }
    expected = theirs(x, memory, memory, **kwargs)[0]
    torch.testing.assert_close(ours(x, memory, memory, **kwargs)[0], expected)


@pytest.mark.parametrize(
    "case", ["plain", "gradient", "switched off", "training", "not nested", "left"]
)
def test_when_padding_is_left_out(case: str) -> None:
    """Zeros at padded positions under torch.nn's conditions, and only then."""
    theirs, ours = (
        package.TransformerEncoder(
            package.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True),
            2,
            enable_nested_tensor=case != "not nested",
        )
        for package in (torch.nn, seqkern.nn)
    )
    ours.load_state_dict(theirs.state_dict())
    theirs.train(case == "training"), ours.train(case == "training")
    x, padding = torch.randn(2, 4, 8), torch.arange(4) >= torch.tensor([[4], [2]])
    padding = padding.flip(1) if case == "left" else padding
    results = []
    torch.backends.mha.set_fastpath_enabled(case != "switched off")
    try:
        for module in (theirs, ours):
            with torch.set_grad_enabled(case == "gradient"):
                results.append(module(x, src_key_padding_mask=padding))
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    expected, actual = (r[padding] for r in results)
    assert torch.equal(expected == 0, actual == 0)
    assert (actual == 0).all() == (case == "plain")
    torch.testing.assert_close(results[1], results[0])


def test_padding_is_computed_under_autocast() -> None:
    """torch.nn's condition; on the CPU torch.nn itself looks at the GPU's autocast, and raises."""
    ours = stack("Encoder", batch_first=True, dropout=0.0).float()
    x, padding = torch.randn(2, 4, 8), torch.arange(4) >= torch.tensor([[4], [2]])
    with torch.autocast("cpu", torch.bfloat16):
        expected = ours.train()(x, src_key_padding_mask=padding)
        with torch.no_grad():
            actual = ours.eval()(x, src_key_padding_mask=padding)
    torch.testing.assert_close(actual, expected)


def test_finite_padding_is_added_on_every_path() -> None:
    ours = stack("Encoder", batch_first=True).eval()
    x, padding = torch.randn(2, 4, 8, dtype=F64), torch.randn(2, 4, dtype=F64)
    padding[0] = 0
    padding[1, :2] = 0
    with_gradient = ours(x, src_key_padding_mask=padding)
    with torch.no_grad():
        torch.testing.assert_close(ours(x, src_key_padding_mask=padding), with_gradient)


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("which", ["key_padding_mask", "attn_mask"])
def test_floating_masks_under_autocast(which: str, need_weights: bool, cast: torch.dtype) -> None:
    """What torch.nn takes: every floating mask but one of float64, whichever dtype autocast has."""
    theirs, ours = torch.nn.MultiheadAttention(8, 2), seqkern.nn.MultiheadAttention(8, 2)
    ours.load_state_dict(theirs.state_dict())
    x, mask = torch.randn(4, 4, 8), torch.randn(4, 4)

    def run(module: Any, mask: Tensor) -> dict[str, Tensor]:
        with torch.autocast("cpu", cast):
            return {"o": module(x, x, x, need_weights=need_weights, **{which: mask})[0]}

    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        given = mask.to(dtype)
        wide = {which: given.double(), "need_weights": need_weights}
        exact = {"o": copy.deepcopy(theirs).double()(*[x.double()] * 3, **wide)[0]}
        assert_within_budget(run(ours, given), exact, [run(theirs, given)], cast)
    for module in (theirs, ours):
        with pytest.raises(RuntimeError):
            run(module, mask.double())


# ---- fully masked rows --------------------------------------------------------------------


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("kind", ["bool", "-inf"])
@pytest.mark.parametrize("which", ["key_padding_mask", "attn_mask"])
def test_rows_without_keys_are_zeros(which: str, kind: str, need_weights: bool) -> None:
    _, ours = pair("MultiheadAttention", 6, 3, batch_first=True)
    x = torch.randn(2, 4, 6, dtype=F64, requires_grad=True)
    mask = torch.zeros((2, 4) if which == "key_padding_mask" else (4, 4), dtype=torch.bool)
    mask[1] = True
    if kind == "-inf":
        mask = torch.zeros(mask.shape, dtype=F64).masked_fill(mask, -torch.inf)
    output, weights = ours(x, x, x, need_weights=need_weights, **{which: mask})
    empty = output[1] if which == "key_padding_mask" else output[:, 1]
    assert torch.equal(empty, ours.out_proj.bias.expand_as(empty))
    if need_weights:
        assert not (weights[1] if which == "key_padding_mask" else weights[:, 1]).any()
    gradients = torch.autograd.grad(output.sum(), [x, *ours.parameters()])
    assert all(g.isfinite().all() for g in gradients)
    if which == "key_padding_mask":
        assert not gradients[0][1].any()


@pytest.mark.parametrize("training", [False, True])
def test_sequences_of_padding_alone_spoil_nothing(training: bool) -> None:
    ours = stack("Encoder", batch_first=True, dropout=0.0)
    ours.train(training)
    x = torch.randn(3, 4, 8, dtype=F64, requires_grad=True)
    padding = torch.tensor([[False] * 4, [True] * 4, [False, False, True, True]])
    output = ours(x, src_key_padding_mask=padding)
    gradients = torch.autograd.grad(output[[0, 2]].sum(), [x, *ours.parameters()])
    assert output.isfinite().all()
    assert all(g.isfinite().all() for g in gradients)
    alone = ours(x[:1], src_key_padding_mask=padding[:1])
    torch.testing.assert_close(output[:1], alone)
    with torch.no_grad():
        nothing = ours(x[:1], src_key_padding_mask=padding[1:2])
    assert nothing.isfinite().all()
    assert nothing.any() == training  # in eval mode without gradient padding comes out as zeros


# ---- nested tensors -----------------------------------------------------------------------

LENGTHS = (3, 0, 5, 1)
LAYOUTS = {"strided": torch.strided, "jagged": torch.jagged}


def nested(sequences: list[Tensor], layout: str) -> Tensor:
    return torch.nested.as_nested_tensor(sequences, layout=LAYOUTS[layout])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nested_equals_torchs_fast_path(layout: str) -> None:
    theirs, ours = pair("MultiheadAttention", 8, 2, batch_first=True)
    their_layer, our_layer = pair("TransformerEncoderLayer", 8, 2, 12, batch_first=True)
    for module in (theirs, ours, their_layer, our_layer):
        module.eval()
    parts = [torch.randn(n, 8, dtype=F64) for n in LENGTHS]
    strided, x = nested(parts, "strided"), nested(parts, layout)
    with torch.no_grad():
        for average in (True, False):
            expected, weights = theirs(strided, strided, strided, average_attn_weights=average)
            actual, our_weights = ours(x, x, x, average_attn_weights=average)
            torch.testing.assert_close(our_weights, weights)
            torch.testing.assert_close(actual.unbind(), expected.unbind())
        actual, none = ours(x, x, x, need_weights=False)
        torch.testing.assert_close(actual.unbind(), expected.unbind())
        assert none is None
        assert actual.layout == x.layout
        actual, expected = our_layer(x), their_layer(strided)
        torch.testing.assert_close(actual.unbind(), expected.unbind())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("need_weights", [False, True])
def test_nested_cross_attention_equals_one_sequence_after_another(
    layout: str, need_weights: bool
) -> None:
    """torch.nn has neither cross-attention nor training of nested tensors."""
    _, ours = pair("MultiheadAttention", 8, 2, kdim=6, vdim=5)
    sizes = [*zip((8, 6, 5), (LENGTHS, (2, 4, 0, 1), (2, 4, 0, 1)), strict=True)]
    leaves = [[torch.randn(n, E, dtype=F64, requires_grad=True) for n in ns] for E, ns in sizes]
    q, k, v = (nested(parts, layout) for parts in leaves)
    if layout == "jagged":  # key and value have to share their offsets
        v = torch.nested.nested_tensor_from_jagged(torch.cat(leaves[2]), k.offsets())
    rows = torch.cat(ours(q, k, v, need_weights=need_weights)[0].unbind())
    dense = [ours(*parts, need_weights=False)[0] for parts in zip(*leaves, strict=True)]
    torch.testing.assert_close(rows, torch.cat(dense))
    inputs = [t for parts in leaves for t in parts] + list(ours.parameters())
    actual = torch.autograd.grad(rows.sin().sum(), inputs)
    torch.testing.assert_close(actual, torch.autograd.grad(torch.cat(dense).sin().sum(), inputs))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nested_encoder_gradients(layout: str) -> None:
    ours = stack("Encoder", batch_first=True, dropout=0.0)
    parts = [torch.randn(n, 8, dtype=F64, requires_grad=True) for n in LENGTHS]
    rows = torch.cat(ours(nested(parts, layout)).unbind())
    dense = torch.cat([ours(part) for part in parts if part.size(0)])
    torch.testing.assert_close(rows, dense)
    inputs = [*ours.parameters(), parts[0], parts[2]]
    actual = torch.autograd.grad(rows.sin().sum(), inputs)
    torch.testing.assert_close(actual, torch.autograd.grad(dense.sin().sum(), inputs))


def test_nested_input_that_is_refused() -> None:
    x = nested([torch.randn(n, 8) for n in LENGTHS], "jagged")
    other = nested([torch.randn(n, 8) for n in LENGTHS], "jagged")
    dense, mask = torch.randn(4, 5, 8), torch.zeros(4, 5, dtype=torch.bool)
    ours = seqkern.nn.MultiheadAttention(8, 2, batch_first=True)
    for match, inputs, kwargs in (
        ("no masks", (x, x, x), {"key_padding_mask": mask}),
        ("no masks", (x, x, x), {"attn_mask": mask}),
        ("key must be nested", (x, dense, dense), {}),
        ("query must be nested", (dense, x, x), {}),
        ("same lengths", (x, x, other), {}),
        ("dimension 1, got 2", (x.transpose(1, 2),) * 3, {}),
    ):
        with pytest.raises(AssertionError, match=match):
            ours(*inputs, **kwargs)
    with pytest.raises(AssertionError, match="add_zero_attn"):
        seqkern.nn.MultiheadAttention(8, 2, add_zero_attn=True)(x, x, x)
    one = nested([torch.randn(3, 8)], "jagged")
    for need_weights in (False, True):
        for q, k in ((one, x), (x, one)):
            with pytest.raises(RuntimeError, match="batch size of query"):
                ours(q, k, k, need_weights=need_weights)


# ---- errors -------------------------------------------------------------------------------

X, M = torch.randn(2, 4, 8), torch.zeros(4, 4, dtype=torch.bool)

# Calls of MultiheadAttention(8, 2, batch_first=True).
WRONG_CALLS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "1-D query": ((X[0, 0],) * 3, {}),
    "4-D query": ((X[None],) * 3, {}),
    "2-D key": ((X, X[0], X[0]), {}),
    "3-D key without batch": ((X[0], X, X), {}),
    "query features": ((X[..., :6], X, X), {}),
    "key features": ((X, X[..., :6], X[..., :6]), {}),
    "value features": ((X, X, X[..., :6]), {}),
    "value length": ((X, X, X[:, :3]), {}),
    "key batch": ((X, X[:1], X[:1]), {}),
    "query dtype": ((X.double(),) * 3, {}),
    "query is None": ((None, X, X), {}),
    "query is a list": (([[1.0]], X, X), {}),
    "integer mask": ((X,) * 3, {"attn_mask": M.long()}),
    "integer padding mask": ((X,) * 3, {"key_padding_mask": M[:2].long()}),
    "1-D mask": ((X,) * 3, {"attn_mask": M[0]}),
    "mask size": ((X,) * 3, {"attn_mask": M[:3]}),
    "mask heads": ((X,) * 3, {"attn_mask": M[None].expand(2, 4, 4)}),
    "mask heads without batch": ((X[0],) * 3, {"attn_mask": M[None].expand(4, 4, 4)}),
    "mask dtype": ((X,) * 3, {"attn_mask": M.double()}),
    "1-D padding mask": ((X,) * 3, {"key_padding_mask": M[0]}),
    "2-D padding mask without batch": ((X[0],) * 3, {"key_padding_mask": M[:2]}),
    "padding mask batch": ((X,) * 3, {"key_padding_mask": M[:3]}),
    "padding mask length": ((X,) * 3, {"key_padding_mask": M[:2, :3]}),
    "is_causal without mask": ((X,) * 3, {"is_causal": True}),
    "unknown argument": ((X,) * 3, {"heads": 2}),
}


def raised(call: Any) -> type[BaseException]:
    with pytest.raises(Exception) as caught:  # noqa: PT011 - the type is the result
        call()
    return caught.type


@pytest.mark.parametrize("case", WRONG_CALLS)
def test_wrong_call_raises_the_type_that_torch_raises(case: str) -> None:
    args, kwargs = WRONG_CALLS[case]
    kwargs = {"need_weights": False, **kwargs}
    theirs = torch.nn.MultiheadAttention(8, 2, batch_first=True)
    ours = seqkern.nn.MultiheadAttention(8, 2, batch_first=True)
    assert raised(lambda: ours(*args, **kwargs)) is raised(lambda: theirs(*args, **kwargs))


def test_wrong_sizes_of_separate_projections() -> None:
    theirs = torch.nn.MultiheadAttention(8, 2, kdim=5, vdim=3, batch_first=True)
    ours = seqkern.nn.MultiheadAttention(8, 2, kdim=5, vdim=3, batch_first=True)
    k, v = X[..., :5], X[..., :3]
    for args in ((X, X, v), (X, k, k), (X, k, v[:, :3]), (X[..., :6], k, v)):
        assert raised(lambda: ours(*args)) is raised(lambda: theirs(*args))  # noqa: B023 - at once


def test_is_causal_without_mask_is_refused_on_every_path() -> None:
    """torch.nn's fast path computes without any mask."""
    for module in (
        seqkern.nn.MultiheadAttention(8, 2, batch_first=True).eval(),
        stack("Encoder", batch_first=True).float().eval(),
    ):
        args = (X,) * 3 if isinstance(module, torch.nn.MultiheadAttention) else (X,)
        with torch.no_grad(), pytest.raises(RuntimeError, match="attn_mask"):
            module(*args, is_causal=True)


def test_messages_name_the_argument_and_what_came() -> None:
    ours = seqkern.nn.MultiheadAttention(8, 2, batch_first=True)
    for match, kwargs in (
        (r"attn_mask must be \(4, 4\), got \(3, 4\)", {"attn_mask": M[:3]}),
        (r"key_padding_mask must be \(B, Tk\) = \(2, 4\)", {"key_padding_mask": M}),
        (r"floating mask must be torch.float32 .* got torch.float64", {"attn_mask": M.double()}),
        (r"attn_mask must be boolean or floating, got torch.int64", {"attn_mask": M.long()}),
    ):
        with pytest.raises((AssertionError, RuntimeError), match=match):
            ours(X, X, X, **kwargs)
    with pytest.raises(AssertionError, match=r"mask must be boolean or floating"):
        stack("Encoder", batch_first=True).float()(X, mask=M.long())
    with pytest.raises(AssertionError, match=r"embed_dim = 8 features, got \(2, 4, 6\)"):
        ours(X[..., :6], X, X)


@pytest.mark.parametrize(
    ("name", "args", "kwargs"),
    [
        ("MultiheadAttention", (0, 2), {}),
        ("MultiheadAttention", (8, 3), {}),
        ("MultiheadAttention", (8,), {}),
        ("MultiheadAttention", (8, 2), {"heads": 2}),
        ("TransformerEncoderLayer", (8, 3), {}),
        ("TransformerEncoderLayer", (8, 2), {"activation": "tanh"}),
        ("TransformerDecoderLayer", (8, 2), {"activation": "tanh"}),
        ("TransformerDecoderLayer", (8, 2), {"dropout": 1.5}),
        ("TransformerEncoder", (), {}),
        ("Transformer", (8, 3), {}),
        ("Transformer", (8, 2), {"unknown": 1}),
    ],
)
def test_wrong_construction_raises_the_type_that_torch_raises(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    expected = raised(lambda: getattr(torch.nn, name)(*args, **kwargs))
    assert raised(lambda: getattr(seqkern.nn, name)(*args, **kwargs)) is expected


def test_stack_warns_as_torch_does() -> None:
    texts = []
    for package in (torch.nn, seqkern.nn):
        layer = package.TransformerEncoderLayer(8, 2, 12)
        with pytest.warns(UserWarning, match="enable_nested_tensor") as caught:
            package.TransformerEncoder(layer, 1)
        texts.append([str(w.message) for w in caught])
    assert texts[0] == texts[1]
