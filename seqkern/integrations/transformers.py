"""Hugging Face transformers on seqkern's attention.

    from seqkern.integrations.transformers import register

    register()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="seqkern")

transformers hands an attention function the queries, keys and values, a mask that a mask function
made once for the whole model, and what the model's attention adds. Where the mask is a plain
pattern (causal, a sliding window, both directions) with or without padding, the mask function
makes a `KeyMask`: which keys are real, (B, Tk), and the rule for the rest, so that nothing of size
Tq x Tk is held in memory. Every other pattern comes as a boolean mask (B, 1, Tq, Tk).
"""

import sys
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from seqkern.ops.attention import attention, attention_varlen

# What models pass along with their other keyword arguments and no attention reads.
_UNRELATED = {
    "cache_position",
    "logits_to_keep",
    "num_items_in_batch",
    "output_hidden_states",
    "output_router_logits",
    "position_embeddings",
    "position_ids",
    "return_dict",
    "use_cache",
}
_HONOURED = ("softcap", "s_aux", "position_bias", "deterministic")
_VARLEN = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


def register(name: str = "seqkern") -> None:
    """Makes `attn_implementation=name` known to transformers, for all models from now on.

    Dropout draws its seed from PyTorch's generator. A query to which no key is left, as padding
    before a sequence has, gives zeros, where transformers' eager attention averages all values;
    no other result depends on such rows.

    Args:
        name: for `attn_implementation`. Registering a name again is allowed.

    Raises:
        ImportError: transformers is not installed, is too old for these registries, or cannot be
            imported, as where a folder `kernels` on sys.path hides what it looks for.
        TypeError: the name is no string, or an empty one.
        ValueError: the name is one of transformers' own.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "transformers"
        reason = "pip install 'seqkern[transformers]'" if missing else "its import failed"
        raise ImportError(
            f"register needs transformers 5.23 or later; {reason}: {error}"
        ) from error
    if not isinstance(name, str) or not name:
        raise TypeError(f"register: name must be a string that is not empty, got {name!r}")
    known = AttentionInterface().get(name)
    if name == "eager" or known not in (None, attention_forward):
        raise ValueError(f"register: name must not be one of transformers' own, got {name!r}")
    AttentionInterface.register(name, attention_forward)
    AttentionMaskInterface.register(name, attention_mask)


# ---- the mask -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """Which keys a query may see, besides the real ones; queries stand at the end of the keys."""

    causal: bool
    window: tuple[int, int] | None
    # Whether all keys are real, or in each row only those before a length.
    padding: str = "none"


class KeyMask(Tensor):
    """(B, Tk) boolean, True for a real key; and `rule`, which a plain tensor has no place for.

    Copies to other devices keep the rule. The result of any other operation is a plain tensor.
    """

    rule: Rule

    @classmethod
    def of(cls, keys: Tensor, rule: Rule) -> "KeyMask":
        mask = keys.as_subclass(cls)
        mask.rule = rule
        return mask

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        if func in _COPIES and isinstance(args[0], cls) and type(result) is Tensor:
            return cls.of(result, args[0].rule)
        return result


_COPIES = {Tensor.to, Tensor.cuda, Tensor.cpu, Tensor.clone, Tensor.detach, Tensor.contiguous}


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    *,
    mask_function: Any,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    **kwargs: Any,
) -> Tensor | None:
    """The mask function that is registered; arguments as transformers.masking_utils.sdpa_mask.

    Returns:
        None where neither padding nor a window excludes anything, as for "sdpa"; a `KeyMask` for
        the plain patterns; a boolean mask (B, 1, Tq, Tk) for all else, and whenever the model
        wants to have the whole mask.
    """
    # Not the module itself: torch 2.11 does not trace its import from the lazy package.
    from transformers.masking_utils import prepare_padding_mask, sdpa_mask
    from transformers.utils.import_utils import is_tracing

    _check_model(type(kwargs.get("config")))
    dense: Any = sdpa_mask
    whole = {"mask_function": mask_function, "attention_mask": attention_mask, **kwargs}
    sizes = batch_size, q_length, kv_length, q_offset, kv_offset
    skips = {
        "local_size": local_size,
        "allow_is_causal_skip": allow_is_causal_skip,
        "allow_is_bidirectional_skip": allow_is_bidirectional_skip,
    }
    # While a graph is traced no value can be read, and a tensor for an offset is a static cache's.
    if isinstance(q_offset, Tensor) or is_tracing(attention_mask):
        return dense(*sizes, **whole, **skips)
    rule = _rule(mask_function, local_size)
    at_the_end = q_offset + q_length == kv_offset + kv_length
    placed = at_the_end or (rule is not None and not rule.causal and rule.window is None)
    allowed = allow_is_causal_skip or allow_is_bidirectional_skip
    if rule is None or not placed or not allowed:
        skips.update(allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
        return dense(*sizes, **whole, **skips)
    keys = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if keys is not None:
        keys = keys[:, kv_offset : kv_offset + kv_length]
    padding = "none" if keys is None else _padding(keys)
    # As large a window is none to `attention_forward` either, which then gets no mask.
    window = None if local_size is None or local_size >= kv_length else rule.window
    square = q_length in (1, kv_length)
    if padding == "none" and window is None and (square or not rule.causal):
        return None
    if keys is None:
        keys = torch.ones(batch_size, kv_length, dtype=torch.bool, device=kwargs.get("device"))
    return KeyMask.of(keys, Rule(rule.causal and q_length > 1, window, padding))


def _check_model(config: type) -> None:
    """transformers accepts any registered name for every model, but not every model asks for the
    function of that name: some would add this boolean mask to their scores."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    model: Any = MODEL_MAPPING.get(config, None)
    if model is None or hasattr(sys.modules[model.__module__], "ALL_ATTENTION_FUNCTIONS"):
        return
    claims = "_supports_sdpa", "_supports_flash_attn", "_supports_attention_backend"
    if not any(getattr(model, claim, False) for claim in claims):
        raise ValueError(
            f'seqkern attention: attn_implementation must be "eager" for {model.__name__}, whose '
            "attention in transformers cannot be replaced"
        )


