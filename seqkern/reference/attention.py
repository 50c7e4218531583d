"""Scaled dot-product attention in plain PyTorch: the definition, the fallback and the oracle.

With query i of L_q and key j of L_k (the lengths of a row of the batch), query i stands at the
key position p_i = i where causal is "top_left", else p_i = i + L_k - L_q, and

    s_ij  = scale * q_i . k_j
    s_ij  = softcap * tanh(s_ij / softcap)                 where there is a softcap
    s_ij += bias_ij - slope_h * |p_i - j|                  where there are a bias and ALiBi slopes
    s_ij  = -inf   if i >= L_q, j >= L_k, not mask_ij, j > p_i (causal),
                   j < p_i - window_left or j > p_i + window_right
    lse_i = log(sum_j exp(s_ij) + exp(sink_h))             the sink's term only where there is one
    p_ij  = exp(s_ij - lse_i),    o_i = sum_j p_ij keep_ij / (1 - dropout_p) v_j

after Vaswani et al. 2017 (equation 1), with grouped heads (Ainslie et al. 2023), ALiBi (Press et
al. 2022), softcap (Gemma 2, 2024) and sinks (a logit for each head that takes probability and
gives no value; Xiao et al. 2024). A row from which everything is excluded gives o = 0, and
lse = -inf without a sink; a query beyond L_q gives o = 0 and lse = -inf in any case.

Backward, with delta_i = do_i . o_i - dlse_i:

    ds_ij  = p_ij (keep_ij / (1 - dropout_p) do_i . v_j - delta_i)
    dbias  = ds,  dsink_h = -sum_i exp(sink_h - lse_i) delta_i
    draw   = ds (1 - tanh^2),  dq = scale draw k,  dk = scale draw^T q
    dv     = (p keep / (1 - dropout_p))^T do

All functions take the arguments of the op seqkern::attention in its order; fp16 and bf16 are
computed in fp32 and rounded once, at the end.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from seqkern.reference import packed
from seqkern.reference.recurrent import keep_dtypes

# More than the keys of any sequence. A window that reaches further holds all of them, and would
# wrap when a position is added.
FAR = 2**30

_PHILOX_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_PHILOX_KEYS = 0x9E3779B9, 0xBB67AE85
_PHILOX_ROUNDS = 7
_LOW = 0xFFFFFFFF


class Scores(NamedTuple):
    """s (B, H, Tq, Tk) with -inf where excluded; the slope of the softcap, or None; and q, k, v
    in the computing dtype, k and v repeated for each query head, zero beyond the lengths."""

    s: Tensor
    slope: Tensor | None
    q: Tensor
    k: Tensor
    v: Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    q_lens: Tensor | None,
    k_lens: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    causal: str | None,
    window_left: int,
    window_right: int,
    softcap: float,
    dropout_p: float,
    scale: float,
    max_q: int,
    max_k: int,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    """Attention of q (B, H, Tq, D) over k (B, Hkv, Tk, D), v (B, Hkv, Tk, Dv), or of packed rows.

    Args:
        mask, bias: 4-D, broadcast to (B, H, Tq, Tk); boolean (True takes part) and floating.
        q_lens, k_lens: (B,); what lies beyond them is never read.
        alibi_slopes: (H,) or (B, H). sinks: (H,).
        seed: int64 (1,), for dropout_p > 0.
        cu_q, cu_k: (B + 1,) bounds of packed sequences: then q is (Nq, H, D), k (Nk, Hkv, D),
            v (Nk, Hkv, Dv), and lengths are absent.
        causal: None, "top_left" or "bottom_right".
        window_left, window_right: keys seen on either side of p_i; -1 for all.
        softcap: 0 for none.
        max_q, max_k: Tq and Tk, or the longest packed sequence.
        deterministic: without meaning here: every sum has one order.

    Returns:
        o (B, H, Tq, Dv) in q's dtype and lse (B, H, Tq) in fp32 (fp64 for fp64); packed,
        (Nq, H, Dv) and (H, Nq).
    """
    extras = alibi_slopes, sinks, seed
    rule = causal, window_left, window_right, softcap, dropout_p, scale
    if cu_q is not None:
        args = q, k, v, mask, bias, None, None, *extras, cu_q, cu_k, *rule
        return packed.forward(attention, (*args, max_q, max_k, deterministic))
    return _dense(q, k, v, mask, bias, q_lens, k_lens, *extras, *rule)


def attention_backward(
    do: Tensor,
    dlse: Tensor | None,
    o: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    q_lens: Tensor | None,
    k_lens: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    causal: str | None,
    window_left: int,
    window_right: int,
    softcap: float,
    dropout_p: float,
    scale: float,
    max_q: int,
    max_k: int,
    deterministic: bool,
    need_dq: bool,
    need_dkv: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of `attention`.

    Args:
        do, dlse: the gradients of o and lse; dlse may be None.
        o, lse: what `attention` returned.
        need_dq, need_dkv, need_dbias: which gradients are wanted.

    Returns:
        dq, dk, dv, dbias, dsinks, shaped like their inputs; (0,) where absent or not wanted.
    """
    grads, needs = (do, dlse, o, lse), (need_dq, need_dkv, need_dbias)
    extras = alibi_slopes, sinks, seed
    rule = causal, window_left, window_right, softcap, dropout_p, scale
    if cu_q is not None:
        args = q, k, v, mask, bias, None, None, *extras, cu_q, cu_k, *rule
        args = *args, max_q, max_k, deterministic
        return packed.backward(attention_backward, grads, args, needs)
    return _dense_backward(*grads, q, k, v, mask, bias, q_lens, k_lens, *extras, *rule, *needs)


