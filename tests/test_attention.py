"""seqkern's attention functions: PyTorch as the peer, and each argument's meaning."""

import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import seqkern
from seqkern.reference import attention as reference
from seqkern.testing import assert_within_budget, neighbours
from tests.attention_inputs import draw, qkv

# ---- scaled_dot_product_attention ---------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    leading=st.sampled_from([(), (3,), (2, 3), (2, 1, 3)]),
    sizes=st.tuples(*[st.integers(1, 6)] * 4),
    mask=st.sampled_from(["none", "bool", "float", "row", "causal"]),
    scale=st.sampled_from([None, 0.5]),
)
def test_sdpa_is_pytorchs(leading, sizes, mask, scale) -> None:
    """Values and gradients, over ranks, sizes and masks; float64, so that all paths agree."""
    Tq, Tk, D, Dv = sizes
    inputs = [
        draw(*leading, T, d, dtype=torch.float64, grad=True)
        for T, d in ((Tq, D), (Tk, D), (Tk, Dv))
    ]
    masks = {
        "bool": torch.rand(*leading[-1:], Tq, Tk) > 0.3,
        "float": draw(Tq, Tk, dtype=torch.float64),
        "row": draw(*leading, 1, Tk, dtype=torch.float64),
    }
    options = {"scale": scale, "is_causal": mask == "causal", "attn_mask": masks.get(mask)}
    ours = seqkern.scaled_dot_product_attention(*inputs, **options)
    theirs = F.scaled_dot_product_attention(*inputs, **options)
    torch.testing.assert_close(ours, theirs)
    do = torch.randn_like(theirs)
    torch.testing.assert_close(
        torch.autograd.grad(ours, inputs, do), torch.autograd.grad(theirs, inputs, do)
    )
    with torch.no_grad():
        torch.testing.assert_close(
            seqkern.scaled_dot_product_attention(*inputs, **options), theirs.detach()
        )


def test_sdpa_groups_heads_on_demand() -> None:
    q, k, v = qkv(Hkv=2)
    ours = seqkern.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    torch.testing.assert_close(ours, F.scaled_dot_product_attention(q, k, v, enable_gqa=True))
    with pytest.raises(ValueError, match="enable_gqa"):
        seqkern.scaled_dot_product_attention(q, k, v)


SHAPES = {
    "value for all batches": ((2, 3, 4), (2, 5, 4), (5, 4)),
    "other heads of values": ((2, 4, 3, 8), (2, 2, 5, 8), (2, 1, 5, 8)),
    "mask of keys": ((2, 3, 2, 4, 8), (2, 3, 2, 5, 8), (2, 3, 2, 5, 8)),
}


@pytest.mark.parametrize("case", SHAPES)
def test_sdpa_takes_the_shapes_that_pytorch_takes(case: str) -> None:
    inputs = [draw(*shape, dtype=torch.float64, grad=True) for shape in SHAPES[case]]
    mask = draw(5, dtype=torch.float64) if "mask" in case else None
    options = {"enable_gqa": "heads" in case, "scale": torch.tensor(0.4)}
    runs = []
    for attend in (seqkern.scaled_dot_product_attention, F.scaled_dot_product_attention):
        o = attend(*inputs, mask, **options)
        runs.append((o, *torch.autograd.grad(o.pow(2).sum(), inputs)))
    torch.testing.assert_close(*runs)


def test_sdpa_casts_its_mask_under_autocast() -> None:
    """To the dtype of the products, as PyTorch's function does."""
    inputs = qkv(grad=True)
    mask = draw(7, 9, dtype=torch.float16, grad=True)
    runs = []
    for m in (mask, mask.bfloat16()):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            o = seqkern.scaled_dot_product_attention(*inputs, m)
        runs.append((o, *torch.autograd.grad(o.float().pow(2).sum(), (*inputs, mask))))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert runs[0][-1].dtype == torch.float16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        theirs = F.scaled_dot_product_attention(*inputs, mask)
    cast = [t.detach().bfloat16().double() for t in (*inputs, mask)]
    exact = {"o": F.scaled_dot_product_attention(*cast)}
    assert_within_budget({"o": runs[0][0]}, exact, [{"o": theirs}], torch.bfloat16)