def _rule(mask_function: Any, local_size: int | None) -> Rule | None:
    """What a mask function of transformers' says, if it is one of the plain ones."""
    from transformers import masking_utils

    n = local_size
    if n is None:
        plain = [
            (masking_utils.causal_mask_function, Rule(True, None)),
            (masking_utils.bidirectional_mask_function, Rule(False, None)),
        ]
    else:
        plain = [
            (masking_utils.sliding_window_causal_mask_function(n), Rule(True, (n - 1, 0))),
            (masking_utils.sliding_window_bidirectional_mask_function(n), Rule(False, (n, n))),
        ]
    return next((rule for function, rule in plain if _same(mask_function, function)), None)


def _same(a: Any, b: Any) -> bool:
    """Whether two functions are made of the same code and the same numbers. What is not known to
    be equal counts as different, and costs no more than a whole mask."""
    if isinstance(a, FunctionType) and isinstance(b, FunctionType):
        cells = [[cell.cell_contents for cell in f.__closure__ or ()] for f in (a, b)]
        return a.__code__ is b.__code__ and _same(*map(tuple, cells))
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return isinstance(a, int) and isinstance(b, int) and a == b


def _padding(keys: Tensor) -> str:
    """ "none", "right" where each row's real keys come first, or "any"; waits for the device."""
    lens = keys.sum(-1, keepdim=True)
    first = keys == (torch.arange(keys.size(1), device=keys.device) < lens)
    full, right = torch.stack([keys.all(), first.all()]).tolist()
    return "none" if full else "right" if right else "any"


# ---- the attention ------------------------------------------------------------------------


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that is registered, with the arguments of transformers' own.

    Args:
        module: the attention layer; its `is_causal` holds where the argument is None.
        query: (B, H, Tq, D).
        key, value: (B, Hkv, Tk, D) and (B, Hkv, Tk, Dv), heads not repeated.
        attention_mask: from `attention_mask`; or a model's own, 4-D, boolean or added.
        dropout: probability of dropping an attention weight.
        scaling: of the scores, 1 / sqrt(D) if None.
        is_causal: where no mask says it, and there are several queries: none sees later keys.
        sliding_window: where no mask says it: a query sees so many keys, itself included, to the
            left, and as many to the right where nothing is causal.
        kwargs: `softcap`, `s_aux`, `position_bias` and `deterministic` are softcap, sinks, bias
            and deterministic of `seqkern.attention`. `cu_seq_lens_q` and `cu_seq_lens_k` bound the
            sequences that lie one after another in the batch; `max_length_q` and `max_length_k`
            are the longest of them.

    Returns:
        o (B, Tq, H, Dv), and None in place of the weights.

    Raises:
        ValueError: attention weights are asked for, which no kernel holds in memory; a mask has
            lost its rule; or an argument that may change the result is not known.
    """
    given, packed = _sort_arguments(module, kwargs)
    # Learned queries come as a batch of one.
    batch = max(query.size(0), key.size(0))
    q, k, v = (
        t if t.size(0) == batch else t.expand(batch, -1, -1, -1) for t in (query, key, value)
    )
    if is_causal is None:
        is_causal = bool(getattr(module, "is_causal", True))
    sizes = q.size(2), k.size(2)
    options = _what_is_seen(attention_mask, is_causal, sliding_window, *sizes, bool(packed))
    bias, position_bias = options.get("bias"), given.get("position_bias")
    if position_bias is not None:
        bias = position_bias if bias is None else position_bias + bias
    sinks = given.get("s_aux")
    options.update(
        bias=_fitting(bias, q),
        sinks=_fitting(sinks, q),
        softcap=given.get("softcap"),
        dropout_p=dropout,
        scale=scaling,
        deterministic=given.get("deterministic", True),
    )
    if packed:
        o = _packed(q, k, v, packed, options)
    else:
        o = attention(q, k, v, **options).transpose(1, 2)
    return o.contiguous(), None


def _fitting(t: Tensor | None, q: Tensor) -> Tensor | None:
    return t if t is None or t.dtype == torch.float32 else t.to(q.dtype)


def _sort_arguments(
    module: torch.nn.Module, kwargs: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What goes to seqkern.attention, and the bounds of packed sequences; raises for the rest."""
    where = f"seqkern attention in {type(module).__name__}"
    kwargs = {name: value for name, value in kwargs.items() if value is not None}
    given = {name: kwargs.pop(name) for name in _HONOURED if name in kwargs}
    packed = {name: kwargs.pop(name) for name in _VARLEN if name in kwargs}
    if ("cu_seq_lens_q" in packed) != ("cu_seq_lens_k" in packed):
        raise ValueError(f"{where}: cu_seq_lens_q and cu_seq_lens_k must be given together")
    if kwargs.pop("output_attentions", False):
        raise ValueError(
            f"{where}: output_attentions must be False, since the weights are never in memory; "
            'attn_implementation="eager" returns them'
        )
    unknown = sorted(set(kwargs) - _UNRELATED)
    if unknown:
        raise ValueError(f"{where}: {', '.join(unknown)} must be None, its meaning is not known")
    return given, packed if "cu_seq_lens_q" in packed else {}


