"""Models of Hugging Face transformers with attn_implementation="seqkern" against "eager".

The models are small and random, with weights large enough for the attention to matter.
"""

import copy
import sys
import types
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from seqkern.integrations import transformers as integration
from seqkern.integrations.transformers import KeyMask, Rule, attention_forward, register

transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed: pip install 'seqkern[transformers]'"
)
masking = pytest.importorskip("transformers.masking_utils")

VOCABULARY, PAD = 61, 0
B, T = 3, 11
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.3,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": None,
}
GQA = SIZES | {"num_key_value_heads": 2, "head_dim": 8}
# All experts take part, so that no rounding changes who does.
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 2}
T5 = SIZES | {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
DECODERS = {
    "Llama": GQA,
    "Gemma2": GQA
    | {"sliding_window": 5, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    "GptOss": GQA | {"sliding_window": 5} | EXPERTS,
}


@pytest.fixture(scope="module", autouse=True)
def _registered():
    transformers.logging.set_verbosity_error()
    register()
    # A second time changes nothing.
    register()


def pair(model: str, head: str, sizes: dict, **more):
    """The same model with transformers' eager attention and with seqkern's."""
    config = getattr(transformers, f"{model}Config")(**sizes, **more)
    kind = getattr(transformers, f"{model}{head}")
    models = [
        kind._from_config(copy.deepcopy(config), attn_implementation=name).eval()
        for name in ("eager", "seqkern")
    ]
    if model == "GptOss":
        for layer in models[0].model.layers:
            torch.nn.init.normal_(layer.self_attn.sinks)
    models[1].load_state_dict(models[0].state_dict())
    return models


def tokens() -> Tensor:
    return torch.randint(2, VOCABULARY, (B, T))


def padded(side: str | None) -> Tensor | None:
    """(B, T), the attention mask of rows of 11, 7 and 4 tokens."""
    if side is None:
        return None
    right = torch.arange(T) < torch.tensor([T, 7, 4])[:, None]
    return (right if side == "right" else right.flip(1)).long()


def labels_of(x: Tensor, mask: Tensor | None) -> Tensor:
    """Labels for the tokens that follow a real one: what stands before it has nothing to see."""
    if mask is None:
        return x
    follows = (mask[:, 1:] * mask[:, :-1]).bool()
    return torch.cat([x[:, :1], x[:, 1:].masked_fill(~follows, -100)], 1)


def assert_same_training_step(models, mask: Tensor | None, **inputs) -> None:
    """Equal losses and logits of real tokens, and equal gradients of all parameters."""
    results = []
    for model in models:
        model.zero_grad()
        out = model(attention_mask=mask, **inputs)
        out.loss.backward()
        whole = mask is None or "decoder_input_ids" in inputs or "token_type_ids" in inputs
        logits = out.logits if whole else out.logits[mask.bool()]
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        results.append((out.loss, logits, *grads))
    assert len(results[0]) > 10
    torch.testing.assert_close(results[1], results[0])


@pytest.fixture
def calls(monkeypatch) -> list[dict]:
    """The keyword arguments of every call of seqkern.attention."""
    seen = []

    def attention(*args, **options):
        seen.append(options)
        return integration_attention(*args, **options)

    integration_attention = integration.attention
    monkeypatch.setattr(integration, "attention", attention)
    return seen


def is_dense(options: dict) -> bool:
    return options.get("mask") is not None and options["mask"].size(2) > 1


# ---- models -------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("model", DECODERS)
def test_decoder_trains_alike(model, side, calls):
    models = pair(model, "ForCausalLM", DECODERS[model])
    x, mask = tokens(), padded(side)
    assert_same_training_step(models, mask, input_ids=x, labels=labels_of(x, mask))
    assert len(calls) == 2
    assert not any(is_dense(c) for c in calls)
    windows = [c["window"] for c in calls if c.get("window")]
    assert windows == ([] if model == "Llama" else [(4, 0)])


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"cache_implementation": "static"}])
@pytest.mark.parametrize("model", DECODERS)
def test_decoder_generates_alike(model, options, calls):
    models = pair(model, "ForCausalLM", DECODERS[model])
    x, mask = tokens(), padded("left")
    ids = [m.generate(x, attention_mask=mask, max_new_tokens=8, **options) for m in models]
    assert ids[0].shape == (B, T + 8)
    assert torch.equal(*ids)
    assert "static" in options.values() or not any(is_dense(c) for c in calls)


