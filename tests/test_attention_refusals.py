"""What the attention functions and their raw ops refuse, and how they say so."""

import pytest
import torch
from torch.autograd import forward_ad

import seqkern
from tests.attention_inputs import qkv


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"causal": True}, TypeError, "top_left"),
        ({"causal": "left"}, ValueError, "causal must be"),
        ({"mask": torch.ones(7, 8, dtype=torch.bool)}, ValueError, "mask must broadcast"),
        ({"mask": torch.ones(7, 9)}, ValueError, "mask must be boolean"),
        ({"mask": torch.ones(1, 1, 1, 7, 9, dtype=torch.bool)}, ValueError, "mask must broadcast"),
        ({"bias": torch.ones(7, 9, dtype=torch.float64)}, ValueError, "bias must be"),
        ({"bias": torch.ones(7, 9, dtype=torch.int64)}, ValueError, "bias must be floating"),
        ({"bias": 1.0}, TypeError, "bias must be a Tensor"),
        ({"k_lens": torch.tensor([9.0, 9.0])}, ValueError, "k_lens must be"),
        ({"k_lens": torch.tensor([9])}, ValueError, r"k_lens must be \(2,\)"),
        ({"k_lens": torch.tensor([9, 10])}, ValueError, r"within \[0, 9\], got \[9, 10\]"),
        ({"q_lens": torch.tensor([-1, 2])}, ValueError, "q_lens must be within"),
        ({"window": 3}, TypeError, "window must be"),
        ({"window": (-2, 0)}, ValueError, "window must hold"),
        ({"window": (2.0, None)}, TypeError, "window must hold whole numbers"),
        ({"k_lens": torch.tensor([2**32 + 2, 1])}, ValueError, "k_lens must be within"),
        ({"k_lens": [9, 9]}, TypeError, "k_lens must be a Tensor, got list"),
        ({"softcap": -1.0}, ValueError, "softcap must be positive"),
        (
            {"softcap": torch.nn.Parameter(torch.ones(()))},
            TypeError,
            "softcap must be .* no gradient",
        ),
        ({"scale": torch.nn.Parameter(torch.ones(()))}, TypeError, "scale must be .* no gradient"),
        ({"scale": "x"}, TypeError, "scale must be a number, got str"),
        ({"scale": float("nan")}, ValueError, "scale must be finite, got nan"),
        ({"dropout_p": "x"}, TypeError, "dropout_p must be a number, got str"),
        ({"sinks": torch.zeros(3)}, ValueError, r"sinks must be \(4,\)"),
        ({"sinks": [0.0] * 4}, TypeError, "sinks must be a Tensor, got list"),
        ({"alibi_slopes": torch.zeros(3)}, ValueError, r"alibi_slopes must be \(H,\) = \(4,\)"),
        ({"alibi_slopes": [1.0] * 4}, TypeError, "alibi_slopes must be a Tensor, got list"),
        ({"alibi_slopes": torch.ones(4) > 0}, ValueError, "alibi_slopes must be floating"),
        ({"alibi_slopes": torch.ones(4) * 1j}, ValueError, "alibi_slopes must be floating"),
        ({"deterministic": "no"}, TypeError, "deterministic must be True or False, got 'no'"),
        ({"alibi_slopes": torch.zeros(4, requires_grad=True)}, ValueError, "no gradient"),
        ({"dropout_p": 1.0}, ValueError, "dropout_p must be in"),
        ({"dropout_p": 0.5, "dropout_seed": "x"}, TypeError, "dropout_seed must be"),
        ({"dropout_p": 0.5, "dropout_seed": 2**63}, ValueError, "dropout_seed must fit 64 bits"),
        (
            {"dropout_p": 0.5, "dropout_seed": torch.ones(1)},
            ValueError,
            "dropout_seed must be torch.int64, got torch.float32",
        ),
        (
            {"dropout_p": 0.5, "dropout_seed": torch.tensor([1, 2])},
            ValueError,
            r"dropout_seed must be \(1,\), got \(2,\)",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_bad_options(change: dict, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        seqkern.attention(*qkv(), **change)


@pytest.mark.parametrize("grad", [False, True])
def test_sdpa_refuses_a_mask_by_its_name(grad: bool) -> None:
    """What PyTorch's function refuses too, where it is asked first and where it is not."""
    attend, (q, k, v) = seqkern.scaled_dot_product_attention, qkv(grad=grad)
    for mask, error, match in [
        ([[True]], TypeError, "a Tensor, got list"),
        (torch.zeros(7, 9).double(), ValueError, r"torch.bool or torch.float32, got torch.float64"),
        (torch.zeros(7, 9).long(), ValueError, r"torch.bool or torch.float32, got torch.int64"),
        (torch.zeros(7, 8), ValueError, r"broadcast to .* = \(2, 4, 7, 9\), got \(7, 8\)"),
        (torch.zeros(3, 1, 7, 9), ValueError, r"broadcast to .* got \(3, 1, 7, 9\)"),
        (torch.zeros(1, 2, 4, 7, 9), ValueError, r"broadcast to .* got \(1, 2, 4, 7, 9\)"),
        (torch.zeros(7, 9, device="meta"), ValueError, "on the device of query, cpu, got meta"),
    ]:
        with pytest.raises(error, match=f"^scaled_dot_product_attention: attn_mask must .*{match}"):
            attend(q, k, v, mask)
    mask = torch.zeros(1, 4, 7, 9)
    with pytest.raises(ValueError, match=r"attn_mask must broadcast to .* = \(4, 7, 9\)"):
        attend(q[0], k[0], v[0], mask)


@pytest.mark.parametrize("grad", [False, True])
def test_sdpa_refuses_by_its_names(grad: bool) -> None:
    """PyTorch's kernel for the CPU reads beyond a key that is shorter than value, and leaves out
    keys where value is shorter."""
    attend, (q, k, v) = seqkern.scaled_dot_product_attention, qkv(grad=grad)
    nested = torch.nested.nested_tensor([*k.detach()], layout=torch.jagged)
    for args, match in [
        ((q, k[:, :, :4], v), r"value must have the length of key, 4, got \(2, 4, 9, 8\)"),
        ((q, k, v[:, :, :4]), r"value must have the length of key, 9, got \(2, 4, 4, 8\)"),
        ((q, k[..., :4], v), "key must have the head size 8 of query"),
        ((q, k, v.double()), "query, key and value must be of one .* torch.float64 for value"),
        ((q, k.to("meta"), v), "key must be on the device of query, cpu, got meta"),
        ((q, *(t[:1].expand(3, 4, 9, 8) for t in (k, v))), "leading sizes .* got .* 4, 9, 8"),
        ((q, nested, nested), "query, key and value must be nested all three, or none"),
    ]:
        with pytest.raises(ValueError, match=f"^scaled_dot_product_attention: .*{match}"):
            attend(*args)
    for options, match in [
        ({"scale": float("nan")}, "scale must be finite, got nan"),
        ({"dropout_p": 1.5}, r"dropout_p must be in \[0, 1\], got 1.5"),
        ({"dropout_p": float("nan")}, r"dropout_p must be in \[0, 1\], got nan"),
    ]:
        with pytest.raises(ValueError, match=f"^scaled_dot_product_attention: {match}"):
            attend(q, k, v, **options)
    with pytest.raises(ValueError, match="the 4 heads of query must be a multiple of the 3 of key"):
        attend(q, k[:, :3], v[:, :3], enable_gqa=True)


def test_bad_tensors() -> None:
    q, k, v = qkv()
    attend = seqkern.attention
    for args, error, match in [
        ((q[0], k, v), ValueError, r"q must be \(B, H, T, D\)"),
        ((q, k.double(), v), ValueError, "one floating-point dtype"),
        ((q, k[:1], v), ValueError, "one batch size"),
        ((q, k[..., :4], v), ValueError, "head size 8 of q"),
        ((q, k, v[:, :, :3]), ValueError, "length of k"),
        ((q, k[:, :3], v[:, :3]), ValueError, "multiple of the 3"),
        ((q, k, None), TypeError, "v must be a Tensor"),
        ((q.long(), k.long(), v.long()), ValueError, "floating-point"),
        (tuple(t.to(torch.float8_e4m3fn) for t in (q, k, v)), ValueError, "of 16, 32 or 64 bits"),
        ((torch.nested.nested_tensor([*q], layout=torch.jagged), k, v), ValueError, "a nested q"),
    ]:
        with pytest.raises(error, match=match):
            attend(*args)
    packed = [t.transpose(1, 2).flatten(0, 1) for t in (q, k, v)]
    cu = torch.tensor([0, 7, 14]), torch.tensor([0, 9, 18])
    assert seqkern.attention_varlen(*packed, *cu).shape == (14, 4, 8)
    for bounds, match in [
        ((None, cu[1]), "must be given"),
        ((cu[0], cu[1][:2]), r"cu_k must be \(3,\)"),
        ((cu[0] + 1, cu[1]), "must rise from 0"),
        ((cu[0], cu[1].flip(0)), "must rise from 0"),
        ((*cu, 6, 9), "max_q must be at least"),
        ((torch.tensor(14), cu[1]), r"cu_q must be \(B \+ 1,\), got \(\)"),
    ]:
        with pytest.raises(ValueError, match=match):
            seqkern.attention_varlen(*packed, *bounds)
    for bounds, match in [
        (([0, 7, 14], cu[1]), "cu_q must be a Tensor, got list"),
        ((*cu, 7.0, 9), "max_q must be a whole number, got 7.0"),
        ((*cu, 7, "9"), "max_k must be a whole number, got '9'"),
    ]:
        with pytest.raises(TypeError, match=match):
            seqkern.attention_varlen(*packed, *bounds)
    with pytest.raises(ValueError, match="max_q must fit 64 bits, got"):
        seqkern.attention_varlen(*packed, *cu, 2**63, 9)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_whole_numbers_under_autocast(name: str) -> None:
    """Autocast is for floating tensors, as in PyTorch's function: others are refused as ever."""
    given = dict(zip("qkv", qkv(), strict=True))
    given[name] = given[name].long()
    q, k, v = given.values()
    one, rows = zip(*((t[:, 0], t.transpose(1, 2).flatten(0, 1)) for t in (q, k, v)), strict=True)
    bounds, long = (torch.tensor([0, 7, 14]), torch.tensor([0, 9, 18])), "torch.int64"
    lens, empty = torch.tensor([4, 5]), torch.zeros(2, 4, 9, 8)
    public = {"q": "query", "k": "key", "v": "value"}[name]
    cached = {"k_new": k[:, :, :1], "v_new": v[:, :, :1], "k_lens": lens}
    of = {"q": "k_cache", "k": "k_new", "v": "v_new"}[name]
    for call, match in [
        (lambda: seqkern.attention(q, k, v), f"attention: .* {long} for {name}"),
        (lambda: seqkern.attention_varlen(*rows, *bounds), f"attention_varlen: .* for {name}"),
        (
            lambda: seqkern.scaled_dot_product_attention(q, k, v),
            f"scaled_dot_product_attention: .* {long} for {public}",
        ),
        (
            lambda: seqkern.additive_attention(*one, torch.ones(8)),
            f"additive_attention: {public} must .* got {long}",
        ),
        (
            lambda: seqkern.attention_decode(q, empty, empty.clone(), **cached),
            f"attention_decode: {of} must have the dtype of .*{long}",
        ),
    ]:
        for enabled in (False, True):
            with (
                torch.autocast("cpu", torch.bfloat16, enabled=enabled),
                pytest.raises(ValueError, match=f"^{match}"),
            ):
                call()


def test_raw_op_checks_again() -> None:
    """torch.ops.seqkern is open to anyone, and PyTorch's kernel divides by sizes of 0."""
    q, k, v = qkv()
    rest = None, -1, -1, 0.0, 0.0, 1.0
    with pytest.raises(ValueError, match="max_q, max_k must be"):
        torch.ops.seqkern.attention(q, k, v, *[None] * 9, *rest, 7, 8, True)
    o, lse = torch.ops.seqkern.attention(
        q, k[:, :, :0], v[:, :, :0], *[None] * 9, *rest, 7, 0, True
    )
    assert not o.any()
    assert (lse == -torch.inf).all()
    for dtype in (torch.complex64, torch.float64):
        extras = *[None] * 4, torch.ones(4, dtype=dtype), *[None] * 4
        with pytest.raises(ValueError, match=r"alibi_slopes must be torch\.float32, got"):
            torch.ops.seqkern.attention(q, k, v, *extras, *rest, 7, 9, True)


@pytest.mark.parametrize("name", ["do", "dlse", "o", "lse"])
def test_raw_backward_names_what_does_not_fit(name: str) -> None:
    q, k, v = qkv()
    args = q, k, v, *[None] * 9, None, -1, -1, 0.0, 0.0, 1.0, 7, 9, True
    o, lse = torch.ops.seqkern.attention(*args)
    given = {"do": torch.ones_like(o), "dlse": torch.ones_like(lse), "o": o, "lse": lse}
    for spoilt, match in [
        (given[name].double(), r"torch\.float32, got torch\.float64"),
        (given[name].bfloat16(), r"torch\.float32, got torch\.bfloat16"),
        (given[name][:, 1:], r"\(2, 4, 7.*\), got \(2, 3, 7"),
        (given[name].to("meta"), "on the device of q, cpu, got meta"),
    ]:
        wrong = (given | {name: spoilt}).values()
        with pytest.raises(ValueError, match=f"^attention_backward: {name} must be {match}"):
            torch.ops.seqkern.attention_backward(*wrong, *args, True, True, False)


def test_slopes_that_are_learnt_elsewhere() -> None:
    """They are refused for their gradient, which nobody asks for without grad mode."""
    q, k, v = qkv()
    slopes = torch.nn.Parameter(torch.rand(4))
    with torch.no_grad():
        o = seqkern.attention(q, k, v, alibi_slopes=slopes)
    assert torch.equal(o, seqkern.attention(q, k, v, alibi_slopes=slopes.detach()))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_lengths_are_checked_in_forward_mode() -> None:
    """Its plain operations take what an op of seqkern refuses."""
    q, k, v = qkv()
    rows, cu = torch.randn(3, 4, 8), torch.tensor([0, 2, 3])

    def padded(q, **lens):
        return seqkern.attention(q, k, v, **lens)

    def packed(q, bounds):
        return seqkern.attention_varlen(q, rows, rows, bounds, cu, 3, 3)

    def transformed(q, **lens):
        return torch.func.jvp(lambda q: padded(q, **lens), (q,), (q,))

    wrong = torch.tensor([99, 1]), torch.tensor([1, -2])
    with forward_ad.dual_level():
        for lens in wrong:
            for name in ("q_lens", "k_lens"):
                with pytest.raises(ValueError, match=f"{name} must be within"):
                    padded(q, **{name: lens})
        with pytest.raises(ValueError, match="cu_q must rise from 0 to the 3 rows"):
            packed(rows, torch.tensor([1, 3, 2]))
        padded(q, k_lens=torch.tensor([9, 0]))
        packed(rows, cu)
    for lens in wrong:
        with pytest.raises(ValueError, match="k_lens must be within"):
            transformed(q, k_lens=lens)
    # Lengths that a transform holds have no values to look at.
    torch.vmap(lambda lens: transformed(q, k_lens=lens))(torch.tensor([[9, 0], [1, 2]]))