def without_autocast(compute: Callable[..., Any]) -> Callable[..., Any]:
    """Inside autocast, too, the products are those of the computing dtype."""

    @functools.wraps(compute)
    def computed(first: Tensor, *args):
        with keep_dtypes(first.device):
            return compute(first, *args)

    return computed


@without_autocast
def _dense(
    q, k, v, mask, bias, q_lens, k_lens, alibi_slopes, sinks, seed,
    causal, window_left, window_right, softcap, dropout_p, scale,
):  # fmt: skip
    dtype = q.dtype
    live = live_elements(q, k, mask, q_lens, k_lens, causal, window_left, window_right)
    bias = with_alibi(q, k, bias, q_lens, k_lens, alibi_slopes, causal)
    s, _, q, k, v = _scores(q, k, v, live, bias, q_lens, k_lens, softcap, scale)
    # -inf only in a row without anything left, where any finite value will do.
    top = (
        s.detach().amax(-1, keepdim=True)
        if s.size(-1)
        else s.new_full((*s.shape[:3], 1), -torch.inf)
    )
    top = top.clamp(min=torch.finfo(s.dtype).min)
    sink = None if sinks is None else sinks.to(s.dtype)[:, None, None]
    if sink is not None:
        top = torch.maximum(top, sink.detach())
    e = (s - top).exp()
    total = e.sum(-1, keepdim=True)
    if sink is not None:
        total = total + (sink - top).exp()
    empty = total == 0
    total = total.masked_fill(empty, 1)
    if q_lens is not None:
        # A query that does not exist has no sink either.
        empty = (
            empty | (torch.arange(q.size(2), device=q.device) >= q_lens[:, None])[:, None, :, None]
        )
    lse = (top + total.log()).masked_fill(empty, -torch.inf).squeeze(-1)
    p = e / total
    if dropout_p > 0:
        p = p * _kept(p, seed, dropout_p)
    return (p @ v).to(dtype), lse


@without_autocast
def _dense_backward(
    do, dlse, o, lse, q, k, v, mask, bias, q_lens, k_lens, alibi_slopes, sinks, seed,
    causal, window_left, window_right, softcap, dropout_p, scale, need_dq, need_dkv, need_dbias,
):  # fmt: skip
    dtypes = q.dtype, k.dtype, v.dtype
    Hkv, none = k.size(1), q.new_empty(0)
    live = live_elements(q, k, mask, q_lens, k_lens, causal, window_left, window_right)
    shifted = with_alibi(q, k, bias, q_lens, k_lens, alibi_slopes, causal)
    s, slope, q, k, v = _scores(q, k, v, live, shifted, q_lens, k_lens, softcap, scale)
    do, o = zero_beyond(do.to(s.dtype), q_lens), o.to(s.dtype)
    delta = (do * o).sum(-1)
    if dlse is not None:
        delta = delta - dlse.to(s.dtype)
    empty = lse == -torch.inf
    delta = zero_beyond(delta.masked_fill(empty, 0).unsqueeze(-1), q_lens)
    lse = lse.masked_fill(empty, torch.inf)
    p = (s - lse.unsqueeze(-1)).exp()
    dp = do @ v.mT
    kept = _kept(p, seed, dropout_p) if dropout_p > 0 else None
    ds = p * ((dp if kept is None else dp * kept) - delta)
    dbias = dsinks = dq = dk = dv = none
    if bias is not None and need_dbias:
        dbias = ds.sum_to_size(bias.shape).to(bias.dtype)
    if sinks is not None:
        taken = (sinks.to(s.dtype)[:, None] - lse).exp() * delta.squeeze(-1)
        dsinks = -taken.sum((0, 2)).to(sinks.dtype)
    draw = ds if slope is None else ds * slope
    if need_dq:
        dq = (scale * (draw @ k)).to(dtypes[0])
    if need_dkv:
        dk = _sum_groups(scale * (draw.mT @ q), Hkv).to(dtypes[1])
        dv = _sum_groups((p if kept is None else p * kept).mT @ do, Hkv).to(dtypes[2])
    return dq, dk, dv, dbias, dsinks


def _scores(q, k, v, live, bias, q_lens, k_lens, softcap, scale) -> Scores:
    dtype = q.dtype if q.dtype in (torch.float32, torch.float64) else torch.float32
    groups = q.size(1) // max(k.size(1), 1)
    q = zero_beyond(q.to(dtype), q_lens)
    k, v = (zero_beyond(t.to(dtype), k_lens).repeat_interleave(groups, 1) for t in (k, v))
    s, slope = scale * (q @ k.mT), None
    if softcap > 0:
        t = (s / softcap).tanh()
        s, slope = softcap * t, 1 - t * t
    if bias is not None:
        s = s + bias.to(dtype)
    if live is not None:
        s = s.masked_fill(~live, -torch.inf)
    return Scores(s, slope, q, k, v)