def test_decoder_continues_from_a_cache():
    models = pair("Gemma2", "ForCausalLM", DECODERS["Gemma2"])
    x, mask = tokens(), padded("left")
    results = []
    for m in models:
        past = m(x[:, :6], attention_mask=mask[:, :6], use_cache=True).past_key_values
        logits = m(x[:, 6:], attention_mask=mask, past_key_values=past).logits
        results.append(logits[mask[:, 6:].bool()])
    torch.testing.assert_close(*results)


def test_checkpointed_layers_keep_their_masks():
    models = pair("Gemma2", "ForCausalLM", DECODERS["Gemma2"])
    for m in models:
        m.train()
        m.activation_checkpointing_enable()
    x, mask = tokens(), padded("right")
    assert_same_training_step(models, mask, input_ids=x, labels=labels_of(x, mask))


@pytest.mark.parametrize("side", [None, "right", "left"])
def test_bert(side, calls):
    models = pair("Bert", "ForMaskedLM", SIZES)
    x, mask = tokens(), padded(side)
    labels = x if mask is None else x.masked_fill(mask == 0, -100)
    kinds = torch.zeros_like(x)
    assert_same_training_step(models, mask, input_ids=x, token_type_ids=kinds, labels=labels)
    lengths = [c["k_lens"].tolist() for c in calls if "k_lens" in c]
    assert lengths == ([[T, 7, 4]] * 2 if side == "right" else [])


@pytest.mark.parametrize("side", [None, "right", "left"])
def test_t5(side, calls):
    models = pair("T5", "ForConditionalGeneration", T5, decoder_start_token_id=PAD)
    x, mask = tokens(), padded(side)
    target = tokens()[:, :6]
    assert_same_training_step(
        models, mask, input_ids=x, decoder_input_ids=target, labels=target.roll(-1, 1)
    )
    tables = [n for n, p in models[1].named_parameters() if "relative_attention_bias" in n]
    assert len(tables) == 2
    assert not any(is_dense(c) for c in calls)
    ids = [m.generate(x, attention_mask=mask, max_new_tokens=8) for m in models]
    assert torch.equal(*ids)


@pytest.mark.parametrize("model", DECODERS)
def test_autocast_rounds_no_more_than_eager(model):
    models = pair(model, "ForCausalLM", DECODERS[model])
    x, mask = tokens(), padded("left")
    with torch.no_grad():
        exact = models[0](x, attention_mask=mask).logits[mask.bool()]
        with torch.autocast("cpu", torch.bfloat16):
            logits = [m(x, attention_mask=mask).logits[mask.bool()] for m in models]
    theirs, ours = ((rounded - exact).norm() for rounded in logits)
    assert 0 < ours < 2 * theirs


def test_chunked_attention_gets_a_whole_mask(calls):
    sizes = GQA | EXPERTS | {"attention_chunk_size": 4, "intermediate_size_mlp": 48}
    config = transformers.Llama4TextConfig(**sizes)
    models = [
        transformers.Llama4ForCausalLM._from_config(
            copy.deepcopy(config), attn_implementation=name
        ).eval()
        for name in ("eager", "seqkern")
    ]
    models[1].load_state_dict(models[0].state_dict())
    x, mask = tokens(), padded("left")
    logits = [m(x, attention_mask=mask).logits[mask.bool()] for m in models]
    torch.testing.assert_close(*logits)
    assert any(is_dense(c) for c in calls)


@pytest.mark.parametrize("bounded", [False, True])
def test_sequences_packed_in_one_row(bounded):
    models = pair("Llama", "ForCausalLM", GQA)
    x = tokens()[:1]
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 0, 1, 2, 3, 4]])
    bounds = torch.tensor([0, 4, 6, T], dtype=torch.int32)
    names = "cu_seq_lens_q", "cu_seq_lens_k"
    given = dict.fromkeys(names, bounds) if bounded else {}
    # Positions that start again mean sequences only where there is no cache.
    common = {"position_ids": positions, "use_cache": False}
    eager = models[0](x, **common).logits
    torch.testing.assert_close(models[1](x, **common, **given).logits, eager)
    apart = [models[0](x[:, a:b]).logits for a, b in ((0, 4), (4, 6), (6, T))]
    torch.testing.assert_close(eager, torch.cat(apart, 1))


