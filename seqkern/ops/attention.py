"""Scaled dot-product attention: the public functions."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C import _get_tracing_state, _is_any_autocast_enabled
from torch._guards import detect_fake_mode
from torch.compiler import is_compiling

from seqkern.ops._attention_autograd import DERIVED, LENGTHS, Attention
from seqkern.ops._attention_checks import (
    INT,
    as_slopes,
    check_attention,
    check_kind,
    check_lengths,
    check_qkv,
    check_sdpa,
    check_vector,
    int32,
    number,
    positive,
    readable,
    sides,
    whole,
)
from seqkern.ops._attention_ops import choose
from seqkern.ops._checks import autocast, autocast_added, check_tensor
from seqkern.ops._derivatives import (
    in_plain_operations,
    only_plain_operations,
    recorded,
    takes_graph,
)
from seqkern.reference import attention as reference

_op = torch.ops.seqkern.attention.default


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: str | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    q_lens: Tensor | None = None,
    k_lens: Tensor | None = None,
    window: tuple[int | None, int | None] | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    deterministic: bool = True,
) -> Any:
    """softmax(scale q k^T + ...) v, with everything that sequence models ask of it, together.

    `seqkern.reference.attention` has the formulas. Query i stands at the key position p_i = i
    where `causal` is "top_left", else p_i = i + Lk - Lq: the last query beside the last key.

    Args:
        q: (B, H, Tq, D) of fp16, bf16, fp32 or fp64, with any strides. Any size may be 0 or 1.
        k, v: (B, Hkv, Tk, D) and (B, Hkv, Tk, Dv) of the same dtype; H is a multiple of Hkv, and
            query head h reads the head h // (H // Hkv) (grouped-query attention).
        causal: "top_left" or "bottom_right": no query sees a key after p_i.
        mask: boolean, broadcasts to (B, H, Tq, Tk); False excludes a key.
        bias: floating, of q's dtype or float32, broadcasts to (B, H, Tq, Tk); added to the scores
            after scale and softcap. Has a gradient.
        q_lens, k_lens: (B,) int32 or int64 lengths Lq and Lk of padded rows. What lies beyond is
            never read, and the tiles that hold nothing else are skipped.
        window: (left, right): a query sees the keys p_i - left ... p_i + right; None for no limit.
        alibi_slopes: (H,) or (B, H), float: subtracts slope |p_i - j| (Press et al. 2022). No
            gradient.
        softcap: s becomes softcap tanh(s / softcap).
        sinks: (H,) of q's dtype or float32: a logit for each head that joins the softmax without
            a value. Has a gradient.
        dropout_p: probability in [0, 1) of dropping an attention weight.
        dropout_seed: an int, or an int64 tensor (1,) on q's device; the same seed drops the same
            weights, whatever the device. None draws from PyTorch's generator.
        scale: of the scores; 1 / sqrt(D) if None.
        return_lse: whether to return the logarithm of the softmax's denominator too.
        deterministic: False permits sums in an order that differs from run to run; no kernel
            makes use of that so far.

    Returns:
        o (B, H, Tq, Dv) in q's dtype, in q's order in memory; with `return_lse` also lse
        (B, H, Tq), float32 (float64 for float64), natural logarithm, differentiable. A query to
        which nothing is left gives o = 0, takes no gradient, and its lse is -inf or its sink, but
        -inf beyond `q_lens`.

    Under torch.autocast q, k and v are cast to its dtype, unless they are float64, and so are a
    bias and sinks of 16 bits.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: a size, dtype, device or value does not fit; the message names it.
    """
    name = "attention"
    q, k, v = _autocast(name, q, k, v)
    check_qkv(name, q, k, v, packed=False)
    args = _normal_form(
        name,
        (q, k, v, mask, bias, q_lens, k_lens, alibi_slopes, sinks, None, None),
        (causal, window, softcap, dropout_p, dropout_seed, scale),
        (q.size(2), k.size(2), deterministic),
    )
    if dropout_p and dropout_seed is None:
        if not return_lse and _dropout_is_torchs(args):
            return _with_torch_dropout(args)
        args = _with_seed(args)
    o, lse = call(args)
    return (o, lse) if return_lse else o


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor | None = None,
    cu_k: Tensor | None = None,
    max_q: int | None = None,
    max_k: int | None = None,
    *,
    causal: str | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    window: tuple[int | None, int | None] | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    deterministic: bool = True,
) -> Any:
    """`attention` over sequences of different lengths that lie one after another, unpadded.

    Args:
        q: (Nq, H, D), the queries of all sequences; or a nested tensor (B, j, H, D) of the jagged
            layout.
        k, v: (Nk, Hkv, D) and (Nk, Hkv, Dv), or nested like q, both with the same lengths.
        cu_q, cu_k: (B + 1,) int32 or int64: sequence b is rows cu[b] up to cu[b + 1]. Absent for
            nested tensors, which know.
        max_q, max_k: at least the longest sequence; found from cu_q and cu_k if None, for which a
            GPU has to be waited for.
        mask, bias: broadcast to (B, H, max_q, max_k).

    The other arguments, and what is raised: see `attention`.

    Returns:
        o (Nq, H, Dv), nested where q is; with `return_lse` also lse (H, Nq).
    """
    name = "attention_varlen"
    for n, t in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, n, t)
    nested = q.is_nested
    if nested:
        if cu_q is not None or cu_k is not None:
            raise ValueError(f"{name}: nested tensors hold their bounds: leave out cu_q and cu_k")
        given = {"q": q, "k": k, "v": v}
        (q, cu_q), (k, cu_k), (v, cu_v) = (_unnest(name, n, t) for n, t in given.items())
        # Tensors made one by one have sizes that compare as different, whatever they are.
        if given["k"].size(1) != given["v"].size(1) and not torch.equal(cu_k, cu_v):
            raise ValueError(
                f"{name}: nested k and v must have the same lengths, got the bounds "
                f"{cu_k.tolist()} and {cu_v.tolist()}"
            )
    offsets = cu_q
    if cu_q is None or cu_k is None:
        raise ValueError(f"{name}: cu_q and cu_k must be given unless q, k and v are nested")
    check_vector(name, "cu_q", cu_q, q, None, INT)
    check_vector(name, "cu_k", cu_k, q, None, INT)
    q, k, v = _autocast(name, q, k, v)
    check_qkv(name, q, k, v, packed=True)
    args = _normal_form(
        name,
        (q, k, v, mask, bias, None, None, alibi_slopes, sinks, cu_q, cu_k),
        (causal, window, softcap, dropout_p, dropout_seed, scale),
        (
            _longest(cu_q, q) if max_q is None else whole(name, "max_q", max_q),
            _longest(cu_k, k) if max_k is None else whole(name, "max_k", max_k),
            deterministic,
        ),
    )
    if dropout_p and dropout_seed is None:
        args = _with_seed(args)
    try:
        o, lse = call(args)
    except (TypeError, ValueError):
        # The op has another name, and only an error is worth the time for this one.
        check_attention(name, *args)
        check_lengths(name, *args)
        raise
    if nested:
        o = torch.nested.nested_tensor_from_jagged(o, offsets)
    return (o, lse) if return_lse else o


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch.nn.functional.scaled_dot_product_attention, with its arguments and its meaning.

    Besides: a row with nothing left is zeros on every device, the gradient of `attn_mask` is
    taken by a fused kernel on a GPU, and the result can be derived twice.

    Args:
        query: (..., H, Tq, D).
        key, value: (..., Hkv, Tk, D) and (..., Hkv, Tk, Dv).
        attn_mask: boolean, True takes part, or floating, added to the scores; broadcasts to
            (..., H, Tq, Tk).
        dropout_p: probability of dropping an attention weight, in training or not.
        is_causal: no query i sees a key after i (the upper left corner is shared).
        scale: 1 / sqrt(D) if None.
        enable_gqa: permits Hkv < H, if H is a multiple of it; key and value may differ in it.

    Returns:
        (..., H, Tq, Dv) in query's dtype.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: a size, dtype, device or value does not fit.
        RuntimeError: attn_mask and is_causal are both given.
    """
    name = "scaled_dot_product_attention"
    check_sdpa(name, query, key, value, attn_mask, dropout_p, is_causal, scale)
    options: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa}
    if query.is_nested or dropout_p == 1:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, **options
        )
    if query.device.type == "cpu" and not recorded((query, key, value, attn_mask)):
        try:
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, **options
            )
        except RuntimeError:
            # The checks below say what does not fit.
            pass
    query, key, value = _autocast(name, query, key, value)
    if enable_gqa:
        key, value = _with_the_same_heads(query, key, value)
    elif query.dim() > 2 and key.dim() > 2:
        heads = [t.size(-3) for t in (query, key, value) if t.dim() > 2]
        if len({n for n in heads if n != 1}) > 1:
            raise ValueError(
                f"{name}: query, key and value have {heads} heads; enable_gqa permits that"
            )
    q, k, v, batch = _four_dimensional(name, query, key, value, enable_gqa)
    mask = bias = None
    if attn_mask is not None:
        m = _mask_of_batch(name, attn_mask, q, (*batch, q.size(2), k.size(2)))
        mask, bias = (m, None) if m.dtype == torch.bool else (None, m)
    options = {"mask": mask, "bias": bias, "dropout_p": dropout_p, "scale": scale}
    try:
        o = attention(q, k, v, causal="top_left" if is_causal else None, **options)
    except ValueError:
        # By the names that they have here, which only an error is worth the time for.
        check_qkv(name, q, k, v, False, ("query", "key", "value"))
        raise
    return o.reshape(*batch, *o.shape[-2:])


