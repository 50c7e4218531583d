"""What `seqkern.explain` says of attentions."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

import seqkern
from tests.attention_inputs import qkv


def test_explain() -> None:
    q, k, v = qkv()
    (plain,) = seqkern.explain(seqkern.attention, q, k, v, causal="bottom_right")
    assert plain.kernel == "torch"
    (capped,) = seqkern.explain(seqkern.attention, q, k, v, softcap=2.0)
    assert capped.kernel == "reference"
    assert "softcap" in str(capped)
    (dropped,) = seqkern.explain(seqkern.scaled_dot_product_attention, q, k, v, dropout_p=0.1)
    assert "aten::scaled_dot_product_attention" in str(dropped)
    named = {"query": q, "key": k, "value": v}
    (by_name,) = seqkern.explain(F.scaled_dot_product_attention, **named)
    assert by_name.k == tuple(k.shape)
    rows, bounds = q.transpose(1, 2).flatten(0, 1), torch.tensor([0, 5, 14])
    (packed,) = seqkern.explain(seqkern.attention_varlen, rows, rows, rows, bounds, bounds)
    assert packed.kernel == "torch"
    lens = torch.tensor([9, 3])
    (cached,) = seqkern.explain(seqkern.attention_decode, q[:, :, :1], k, v, k_lens=lens)
    assert cached.op == "seqkern::attention_decode"
    assert cached.kernel == "torch"
    with pytest.raises(TypeError, match="Linear does neither"):
        seqkern.explain(torch.nn.Linear(8, 8), q)


@pytest.mark.parametrize("need_weights", [True, False])
def test_weights_come_from_the_reference(need_weights: bool) -> None:
    layer, x = seqkern.nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(2, 3, 8)
    (found,) = seqkern.explain(layer, x, x, x, need_weights=need_weights)
    assert found.kernel == ("reference" if need_weights else "torch")
    assert ("weights are asked for" in found.reason) == need_weights
    assert found.q == found.k == (2, 2, 3, 4)
    named = seqkern.explain(layer, query=x, key=x, value=x)
    assert [one.op for one in named] == ["attention_with_weights"]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors() -> None:
    rows = [torch.randn(n, 8) for n in (2, 3)]
    x = torch.nested.nested_tensor(rows, layout=torch.jagged)
    layer = seqkern.nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    stack = seqkern.nn.TransformerEncoder(layer, 2)
    heads = torch.nested.nested_tensor([t.view(-1, 2, 4) for t in rows], layout=torch.jagged)
    for function, inputs, count in (
        (seqkern.attention_varlen, (heads, heads, heads), 1),
        (layer.self_attn, (x, x, x), 1),
        (stack, (x,), 2),
        (stack.eval(), (x,), 2),
    ):
        options = {"need_weights": False} if function is layer.self_attn else {}
        calls = seqkern.explain(function, *inputs, **options)
        assert [(one.op, one.kernel, one.q) for one in calls] == count * [
            ("seqkern::attention", "torch", (5, 2, 4))
        ]
    (weighed,) = seqkern.explain(layer.self_attn, x, x, x)
    assert weighed.kernel == "reference"
    with pytest.raises(ValueError, match=r"of the jagged layout, got torch\.strided"):
        seqkern.explain(layer.self_attn, *[torch.nested.as_nested_tensor(rows)] * 3)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_forward_mode_takes_the_reference() -> None:
    q, k, v = qkv()
    x = torch.randn(2, 3, 8)
    attend, cell = seqkern.nn.AdditiveAttention(8, 8, 8), seqkern.nn.GRUCell(16, 8)
    decoder = seqkern.nn.AttentionDecoder(cell, attend)
    with forward_ad.dual_level():
        for function, inputs, op in (
            (seqkern.attention, (q, k, v), "attention"),
            (seqkern.scaled_dot_product_attention, (q, k, v), "attention"),
            (seqkern.additive_attention, (x, x, x, torch.randn(8)), "additive_attention"),
            (decoder, (x, x[:, 0], x), "attention_decoder"),
        ):
            (found,) = seqkern.explain(function, *inputs)
            assert (found.op, found.kernel) == (f"seqkern::{op}", "reference")
            assert "tangents" in found.reason
    (within,) = seqkern.explain(torch.func.jvp, lambda q: seqkern.attention(q, k, v), (q,), (q,))
    assert within.kernel == "reference"