def test_compiled_model():
    eager, ours = pair("Gemma2", "ForCausalLM", DECODERS["Gemma2"])
    x, mask = tokens(), padded("left")
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        real = mask.bool()
        logits = [m(x, attention_mask=mask).logits[real] for m in (eager, compiled)]
    torch.testing.assert_close(*logits)


# ---- masks --------------------------------------------------------------------------------


def seen_by(mask: Tensor | None, q_length: int, kv_length: int, is_causal: bool, **given) -> Tensor:
    """(B, Tq, Tk), the keys that get a weight: scores are 0, and key j's value is the unit j."""
    q, k = torch.zeros(B, 1, q_length, 4), torch.zeros(B, 1, kv_length, 4)
    v = torch.eye(kv_length).expand(B, 1, -1, -1)
    module = SimpleNamespace(is_causal=is_causal)
    return attention_forward(module, q, k, v, mask, **given)[0][:, :, 0] > 0


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("window", [None, 1, 4, 11])
@pytest.mark.parametrize("causal", [True, False])
def test_rules_say_what_the_whole_mask_says(causal, window, side):
    kind = "causal" if causal else "bidirectional"
    function = getattr(masking, f"{kind}_mask_function")
    if window is not None:
        function = getattr(masking, f"sliding_window_{kind}_mask_function")(window)
    padding = padded(side)
    # Queries and keys, and the positions of the first of each: all at once, from a cache, one
    # more, from a cache that dropped what left the window, several from it, and a cross-attention.
    for q, kv, q0, kv0 in [
        (11, 11, 0, 0),
        (4, 11, 7, 0),
        (1, 11, 10, 0),
        (1, 4, 10, 7),
        (3, 6, 8, 5),
        (5, 11, 0, 0),
    ]:
        options = {
            "mask_function": function,
            "attention_mask": None if padding is None else padding.bool(),
            "local_size": window,
            "allow_is_bidirectional_skip": not causal,
            "allow_is_causal_skip": causal,
        }
        ours = integration.attention_mask(B, q, kv, q0, kv0, **options)
        options.update(allow_is_bidirectional_skip=False, allow_is_causal_skip=False)
        whole = masking.sdpa_mask(B, q, kv, q0, kv0, **options)[:, 0]
        assert torch.equal(seen_by(ours, q, kv, causal), whole), (q, kv, q0, kv0)
        if q0 + q == kv0 + kv:
            assert ours is None or isinstance(ours, KeyMask)


@pytest.mark.parametrize("window", [3, 4, 5])
def test_a_window_on_both_sides_that_just_reaches_all_keys(window):
    """The layer knows the window too, and must not take it for a narrower one."""
    function = masking.sliding_window_bidirectional_mask_function(window)
    options = {"mask_function": function, "attention_mask": None, "local_size": window}
    mask = integration.attention_mask(B, 5, 5, **options, allow_is_bidirectional_skip=True)
    whole = masking.sdpa_mask(B, 5, 5, **options, allow_is_causal_skip=False)
    seen = seen_by(mask, 5, 5, False, sliding_window=window)
    assert torch.equal(seen, whole[:, 0])


def test_unknown_patterns_and_asked_for_masks_are_whole():
    odd = masking.and_masks(masking.causal_mask_function, lambda b, h, q, k: k % 2 == 0)
    wanted = masking.causal_mask_function
    for function, skip in ((odd, True), (wanted, False)):
        mask = integration.attention_mask(
            B, 5, 5, mask_function=function, allow_is_causal_skip=skip
        )
        assert type(mask) is Tensor
        assert mask.shape == (B, 1, 5, 5)
        expected = torch.ones(5, 5, dtype=torch.bool).tril()
        if function is odd:
            expected[:, 1::2] = False
        assert torch.equal(mask[0, 0], expected)