# ---- to the normal form of the op ---------------------------------------------------------


def _normal_form(name: str, tensors: tuple, options: tuple, sizes: tuple) -> tuple:
    """The arguments of seqkern::attention, in order.

    Args:
        tensors: q, k, v, mask, bias, q_lens, k_lens, alibi_slopes, sinks, cu_q, cu_k.
        options: causal, window, softcap, dropout_p, dropout_seed, scale.
        sizes: max_q, max_k, deterministic.
    """
    q, k, v, mask, bias, *lens, slopes, sinks, cu_q, cu_k = tensors
    causal, window, softcap, dropout_p, dropout_seed, scale = options
    mask, bias = (_with_four_dims(name, n, t) for n, t in (("mask", mask), ("bias", bias)))
    if bias is not None and not bias.dtype.is_floating_point:
        raise ValueError(f"{name}: bias must be floating, got {bias.dtype}")
    bias = None if bias is None else autocast_added(bias, q)
    if causal is not None and not isinstance(causal, str):
        raise TypeError(
            f'{name}: causal must be "top_left" or "bottom_right", which differ where Tq != Tk, '
            f"got {causal!r}"
        )
    if not isinstance(sizes[2], bool):
        raise TypeError(f"{name}: deterministic must be True or False, got {sizes[2]!r}")
    left, right = sides(name, window)
    softcap, dropout_p = positive(name, "softcap", softcap), number(name, "dropout_p", dropout_p)
    if scale is not None:
        scale = number(name, "scale", scale)
    else:
        scale = q.size(-1) ** -0.5 if q.size(-1) else 1.0
    seed = None
    if dropout_p and dropout_seed is not None:
        seed = _seed(name, q, dropout_seed)
    slopes = as_slopes(name, slopes, q)
    if sinks is not None:
        check_tensor(name, "sinks", sinks)
        sinks = autocast_added(sinks, q)
    bounds = zip(("q_lens", "k_lens", "cu_q", "cu_k"), (*lens, cu_q, cu_k))
    q_lens, k_lens, cu_q, cu_k = (t if t is None else int32(name, n, t) for n, t in bounds)
    extras = mask, bias, q_lens, k_lens, slopes, sinks, seed, cu_q, cu_k
    rule = causal, left, right, softcap, dropout_p, float(scale)
    return q, k, v, *extras, *rule, *sizes


