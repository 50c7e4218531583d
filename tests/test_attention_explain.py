"""What `seqkern.explain` says of attentions."""

import pytest
import torch
import torch.nn.functional as F

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