def test_what_is_added_is_cast_under_autocast() -> None:
    """A bias and sinks of query's 16 bits stay what they may be where autocast has the others."""
    q, k, v = qkv(dtype=torch.float16)
    bias, sinks = draw(7, 9, dtype=torch.float16), draw(4, dtype=torch.float16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = seqkern.attention(q, k, v, bias=bias, sinks=sinks)
        cast = seqkern.attention(q, k, v, bias=bias.bfloat16(), sinks=sinks.bfloat16())
    assert torch.equal(actual, cast)
    assert actual.dtype == torch.bfloat16


def test_sdpa_derives_twice() -> None:
    """Where PyTorch's own kernel on the CPU does not."""
    inputs = qkv(Tq=3, Tk=3, D=4, Dv=4, dtype=torch.float64, grad=True)
    mask = draw(1, 4, 3, 3, dtype=torch.float64, grad=True)
    assert torch.autograd.gradgradcheck(
        lambda q, k, v, m: seqkern.scaled_dot_product_attention(q, k, v, m), (*inputs, mask)
    )


@pytest.mark.parametrize("grad", [False, True])
def test_dropout_without_a_seed_is_pytorchs_on_the_cpu(grad: bool) -> None:
    q, k, v = qkv(grad=grad)
    torch.manual_seed(3)
    ours = seqkern.scaled_dot_product_attention(q, k, v, dropout_p=0.4)
    torch.manual_seed(3)
    theirs = F.scaled_dot_product_attention(q, k, v, dropout_p=0.4)
    torch.testing.assert_close(ours, theirs)
    assert not torch.allclose(ours, F.scaled_dot_product_attention(q, k, v), atol=1e-2)
    dropped = seqkern.scaled_dot_product_attention(q, k, v, dropout_p=1.0)
    assert torch.equal(dropped, torch.zeros_like(ours))


def test_dropout_does_not_coarsen_a_bias() -> None:
    """Scores of a thousand that cancel but for a fraction, which bfloat16 would lose."""
    q, k = torch.zeros(1, 1, 1, 8), torch.zeros(1, 1, 2, 8)
    v = torch.eye(2)[None, None].repeat(1, 1, 1, 4)
    bias = torch.tensor([1000.0, 1001.0])
    expected = bias.softmax(-1)
    kept = set()
    for _ in range(40):
        o = seqkern.attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), bias=bias, dropout_p=0.5)
        kept |= {round(x, 2) for x in o.flatten().tolist()}
    # Each weight is dropped or doubled.
    assert kept == {0.0, *(round(x, 2) for x in (2 * expected).bfloat16().tolist())}


def test_fully_masked_rows_are_zero_and_take_no_gradient() -> None:
    inputs = qkv(grad=True)
    mask = torch.ones(2, 1, 7, 9, dtype=torch.bool)
    mask[0, :, 3] = False
    mask[1] = False
    for bias in (mask, torch.zeros(2, 1, 7, 9).masked_fill(~mask, -torch.inf)):
        o = seqkern.scaled_dot_product_attention(*inputs, bias)
        assert torch.equal(o[0, :, 3], torch.zeros(4, 8))
        assert torch.equal(o[1], torch.zeros(4, 7, 8))
        dq, dk, dv = torch.autograd.grad(o.sum(), inputs)
        assert not any(g.isnan().any() for g in (dq, dk, dv))
        assert not dq[0, :, 3].any()
        assert not dk[1].any()