def live_elements(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    q_lens: Tensor | None,
    k_lens: Tensor | None,
    causal: str | None,
    window_left: int,
    window_right: int,
) -> Tensor | None:
    """What takes part: boolean, broadcasts to (B, H, Tq, Tk); None where everything does."""
    i, j, p = positions(q, k, q_lens, k_lens, causal)
    parts = []
    if mask is not None:
        parts.append(mask)
    if q_lens is not None:
        parts.append(i < q_lens[:, None, None, None])
    if k_lens is not None:
        parts.append(j < k_lens[:, None, None, None])
    parts += within(p, j, causal, window_left, window_right)
    if not parts:
        return None
    live = parts[0]
    for part in parts[1:]:
        live = live & part
    return live


def within(p: Tensor, j: Tensor, causal, window_left: int, window_right: int) -> list[Tensor]:
    """What each rule leaves of the keys j to queries at the positions p, boolean."""
    parts = []
    if causal is not None:
        parts.append(j <= p)
    if window_left >= 0:
        parts.append(j >= p - min(window_left, FAR))
    if window_right >= 0:
        parts.append(j <= p + min(window_right, FAR))
    return parts


def positions(q, k, q_lens, k_lens, causal) -> tuple[Tensor, Tensor, Tensor]:
    """i (Tq, 1), j (Tk,) and p_i, all of which broadcast to (B, 1, Tq, Tk)."""
    i = torch.arange(q.size(2), device=q.device)[:, None]
    j = torch.arange(k.size(2), device=q.device)
    if causal == "top_left":
        return i, j, i
    ends = (q.size(2), q_lens), (k.size(2), k_lens)
    L_q, L_k = (t if n is None else n[:, None, None, None].clamp(0, t).long() for t, n in ends)
    return i, j, i + L_k - L_q


def with_alibi(q, k, bias, q_lens, k_lens, alibi_slopes, causal) -> Tensor | None:
    """The bias with ALiBi's added to it."""
    if alibi_slopes is None:
        return bias
    _, j, p = positions(q, k, q_lens, k_lens, causal)
    slopes = alibi_slopes.to(torch.promote_types(q.dtype, torch.float32))
    alibi = -slopes[..., None, None] * (p - j).abs()
    return alibi if bias is None else bias + alibi


def zero_beyond(t: Tensor, lens: Tensor | None) -> Tensor:
    """t (B, T, D) or (B, H, T, D) with zeros from position lens[b] on."""
    if lens is None:
        return t
    beyond = (torch.arange(t.size(-2), device=t.device) >= lens[:, None]).unsqueeze(-1)
    return t.masked_fill(beyond if t.dim() == 3 else beyond.unsqueeze(1), 0)


def _sum_groups(t: Tensor, heads: int) -> Tensor:
    """Sums the gradients (B, H, T, D) of the query heads that share a key head."""
    if heads == t.size(1):
        return t
    return t.unflatten(1, (heads, -1)).sum(2)


# ---- dropout ------------------------------------------------------------------------------


def _kept(p: Tensor, seed: Tensor, dropout_p: float) -> Tensor:
    """keep_ij / (1 - dropout_p), shaped like p (B, H, Tq, Tk)."""
    keep = keep_mask(seed, tuple(p.shape), dropout_p)
    return keep.to(p.dtype) / (1 - dropout_p)


def keep_mask(seed: Tensor, shape: tuple[int, ...], dropout_p: float) -> Tensor:
    """Which of the probabilities (B, H, Tq, Tk) dropout keeps, boolean.

    Philox-4x32 with 7 rounds (Salmon et al. 2011), keyed by the two halves of the int64 seed (1,)
    and counting (j, i, h, b): a pure function of the place, whatever tile or pass asks.
    """
    b, h, i, j = (
        torch.arange(n, device=seed.device).view([-1 if d == axis else 1 for d in range(4)])
        for axis, n in enumerate(shape)
    )
    bits = _philox((j, i, h, b), (seed & _LOW, (seed >> 32) & _LOW))
    return (bits >= int(dropout_p * 2**32)).expand(shape)


def _philox(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> Tensor:
    """The first of the four output words. Words are held in int64, where the low and the high half
    of a product of two words come out right although the product may wrap."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_PHILOX_ROUNDS):
        a, b = _PHILOX_MULTIPLIERS[0] * c0, _PHILOX_MULTIPLIERS[1] * c2
        c0 = ((b >> 32) & _LOW) ^ c1 ^ k0
        c2 = ((a >> 32) & _LOW) ^ c3 ^ k1
        c1, c3 = b & _LOW, a & _LOW
        k0, k1 = (k0 + _PHILOX_KEYS[0]) & _LOW, (k1 + _PHILOX_KEYS[1]) & _LOW
    return c0