def _what_is_seen(
    mask: Tensor | None,
    is_causal: bool,
    sliding_window: int | None,
    tq: int,
    tk: int,
    packed: bool,
) -> dict[str, Any]:
    """The arguments of seqkern.attention that say which keys a query sees."""
    if mask is None:
        # As for transformers' "sdpa": a lone query is the last one of a cache, and of several the
        # first one stands at the first key.
        causal = is_causal and tq > 1
        seen: dict[str, Any] = {"causal": "top_left" if causal else None}
        if sliding_window is not None and tk > sliding_window:
            # To the right only where nothing is causal.
            seen["window"] = (sliding_window - 1, sliding_window - 1)
        return seen
    if isinstance(mask, KeyMask):
        return _by_rule(mask, tq, tk, packed)
    if mask.dim() != 4:
        raise ValueError(
            "seqkern attention: attention_mask must be a KeyMask as seqkern's mask function makes "
            f"it, or 4-D, got {tuple(mask.shape)}"
        )
    return {"mask": mask} if mask.dtype == torch.bool else {"bias": mask}


def _by_rule(keys: KeyMask, tq: int, tk: int, packed: bool) -> dict[str, Any]:
    rule = keys.rule
    seen: dict[str, Any] = {"window": rule.window}
    seen["causal"] = "bottom_right" if rule.causal else None
    plain = keys.as_subclass(Tensor)
    if rule.padding == "none":
        return seen
    if plain.size(1) != tk:
        raise ValueError(
            f"seqkern attention: attention_mask must be (B, Tk) with {tk} keys, "
            f"got {tuple(plain.shape)}"
        )
    # Lengths let whole tiles be left out. They move the last query to the last real key, which
    # only "top_left" undoes, and it means the same where there are as many queries as keys. Rows
    # that are packed have other lengths already.
    placed = tq == tk if rule.causal else rule.window is None
    if rule.padding == "right" and placed and not packed:
        lens = plain.sum(-1, dtype=torch.int32)
        return seen | {"k_lens": lens, "causal": "top_left" if rule.causal else None}
    return seen | {"mask": plain[:, None, None]}


def _packed(
    q: Tensor, k: Tensor, v: Tensor, packed: dict[str, Any], options: dict[str, Any]
) -> Tensor:
    """(B, Tq, H, Dv) from the sequences that lie one after another in the rows of the batch."""
    cu_q, cu_k = packed["cu_seq_lens_q"], packed["cu_seq_lens_k"]
    if "mask" in options or options["bias"] is not None:
        if q.size(0) != 1:
            raise ValueError(
                "seqkern attention: cu_seq_lens_q with an attention_mask or a bias needs a batch "
                f"of one row, got {q.size(0)}"
            )
        rows, columns = (
            torch.searchsorted(cu, torch.arange(t.size(2), device=cu.device), right=True)
            for cu, t in ((cu_q, q), (cu_k, k))
        )
        same = (rows[:, None] == columns)[None, None]
        options["mask"] = same & options["mask"] if "mask" in options else same
        return attention(q, k, v, **options).transpose(1, 2)
    max_q, max_k = (
        int(packed[n]) if n in packed else None for n in ("max_length_q", "max_length_k")
    )
    rows, keys, values = (t.transpose(1, 2).flatten(0, 1) for t in (q, k, v))
    o = attention_varlen(rows, keys, values, cu_q, cu_k, max_q, max_k, **options)
    return o.unflatten(0, (q.size(0), q.size(2)))