# ---- attention ----------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [None, "top_left", "bottom_right"])
def test_padding_is_never_read(causal: str | None) -> None:
    """NaN beyond the lengths changes nothing, and a row equals the same row alone, unpadded."""
    q, k, v = qkv()
    q_lens, k_lens = torch.tensor([5, 7]), torch.tensor([9, 4])
    do = torch.randn(2, 4, 7, 8)
    for b in range(2):
        q[b, :, q_lens[b] :] = torch.nan
        k[b, :, k_lens[b] :] = torch.nan
        v[b, :, k_lens[b] :] = torch.nan
        do[b, :, q_lens[b] :] = torch.nan
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    options = {"causal": causal, "return_lse": True}
    o, lse = seqkern.attention(q, k, v, q_lens=q_lens, k_lens=k_lens, **options)
    grads = torch.autograd.grad(o, (q, k, v), do)
    for b in range(2):
        n, m = int(q_lens[b]), int(k_lens[b])
        alone = [t[b : b + 1, :, :length].detach() for t, length in ((q, n), (k, m), (v, m))]
        alone = [t.requires_grad_() for t in alone]
        o_alone, lse_alone = seqkern.attention(*alone, **options)
        torch.testing.assert_close(o[b : b + 1, :, :n], o_alone)
        torch.testing.assert_close(lse[b : b + 1, :, :n], lse_alone)
        assert not o[b, :, n:].any()
        assert (lse[b, :, n:] == -torch.inf).all()
        for g, one, length in zip(
            grads, torch.autograd.grad(o_alone, alone, do[b : b + 1, :, :n]), (n, m, m)
        ):
            torch.testing.assert_close(g[b : b + 1, :, :length], one)
            assert not g[b, :, length:].any()


def test_alignment_of_unequal_lengths() -> None:
    """Zero queries and keys make every row the mean of the values it sees."""
    v = torch.arange(1.0, 6.0).view(1, 1, 5, 1)
    q, k = torch.zeros(1, 1, 3, 1), torch.zeros(1, 1, 5, 1)
    seen = {
        ("top_left", None): [[1], [1, 2], [1, 2, 3]],
        ("bottom_right", None): [[1, 2, 3], [1, 2, 3, 4], [1, 2, 3, 4, 5]],
        ("bottom_right", (1, None)): [[2, 3], [3, 4], [4, 5]],
        (None, (0, 1)): [[3, 4], [4, 5], [5]],
        ("top_left", (1, 0)): [[1], [1, 2], [2, 3]],
        (None, None): [[1, 2, 3, 4, 5]] * 3,
    }
    for (causal, window), values in seen.items():
        o = seqkern.attention(q, k, v, causal=causal, window=window)
        expected = [sum(row) / len(row) for row in values]
        torch.testing.assert_close(o.flatten(), torch.tensor(expected))


@pytest.mark.parametrize("causal", [None, "top_left", "bottom_right"])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_window_may_be_wider_than_any_sequence(causal: str | None, softcap: float | None) -> None:
    """Up to numbers that are no 64 bits any more, or wrap when a position is added."""
    q, k, v = qkv()
    options = {"causal": causal, "softcap": softcap}
    lens = torch.tensor([9, 4])
    whole = seqkern.attention(q, k, v, window=(20, 20), **options)
    cached = seqkern.attention_decode(q, k, v, k_lens=lens, window=(20, 20), **options)
    for far in (sys.maxsize, 2**63):
        window = far, far
        o = seqkern.attention(q, k, v, window=window, **options)
        assert torch.equal(o, whole)
        o = seqkern.attention_decode(q, k, v, k_lens=lens, window=window, **options)
        assert torch.equal(o, cached)
    ops, rule = torch.ops.seqkern, (causal, sys.maxsize, sys.maxsize, softcap or 0.0)
    o, _ = ops.attention(q, k, v, *[None] * 9, *rule, 0.0, 8**-0.5, 7, 9, True)
    assert torch.equal(o, whole)
    o, _ = ops.attention_decode(q, k, v, lens.int(), None, None, None, *rule, 8**-0.5, 0)
    assert torch.equal(o, cached)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("causal", [None, "top_left"])