def test_a_mask_keeps_its_rule_where_it_is_copied():
    rule = Rule(causal=True, window=None, padding="any")
    mask = KeyMask.of(torch.ones(2, 3, dtype=torch.bool), rule)
    for copied in (mask.to("meta"), mask.clone(), mask.detach(), mask.contiguous(), mask.cpu()):
        assert isinstance(copied, KeyMask)
        assert copied.rule is rule
    assert type(mask[:, :2]) is Tensor
    assert type(~mask) is Tensor
    q = torch.zeros(2, 1, 3, 4)
    with pytest.raises(ValueError, match=r"attention_mask must be a KeyMask .* got \(2, 3\)"):
        attention_forward(torch.nn.Identity(), q, q, q, mask & mask)
    with pytest.raises(ValueError, match=r"\(B, Tk\) with 5 keys, got \(2, 3\)"):
        attention_forward(torch.nn.Identity(), q, *[torch.zeros(2, 1, 5, 4)] * 2, mask)


# ---- the attention function ---------------------------------------------------------------


def plain(q, k, v, scores_of, scale=None, sinks=None) -> Tensor:
    """(B, Tq, H, Dv) by the formula; `scores_of` turns scores (B, H, Tq, Tk) into others."""
    k, v = (t.repeat_interleave(q.size(1) // t.size(1), 1) for t in (k, v))
    scores = scores_of(q @ k.mT * (q.size(-1) ** -0.5 if scale is None else scale))
    if sinks is not None:
        column = sinks[:, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], -1)
    return (scores.softmax(-1)[..., : k.size(2)] @ v).transpose(1, 2)


def inputs(tq: int = 5, tk: int = 7):
    sizes = (2, 4, tq, 8), (2, 2, tk, 8), (2, 2, tk, 6)
    return [torch.randn(s, dtype=torch.float64) for s in sizes]


def excluded(where: Tensor):
    return lambda scores: scores.masked_fill(where, -torch.inf)


LATER = torch.ones(5, 7, dtype=torch.bool).triu(1)
FAR = torch.arange(5)[:, None] - torch.arange(7) > 2
# Without causality the last query stands beside the last key.
AROUND = (torch.arange(5)[:, None] + 2 - torch.arange(7)).abs() > 2
ARGUMENTS = {
    "causal by the layer": ({}, excluded(LATER)),
    "causal by argument": ({"is_causal": False}, lambda s: s),
    "window": ({"sliding_window": 3}, excluded(LATER | FAR)),
    "window on both sides": ({"is_causal": False, "sliding_window": 3}, excluded(AROUND)),
    "softcap": ({"is_causal": False, "softcap": 0.7}, lambda s: 0.7 * torch.tanh(s / 0.7)),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_arguments_without_a_mask(case):
    given, scores_of = ARGUMENTS[case]
    q, k, v = inputs()
    o, weights = attention_forward(SimpleNamespace(is_causal=True), q, k, v, None, **given)
    assert weights is None
    assert o.is_contiguous()
    torch.testing.assert_close(o, plain(q, k, v, scores_of))


def test_arguments_together():
    q, k, v = inputs()
    mask = torch.rand(2, 1, 5, 7) < 0.6
    mask[..., 0] = True
    added = torch.randn(2, 1, 5, 7, dtype=torch.float64)
    bias = torch.randn(1, 4, 5, 7, dtype=torch.float64)
    sinks = torch.randn(4, dtype=torch.float64)
    rest = {"scaling": 0.3, "position_bias": bias, "s_aux": sinks, "deterministic": True}
    module = torch.nn.Identity()
    for given, scores_of in (
        (mask, lambda s: (s + bias).masked_fill(~mask, -torch.inf)),
        (added, lambda s: s + bias + added),
    ):
        o, _ = attention_forward(module, q, k, v, given, **rest)
        torch.testing.assert_close(o, plain(q, k, v, scores_of, 0.3, sinks))


def test_a_lone_query_sees_the_whole_cache_and_learned_queries_serve_all_rows():
    q, k, v = inputs(1)
    o, _ = attention_forward(SimpleNamespace(is_causal=True), q[:1], k, v, None)
    torch.testing.assert_close(o, plain(q[:1].expand(2, -1, -1, -1), k, v, lambda s: s))


def test_dropout_drops_weights():
    q, k = torch.zeros(1, 2, 40, 4), torch.zeros(1, 2, 50, 4)
    v = torch.ones(1, 2, 50, 3)

    def call() -> Tensor:
        torch.manual_seed(3)
        return attention_forward(SimpleNamespace(is_causal=False), q, k, v, None, dropout=0.5)[0]

    o = call()
    assert torch.equal(o, call())
    # Of 50 weights about half stay, each doubled: a standard deviation of 1 / sqrt(50).
    assert 0.1 < o.std() < 0.2
    assert (o.mean() - 1).abs() < 0.05


@pytest.mark.parametrize("longest", [{}, {"max_length_q": 3, "max_length_k": torch.tensor(3)}])
def test_bounds_of_sequences_without_a_mask(longest):
    q, k, v = inputs(7, 7)
    bounds = torch.tensor([0, 3, 6, 9, 12, 14], dtype=torch.int32)
    given = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, **longest}
    o, _ = attention_forward(SimpleNamespace(is_causal=True), q, k, v, None, **given)
    flat = [t.transpose(1, 2).flatten(0, 1).transpose(0, 1)[None] for t in (q, k, v)]
    parts = []
    for a, b in zip(bounds.tolist(), bounds.tolist()[1:], strict=False):
        later = torch.ones(b - a, b - a, dtype=torch.bool).triu(1)
        parts.append(plain(*(t[:, :, a:b] for t in flat), excluded(later)))
    torch.testing.assert_close(o, torch.cat(parts, 1).view(2, 7, 4, 6))


def test_bounds_of_sequences_beside_padding_on_the_right():
    q, k, v = (t[:1] for t in inputs(5, 5))
    bounds = torch.tensor([0, 2, 5], dtype=torch.int32)
    given = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
    real = torch.tensor([[True, True, True, True, False]])
    mask = KeyMask.of(real, Rule(causal=True, window=None, padding="right"))
    apart = torch.tensor([0, 0, 1, 1, 1])
    hidden = (apart[:, None] != apart) | torch.ones(5, 5, dtype=torch.bool).triu(1) | ~real
    o, _ = attention_forward(torch.nn.Identity(), q, k, v, mask, **given)
    torch.testing.assert_close(o, plain(q, k, v, excluded(hidden)))
    two, rows = KeyMask.of(real.expand(2, -1), mask.rule), inputs(5, 5)
    with pytest.raises(ValueError, match="cu_seq_lens_q with an attention_mask or a bias needs"):
        attention_forward(torch.nn.Identity(), *rows, two, **given)


def test_what_cannot_be_honoured_is_refused():
    q, k, v = inputs()
    call = attention_forward
    module = torch.nn.Identity()
    bounds = torch.tensor([0, 5], dtype=torch.int32)
    both = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
    bias = torch.zeros(1, 1, 5, 7, dtype=torch.float64)
    for given, message in (
        ({"output_attentions": True}, "output_attentions must be False"),
        ({"indices": q}, "Identity: indices must be None, its meaning is not known"),
        ({"cu_seq_lens_q": bounds}, "must be given together"),
        ({**both, "position_bias": bias}, "needs a batch of one row, got 2"),
        ({"dropout": 1.5}, "dropout_p"),
    ):
        with pytest.raises(ValueError, match=message):
            call(module, q, k, v, None, **given)
    # What says nothing is no reason.
    call(module, q, k, v, None, indices=None, output_attentions=False, use_cache=True)


def test_models_that_would_not_ask_are_refused():
    model = transformers.BloomForCausalLM._from_config(
        transformers.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=1, n_head=4),
        attn_implementation="seqkern",
    )
    with pytest.raises(ValueError, match='must be "eager" for BloomModel'):
        model(tokens())


# ---- register -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sdpa", "eager", None, 1, ""])
def test_no_name_of_transformers_is_taken(name):
    own = name in ("sdpa", "eager")
    reason = f"must not be one of transformers' own, got '{name}'" if own else "must be a string"
    with pytest.raises(ValueError if own else TypeError, match=f"name {reason}"):
        register(name)


def test_another_name_serves_too():
    register("ours")
    assert transformers.AttentionInterface()["ours"] is attention_forward


def test_absence_of_transformers_is_explained(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"needs transformers 5\.23 or later; pip install"):
        register()
    monkeypatch.setitem(sys.modules, "transformers", types.ModuleType("transformers"))
    with pytest.raises(ImportError, match=r"5\.23 or later; its import failed: cannot import name"):
        register()