def _with_four_dims(name: str, argument: str, t: Tensor | None) -> Tensor | None:
    if t is None:
        return None
    check_tensor(name, argument, t)
    if t.dim() > 4:
        raise ValueError(
            f"{name}: {argument} must broadcast to (B, H, Tq, Tk), got {tuple(t.shape)}"
        )
    return t[(None,) * (4 - t.dim())]


def _seed(name: str, q: Tensor, seed: int | Tensor) -> Tensor:
    if isinstance(seed, Tensor):
        check_vector(name, "dropout_seed", seed, q, 1, (torch.int64,))
        return seed
    if not isinstance(seed, int):
        raise TypeError(f"{name}: dropout_seed must be an int or a Tensor, got {seed!r}")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"{name}: dropout_seed must fit 64 bits, got {seed}")
    # Not torch.tensor, which copies from the host: a CUDA graph cannot hold that.
    return torch.full((1,), seed, dtype=torch.int64, device=q.device)


def _autocast(name: str, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if not _is_any_autocast_enabled():
        return q, k, v
    for argument, t in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, argument, t)
    q, k, v = autocast((q, k, v), q)
    return q, k, v


def _longest(cu: Tensor, rows: Tensor) -> int:
    if not is_compiling() and detect_fake_mode(cu) is not None:
        # As for `explain`: there are no values, but no sequence is longer than all rows.
        return rows.size(0)
    lens = cu.diff()
    # Bounds that fall are for the checks of the op to refuse.
    return max(int(lens.max()), 0) if lens.numel() else 0