def test_alibi_by_its_formula(causal: str | None, dtype: torch.dtype) -> None:
    """Press et al.'s, over distances at which a slope's last bits show, and on slopes that float32
    does not hold."""
    Tq, Tk = 1000, 3
    exact = draw(1, 2, Tq, 4, dtype=torch.float64), draw(1, 2, Tk, 4, dtype=torch.float64)
    slopes = torch.tensor([2**-0.5, 0.3], dtype=torch.float64)

    def formula(q: Tensor, k: Tensor, slopes: Tensor) -> dict[str, Tensor]:
        i, j = torch.arange(Tq)[:, None], torch.arange(Tk)
        p = i if causal else i + Tk - Tq
        s = 0.5 * (q @ k.mT) - slopes[:, None, None] * (p - j).abs()
        s = s.masked_fill(j > p, -torch.inf) if causal else s
        return {"o": s.softmax(-1) @ k, "lse": s.logsumexp(-1)}

    q, k, given = (t.to(dtype) for t in (*exact, slopes))
    options = {"causal": causal, "alibi_slopes": given, "return_lse": True}
    rule = causal, -1, -1, 0.0, 0.0, 0.5, Tq, Tk, True
    runs = [formula(*ts) for ts in neighbours([t.float() for t in (*exact, slopes)])]
    for o, lse in (
        seqkern.attention(q, k, k, **options),
        seqkern.attention_decode(q, k, k, k_lens=torch.tensor([Tk]), **options),
        reference.attention(q, k, k, *[None] * 4, given, *[None] * 4, *rule),
    ):
        assert_within_budget({"o": o, "lse": lse}, formula(*exact, slopes), runs, dtype)


def test_a_seed_decides_what_is_dropped() -> None:
    q, k, v = qkv(Tq=40, Tk=50)
    runs = [
        seqkern.attention(q, k, v, dropout_p=0.3, dropout_seed=seed)
        for seed in (5, torch.tensor([5]), 6)
    ]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    kept = reference.keep_mask(torch.tensor([5]), (2, 4, 40, 50), 0.3).float().mean()
    # Five standard deviations of the mean of 16,000 draws.
    assert abs(kept - 0.7) < 5 * (0.21 / 16000) ** 0.5


def test_a_seed_is_not_copied_from_the_host() -> None:
    """Such a copy waits for the GPU, and a CUDA graph cannot capture it."""
    called = []

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.append(func)
            return func(*args, **(kwargs or {}))

    with FakeTensorMode(), Calls():
        q = torch.empty(1, 2, 3, 8, device="cuda")
        seqkern.attention(q, q, q, dropout_p=0.5, dropout_seed=3)
    assert torch.ops.seqkern.attention.default in called
    assert torch.ops.aten._to_copy.default not in called


def test_philox_against_its_published_test_vector() -> None:
    """Salmon et al. 2011, kat_vectors of Philox-4x32 with 7 rounds: counter and key all ones."""
    ones = torch.tensor(0xFFFFFFFF)
    zero = torch.tensor(0)
    assert reference._philox((zero,) * 4, (zero, zero)).item() == 0x5F6FB709
    assert reference._philox((ones,) * 4, (ones, ones)).item() == 0x5207DDC2


@pytest.mark.parametrize("causal", [None, "top_left", "bottom_right"])
def test_packed_equals_padded(causal: str | None) -> None:
    lens = (3, 0, 7), (5, 2, 0)
    cu_q, cu_k = (torch.tensor([0, *n]).cumsum(0) for n in lens)
    q, k, v = draw(10, 4, 8), draw(7, 2, 8), draw(7, 2, 6)
    bias = draw(3, 1, 1, 5, grad=True)
    options = {"causal": causal, "bias": bias, "softcap": 3.0, "return_lse": True}
    dropout = {"dropout_p": 0.3, "dropout_seed": 4}
    o, lse = seqkern.attention_varlen(q, k, v, cu_q, cu_k, **options, **dropout)
    padded, padded_lse = seqkern.attention(
        *(torch.nn.utils.rnn.pad_sequence(t.split(n), True).transpose(1, 2)
          for t, n in ((q, lens[0]), (k, lens[1]), (v, lens[1]))),
        q_lens=torch.tensor(lens[0]),
        k_lens=torch.tensor(lens[1]),
        **options,
        **dropout,
    )  # fmt: skip
    for b, n in enumerate(lens[0]):
        rows = slice(int(cu_q[b]), int(cu_q[b]) + n)
        torch.testing.assert_close(o[rows], padded[b, :, :n].transpose(0, 1))
        torch.testing.assert_close(lse[:, rows], padded_lse[b, :, :n])


def test_nested_tensors_of_the_jagged_layout() -> None:
    rows = [draw(n, 4, 8) for n in (3, 5, 1)]
    nested = torch.nested.nested_tensor(rows, layout=torch.jagged, requires_grad=True)
    o = seqkern.attention_varlen(nested, nested, nested, causal="top_left")
    (grad,) = torch.autograd.grad(o.values().sum(), nested)
    for one, result, g in zip(rows, o.unbind(), grad.unbind()):
        x = one.transpose(0, 1)[None].requires_grad_()
        expected = seqkern.attention(x, x, x, causal="top_left")
        torch.testing.assert_close(result.transpose(0, 1)[None], expected)
        (expected_grad,) = torch.autograd.grad(expected.sum(), x)
        torch.testing.assert_close(g.transpose(0, 1)[None], expected_grad)


def test_nested_tensors_with_holes() -> None:
    """What lies between the sequences takes no part and no gradient."""
    lengths = torch.tensor([2, 0, 1])
    leaves = [draw(7, 4, 8, grad=True) for _ in range(3)]
    bounds = torch.tensor([0, 3, 5, 7])
    nested = torch.nested.nested_tensor_from_jagged
    q, k, v = (nested(x, bounds, lengths=lengths) for x in leaves)
    o = seqkern.attention_varlen(q, k, v, causal="top_left")
    alone = []
    for first, n in zip(bounds.tolist(), lengths.tolist()):
        one = [x[None, first : first + n].transpose(1, 2) for x in leaves]
        alone.append(seqkern.attention(*one, causal="top_left")[0].transpose(0, 1))
    torch.testing.assert_close(o.values(), torch.cat(alone))
    grads = torch.autograd.grad(o.values().sum(), leaves)
    torch.testing.assert_close(grads, torch.autograd.grad(torch.cat(alone).sum(), leaves))
    other = nested(leaves[2], torch.tensor([0, 1, 6, 7]))
    with pytest.raises(ValueError, match=r"nested k and v must have the same lengths.*0, 2, 2, 3"):
        seqkern.attention_varlen(q, k, other)


def test_nested_keys_and_values_that_were_made_one_by_one() -> None:
    """Their sizes compare as different, though their lengths are equal."""
    parts = [[draw(n, 4, 8) for n in (2, 3)] for _ in range(3)]
    q, k, v = (torch.nested.nested_tensor(part, layout=torch.jagged) for part in parts)
    o = seqkern.attention_varlen(q, k, v)
    for actual, *one in zip(o.unbind(), *parts, strict=True):
        one = [x[None].transpose(1, 2) for x in one]
        torch.testing.assert_close(actual, seqkern.attention(*one)[0].transpose(0, 1))


def test_heads_that_were_split_off_a_projection_join_without_a_copy() -> None:
    x = draw(2, 7, 3, 4, 8)
    q, k, v = (t.transpose(1, 2) for t in x.unbind(2))
    for options in ({}, {"softcap": 2.0}):
        o = seqkern.attention(q, k, v, **options)
        assert o.transpose(1, 2).is_contiguous()


def test_results_may_come_back_in_another_layout() -> None:
    """From hooks that keep saved tensors elsewhere; PyTorch's kernel takes rows of unit stride."""
    given, runs = [t.detach() for t in qkv()], []
    do = torch.randn(2, 4, 7, 8)
    for pack in (torch.clone, lambda t: t.mT.contiguous().mT if t.dim() == 4 else t):
        inputs = [t.clone().requires_grad_() for t in given]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            o = seqkern.attention(*inputs)
        runs.append(torch.autograd.grad(o, inputs, do))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("name", ["o", "do"])