def _unnest(name: str, argument: str, t: Any) -> tuple[Tensor, Tensor]:
    if not t.is_nested or t.layout != torch.jagged or t.dim() != 4:
        raise ValueError(
            f"{name}: {argument} must be nested (B, j, H, D) of the jagged layout, like q"
        )
    if t._ragged_idx != 1:
        raise ValueError(f"{name}: {argument} must be ragged in dimension 1, got {t._ragged_idx}")
    if t.lengths() is None:
        return t.values(), t.offsets()
    # There are holes between the sequences.
    return torch.cat(t.unbind()), F.pad(t.lengths().cumsum(0), (1, 0))


def _four_dimensional(name: str, q: Tensor, k: Tensor, v: Tensor, gqa: bool):
    """(B, H, T, D) views of (..., T, D), and the leading sizes of the result."""
    same = slice(1 if gqa else 2)
    if q.dim() == 4 and q.shape[same] == k.shape[same] == v.shape[same] and k.dim() == v.dim() == 4:
        return q, k, v, tuple(q.shape[:2])
    own = [list(t.shape[:-2]) for t in (q, k, v)]
    if gqa:
        heads, own = [s[-1:] for s in own], [s[:-1] for s in own]
    else:
        heads = [[], [], []]
    try:
        shared = list(torch.broadcast_shapes(*own))
    except RuntimeError as error:
        raise ValueError(
            f"{name}: query, key and value must have leading sizes that broadcast, got "
            f"{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        ) from error
    leading = [shared + h for h in heads]
    views = []
    for t, lead in zip((q, k, v), leading):
        t = t.expand(*lead, *t.shape[-2:])
        t = t[(None,) * (4 - t.dim())] if t.dim() < 4 else t.flatten(0, -4)
        views.append(t)
    return (*views, tuple(leading[0]))


def _with_the_same_heads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """key and value, repeated to query's heads where they have different numbers of them."""
    if min(t.dim() for t in (query, key, value)) < 3 or key.size(-3) == value.size(-3):
        return key, value
    H = query.size(-3)
    if any(t.size(-3) == 0 or H % t.size(-3) for t in (key, value)):
        return key, value
    key, value = (t.repeat_interleave(H // t.size(-3), -3) for t in (key, value))
    return key, value


def _mask_of_batch(name: str, m: Tensor, q: Tensor, full: tuple[int, ...]) -> Tensor:
    """attn_mask, checked, for leading sizes of `full` (..., H, Tq, Tk) that were joined to B."""
    if m.dim() > len(full) or any(n not in (1, s) for n, s in zip(m.shape[::-1], full[::-1])):
        raise ValueError(
            f"{name}: attn_mask must broadcast to (..., H, Tq, Tk) = {full}, got {tuple(m.shape)}"
        )
    m = autocast_added(m, q)
    check_kind(name, "attn_mask", m, q, (torch.bool, q.dtype, torch.float32), "query")
    batch = full[:-2]
    if m.dim() <= 4 and len(batch) <= 2:
        return m
    m = m[(None,) * (2 - m.dim())] if m.dim() < 2 else m
    return m.expand(*batch[:-1], *([m.size(-3)] if m.dim() > 2 else [1]), *m.shape[-2:]).flatten(
        0, -4
    )


# ---- the call -----------------------------------------------------------------------------


def call(args: tuple) -> tuple[Tensor, Tensor]:
    """seqkern::attention, recorded where a derivative may be asked for."""
    # The op takes Tq and Tk, which would be constants of a graph of torch.jit.trace.
    if only_plain_operations() or (_get_tracing_state() is not None and args[10] is None):
        check_attention("attention", *args)
        if readable([args[i] for i in LENGTHS if args[i] is not None]):
            check_lengths("attention", *args)
        return in_plain_operations(_op, reference.attention, *args)
    if not takes_graph() and recorded([args[i] for i in DERIVED]):
        return Attention.apply(*args)
    return _op(*args)


def _with_seed(args: tuple) -> tuple:
    """The arguments with a seed drawn from PyTorch's generator of their device."""
    seed = torch.randint(2**62, (1,), device=args[0].device)
    return *args[:9], seed, *args[10:]


def _dropout_is_torchs(args: tuple) -> bool:
    """Whether PyTorch's own dropout serves, with its generator's numbers: on the CPU, where Philox
    in PyTorch operations costs many times as much, when no seed has to be kept to."""
    q, bias, slopes = args[0], args[4], args[7]
    # PyTorch's function takes a bias in the dtype of q alone, and 16 bits are coarse for one that
    # was given, or is made of distances, in float32.
    exact = q.dtype.itemsize >= 4 or (slopes is None and (bias is None or bias.dtype == q.dtype))
    without = *args[:9], None, *args[10:16], 0.0, *args[17:]
    return (
        q.device.type == "cpu" and exact and choose(without).kernel == "torch" and args[10] is None
    )


def _with_torch_dropout(args: tuple) -> Tensor:
    unused: tuple[Any, ...] = *args[:9], args[0].new_zeros(1, dtype=torch.int64), *args[10:]
    check_attention("attention", *unused)
    check_lengths("attention", *args)
    q, k, v, mask, bias, q_lens, k_lens, slopes, *_, causal, left, right, _, p, scale, _, _, _ = (
        args
    )
    live = reference.live_elements(q, k, mask, q_lens, k_lens, causal, left, right)
    bias = reference.with_alibi(q, k, bias, q_lens, k_lens, slopes, causal)
    if bias is None:
        m = live
    else:
        m = bias.to(q.dtype)
        m = m if live is None else m.masked_fill(~live, -torch.inf)
    q = reference.zero_beyond(q, q_lens)
    k, v = (reference.zero_beyond(t, k_lens) for t in (k, v))
    return F.scaled_dot_product_attention(
        q, k, v, m, p, scale=scale, enable_gqa=q.size(1) != k.size(1)
    )