def test_backward_stays_within_a_tensor_of_one_element(name: str) -> None:
    q, k, v = qkv()
    rule = *[None] * 9, None, -1, -1, 0.0, 0.0, 0.5, 7, 9, True
    o, lse = torch.ops.seqkern.attention(q, k, v, *rule)
    memory = torch.full((o.numel(),), torch.nan)
    memory[0] = 0.5
    runs = []
    for t in (memory[0].expand(o.shape), torch.full(o.shape, 0.5)):
        do, saved = (t, o) if name == "do" else (torch.ones_like(o), t)
        args = do, None, saved, lse, q, k, v, *rule, True, True, False
        runs.append(torch.ops.seqkern.attention_backward(*args))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("in_dims", [(0, 0, 0), (1, None, None), (None, 2, 0)])
def test_vmap(in_dims) -> None:
    shapes = (2, 4, 3, 8), (2, 2, 5, 8), (2, 2, 5, 8)
    inputs = []
    for shape, dim in zip(shapes, in_dims):
        inputs.append(draw(*shape) if dim is None else draw(*shape[:dim], 3, *shape[dim:]))

    def attend(q, k, v):
        return seqkern.attention(
            q, k, v, causal="bottom_right", k_lens=torch.tensor([5, 2]), return_lse=True
        )

    o, lse = torch.vmap(attend, in_dims)(*inputs)
    for i in range(3):
        one = [t if d is None else t.select(d, i) for t, d in zip(inputs, in_dims)]
        torch.testing.assert_close((o[i], lse[i]), attend(*one))


def test_per_sample_gradients() -> None:
    q, k, v = qkv(B=3, Tq=4, Tk=5)

    def loss(q, k, v):
        return seqkern.attention(q[None], k[None], v[None], softcap=2.0).pow(2).sum()

    per_sample = torch.vmap(torch.func.grad(loss, (0, 1, 2)))(q, k, v)
    for i in range(3):
        torch.testing.assert_close(
            tuple(g[i] for g in per_sample), torch.func.grad(loss, (0, 1, 2))(q[i], k[i], v[i])
        )


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_forward_mode() -> None:
    q, k, v = qkv(Tq=3, Tk=4, dtype=torch.float64)
    tangent = torch.randn_like(q)
    _, derived = torch.func.jvp(lambda q: seqkern.attention(q, k, v), (q,), (tangent,))
    eps = 1e-6
    ends = [seqkern.attention(q + sign * eps * tangent, k, v) for sign in (1, -1)]
    torch.testing.assert_close(derived, (ends[0] - ends[1]) / (2 * eps), rtol=1e-5, atol=1e-7)


def test_export() -> None:
    class Model(torch.nn.Module):
        def forward(self, q, k, v, lens):
            return seqkern.attention(q, k, v, k_lens=lens, causal="bottom_right")

    inputs = (*qkv(), torch.tensor([9, 4], dtype=torch.int32))
    exported = torch.export.export(Model(), inputs).module()
    torch.testing.assert_close(exported(*inputs), Model()(*inputs))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_trace_of_packed_sequences_refuses_longer_ones() -> None:
    """The longest is a constant of the trace."""

    def attend(rows: Tensor, bounds: Tensor) -> Tensor:
        return seqkern.attention_varlen(rows, rows, rows, bounds, bounds)

    rows = draw(5, 2, 8)
    traced = torch.jit.trace(attend, (rows, torch.tensor([0, 3, 5])))
    shorter, longer = torch.tensor([0, 2, 5]), torch.tensor([0, 1, 5])
    assert torch.equal(traced(rows, shorter), attend(rows, shorter))
    with pytest.raises(RuntimeError, match="at least the longest sequence, 4, got 3"):
        traced(rows, longer)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_trace_of_sdpa_takes_other_lengths() -> None:
    """No size is compared, which would warn, and be a constant of the trace."""
    attend, (q, k, v) = seqkern.scaled_dot_product_attention, qkv()
    traced = torch.jit.trace(attend, (q, k, v))
    shorter = q, k[:, :, :4], v[:, :, :4]
    assert torch.equal(traced(*shorter), attend(*shorter))
