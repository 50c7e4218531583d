"""MultiheadAttention: ``torch.nn``'s parameters and interface on seqkern's attention."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from seqkern.ops._checks import autocast_added
from seqkern.ops.attention import attention, attention_varlen
from seqkern.ops.attention_weights import attention_with_weights


class _Ragged(NamedTuple):
    """The sequences of a nested tensor one after another: rows (N, E), their bounds (B + 1,) and
    the longest length."""

    rows: Tensor
    bounds: Tensor
    longest: int


class MultiheadAttention(torch.nn.MultiheadAttention):
    """Multi-head attention, in place of ``torch.nn.MultiheadAttention``.

    With E = ``embed_dim``, H = ``num_heads`` and D = E / H (Vaswani et al., Attention Is All You
    Need, 2017, section 3.2.2)::

        head_h = softmax(q_h k_h^T / sqrt(D) + mask) v_h,    q = W_q query + b_q, k and v alike
        output = W_o (head_1, ..., head_H) + b_o

    Args:
        embed_dim: E, features of the query and of the output.
        num_heads: H, a divisor of E.
        dropout: probability of dropping an attention weight, in training. Default 0.
        bias: whether the projections have biases. Default True.
        add_bias_kv: append one learnt key and value to each sequence. Default False.
        add_zero_attn: append one key and value of zeros. Default False.
        kdim, vdim: features of key and value. Default E.
        batch_first: batched input and output are (B, T, .) in place of (T, B, .). Default False.
        device, dtype: of the parameters.

    Parameters: ``in_proj_weight`` (3E, E), the rows of q, k and v in this order; or, where kdim
    or vdim differ from E, ``q_proj_weight`` (E, E), ``k_proj_weight`` (E, kdim) and
    ``v_proj_weight`` (E, vdim); ``in_proj_bias`` (3E,), ``out_proj.weight`` (E, E),
    ``out_proj.bias`` (E,), ``bias_k`` and ``bias_v`` (1, 1, E).

    It is a subclass of ``torch.nn.MultiheadAttention``, of which it replaces ``forward`` alone:
    constructor, initialisation, ``state_dict`` and ``repr`` are inherited, and what asks by
    ``isinstance`` (other layers, wrapping policies, users' own initialisation) knows it.
    ``torch.compile`` has no objection to this class, as it has to that of ``torch.nn.LSTM``.

    Other than ``torch.nn.MultiheadAttention``:

    - A query to which every key is masked gets zeros from the attention, hence ``out_proj.bias``,
      and weights of zero, on every path; torch.nn gives NaN on some.
    - ``is_causal`` without ``attn_mask`` raises in every mode; torch.nn's fast path ignores it.
    - Nested tensors of both layouts, for self- and cross-attention, in training too.
    - A boolean mask may stand beside a floating one; no copy in one dtype is made of the two.
    - ``torch.jit.script`` does not take it, ``torch.compile``, ``torch.export`` and, with plain
      PyTorch operations in the place of the kernels, ``torch.jit.trace`` do.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend with ``query`` to ``key`` and ``value``.

        Args:
            query: (Tq, B, E), (B, Tq, E) if ``batch_first``, or (Tq, E) without batch; or nested
                (B, j, E), which is batch first in any case.
            key, value: alike, of Tk steps with kdim and vdim features.
            key_padding_mask: (B, Tk) or (Tk,): True excludes a key; or floating, added to the
                scores.
            need_weights: whether to return the weights, which are then held in memory: Tq x Tk
                for each head.
            attn_mask: (Tq, Tk) or (B*H, Tq, Tk): True excludes, or floating, added.
            average_attn_weights: return the mean of the weights over the heads.
            is_causal: a promise that ``attn_mask`` excludes exactly the keys after each query.
                The mask is then not read, unless it takes a gradient, weights are needed, or
                padding of other sequences than the query's is masked too.

        Returns:
            The output, laid out like ``query``, and the weights (B, Tq, Tk), for each head
            (B, H, Tq, Tk), without batch (Tq, Tk) or (H, Tq, Tk); None if not needed. Of nested
            input they are padded with zeros.

        Raises:
            AssertionError: the rank or size of ``query``, ``key``, ``value`` or
                ``key_padding_mask`` or the dtype of a mask is wrong, or nested input is mixed
                with masks, appended keys or dense input.
            RuntimeError: the size of ``attn_mask``, the batch size of ``key`` or a dtype is
                wrong, or there is ``is_causal`` and no ``attn_mask``.
        """
        if query.is_nested or key.is_nested or value.is_nested:
            if key_padding_mask is not None or attn_mask is not None or is_causal:
                raise AssertionError("nested input takes no masks: its sequences have no padding")
            return self._forward_nested(query, key, value, need_weights, average_attn_weights)
        if attn_mask is None and is_causal:
            raise RuntimeError("is_causal is a hint on attn_mask, which must be given too")
        _check_ranks(query, key, value, key_padding_mask, attn_mask, self.num_heads)
        batched, itself = query.dim() == 3, query is key
        if not batched:
            query, key, value = _with_batch(query, key, value)
            if key_padding_mask is not None:
                key_padding_mask = key_padding_mask.unsqueeze(0)
        batch_first = self.batch_first or not batched
        q, k, v = self._heads(query, key, value, batch_first)

        dropout_p = self.dropout if self.training else 0.0
        # No factor 1 / (1 - p) makes up for all weights dropped, so the op refuses 1.0.
        explicit = need_weights or dropout_p == 1.0
        # Beside the padding of another sequence than the query's, the mask itself is read, as in
        # torch.nn: with Tq != Tk there is more than one causal mask.
        causal = is_causal and not explicit
        if attn_mask is not None and attn_mask.requires_grad:
            causal = False
        if key_padding_mask is not None:
            causal = causal and itself and not self._appended()
        mask, bias = self._masks(q, k, None if causal else attn_mask, key_padding_mask)
        k, v = self._append(k, v)
        weights = None
        if explicit:
            o, weights = attention_with_weights(q, k, v, mask=mask, bias=bias, dropout_p=dropout_p)
        else:
            rule = "top_left" if causal else None
            o = attention(q, k, v, causal=rule, mask=mask, bias=bias, dropout_p=dropout_p)
        o = o.permute(0, 2, 1, 3) if batch_first else o.permute(2, 0, 1, 3)
        o = F.linear(o.flatten(2), self.out_proj.weight, self.out_proj.bias)
        weights = self._weights(weights, need_weights, average_attn_weights)
        if not batched:
            o, weights = o.squeeze(0), None if weights is None else weights.squeeze(0)
        return o, weights

    def _heads(
        self, query: Tensor, key: Tensor, value: Tensor, batch_first: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v as (B, H, T, D) views of the projections."""
        self._check_sizes(query, key, value, 0 if batch_first else 1)
        order = (0, 2, 1, 3) if batch_first else (1, 2, 0, 3)
        heads = self.num_heads, self.head_dim
        q, k, v = self._project(query, key, value)
        return (
            q.unflatten(-1, heads).permute(order),
            k.unflatten(-1, heads).permute(order),
            v.unflatten(-1, heads).permute(order),
        )

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """The projections (..., E): one product for what is one tensor."""
        b, E = self.in_proj_bias, self.embed_dim
        if not self._qkv_same_embed_dim:
            inputs = query, key, value
            weights = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
            biases = (None, None, None) if b is None else b.chunk(3)
            return tuple(F.linear(*args) for args in zip(inputs, weights, biases, strict=True))
        W = self.in_proj_weight
        if query is key and key is value:
            return F.linear(query, W, b).chunk(3, -1)
        sizes = [E, 2 * E] if key is value else [E, E, E]
        biases = (None,) * len(sizes) if b is None else b.split(sizes)
        inputs = (query, key, value)[: len(sizes)]
        parts = [F.linear(*args) for args in zip(inputs, W.split(sizes), biases, strict=True)]
        return (parts[0], *parts[1].chunk(2, -1)) if key is value else tuple(parts)

    def _appended(self) -> int:
        """How many keys are appended to those given."""
        return int(self.bias_k is not None) + int(self.add_zero_attn)

    def _append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k and v (B, H, Tk, D) with the learnt key and value and those of zeros at the end."""
        if not self._appended():
            return k, v
        B, H, _, D = k.shape
        ks, vs = [k], [v]
        if self.bias_k is not None and self.bias_v is not None:
            for parts, learnt in ((ks, self.bias_k), (vs, self.bias_v)):
                parts.append(learnt.view(1, H, 1, D).expand(B, H, 1, D).to(k.dtype))
        if self.add_zero_attn:
            ks.append(k.new_zeros(B, H, 1, D))
            vs.append(v.new_zeros(B, H, 1, D))
        return torch.cat(ks, 2), torch.cat(vs, 2)

    def _masks(
        self, q: Tensor, k: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """The op's mask (True takes part) and bias, each (B or 1, H or 1, Tq or 1, Tk), with the
        appended keys open to all; k (B, H, Tk, D) is without those."""
        B, H, Tq, Tk = *q.shape[:3], k.size(2)
        parts = []
        if attn_mask is not None:
            expected = (Tq, Tk) if attn_mask.dim() == 2 else (B * H, Tq, Tk)
            if tuple(attn_mask.shape) != expected:
                raise RuntimeError(f"attn_mask must be {expected}, got {tuple(attn_mask.shape)}")
            per_head = attn_mask.dim() == 3
            parts.append(attn_mask.unflatten(0, (B, H)) if per_head else attn_mask[None, None])
        if key_padding_mask is not None:
            if tuple(key_padding_mask.shape) != (B, Tk):
                raise AssertionError(
                    f"key_padding_mask must be (B, Tk) = {(B, Tk)}, got "
                    f"{tuple(key_padding_mask.shape)}"
                )
            parts.append(key_padding_mask[:, None, None])
        excluded = bias = None
        for part in parts:
            part = F.pad(part, (0, self._appended())) if self._appended() else part
            if part.dtype == torch.bool:
                excluded = part if excluded is None else excluded | part
            else:
                bias = part if bias is None else bias + part
        bias = None if bias is None else autocast_added(bias, q)
        if bias is not None and bias.dtype not in (q.dtype, torch.float32):
            raise RuntimeError(
                f"a floating mask must be {q.dtype} as the query is, or torch.float32, got "
                f"{bias.dtype}"
            )
        return None if excluded is None else ~excluded, bias

    def _weights(self, weights: Tensor | None, needed: bool, average: bool) -> Tensor | None:
        if weights is None or not needed:
            return None
        return weights.mean(1) if average else weights

    def _check_sizes(self, query: Tensor, key: Tensor, value: Tensor, batch_dim: int) -> None:
        """Refuse what ``torch.nn`` refuses, with its exception types."""
        if query.size(-1) != self.embed_dim:
            raise AssertionError(
                f"query must have embed_dim = {self.embed_dim} features, got {tuple(query.shape)}"
            )
        same = self._qkv_same_embed_dim
        if key.shape[: 3 if same else 2] != value.shape[: 3 if same else 2]:
            raise AssertionError(
                f"key and value must match in batch and length{' and features' if same else ''}, "
                f"got {tuple(key.shape)} and {tuple(value.shape)}"
            )
        for name, tensor, features in (("key", key, self.kdim), ("value", value, self.vdim)):
            if tensor.size(-1) != features:
                raise (RuntimeError if same else AssertionError)(
                    f"{name} must have {features} features, got {tuple(tensor.shape)}"
                )
        _check_batch(query.size(batch_dim), key.size(batch_dim))

    # ---- nested tensors ---------------------------------------------------------------------

    def _forward_nested(
        self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool, average: bool
    ) -> tuple[Tensor, Tensor | None]:
        if self._appended():
            raise AssertionError("nested input goes with neither add_bias_kv nor add_zero_attn")
        q_in = _ragged("query", query)
        k_in = q_in if key is query else _ragged("key", key)
        v_in = k_in if value is key else _ragged("value", value)
        _check_same_lengths(key, value)
        _check_batch(query.size(0), key.size(0))
        heads = self.num_heads, self.head_dim
        q, k, v = (
            part.unflatten(-1, heads) for part in self._project(q_in.rows, k_in.rows, v_in.rows)
        )
        dropout_p = self.dropout if self.training else 0.0
        weights = None
        if need_weights or dropout_p == 1.0:
            o, weights = _padded(q, k, v, q_in, k_in, dropout_p)
        else:
            bounds = q_in.bounds, k_in.bounds, q_in.longest, k_in.longest
            o = attention_varlen(q, k, v, *bounds, dropout_p=dropout_p)
        o = F.linear(o.flatten(1), self.out_proj.weight, self.out_proj.bias)
        return _nested_like(o, query, q_in.longest), self._weights(weights, need_weights, average)


def _check_ranks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    num_heads: int,
) -> None:
    """Refuse what ``torch.nn`` refuses, with its exception type."""
    dim = query.dim()
    if dim not in (2, 3):
        raise AssertionError(f"query must be 2-D, or 3-D with a batch, got {dim}-D")
    expected = {"key": (key, (dim,)), "value": (value, (dim,))}
    expected |= {
        "key_padding_mask": (key_padding_mask, (dim - 1,)),
        "attn_mask": (attn_mask, (2, 3)),
    }
    for name, (tensor, dims) in expected.items():
        if tensor is not None and tensor.dim() not in dims:
            ranks = " or ".join(f"{d}-D" for d in dims)
            raise AssertionError(
                f"{name} must be {ranks} with a {dim}-D query, got {tensor.dim()}-D"
            )
    for name, mask in (("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask)):
        check_mask_dtype(name, mask)
    if dim == 2 and attn_mask is not None and attn_mask.dim() == 3:
        shape = num_heads, query.size(0), key.size(0)
        if tuple(attn_mask.shape) != shape:
            raise AssertionError(
                f"attn_mask must be (H, Tq, Tk) = {shape} without batch, got "
                f"{tuple(attn_mask.shape)}"
            )


def _check_batch(queries: int, keys: int) -> None:
    """Refuse what ``torch.nn`` refuses, with its exception type."""
    if keys != queries:
        raise RuntimeError(f"key must have the batch size of query, {queries}, got {keys}")


def check_mask_dtype(name: str, mask: Tensor | None) -> None:
    """Refuse a mask that is neither boolean nor floating, with ``torch.nn``'s exception type."""
    if mask is not None and mask.dtype != torch.bool and not mask.is_floating_point():
        raise AssertionError(f"{name} must be boolean or floating, got {mask.dtype}")


def _with_batch(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All three (1, T, .); what was one tensor stays one."""
    q = query.unsqueeze(0)
    k = q if key is query else key.unsqueeze(0)
    return q, k, k if value is key else value.unsqueeze(0)


# ---- nested tensors -------------------------------------------------------------------------


def _ragged(name: str, tensor: Any) -> _Ragged:
    if not tensor.is_nested:
        raise AssertionError(f"{name} must be nested as the other inputs are, got a dense tensor")
    if tensor.dim() != 3:
        raise AssertionError(f"{name} must be nested (B, j, E), got {tensor.dim()}-D")
    if tensor.layout == torch.jagged:
        if tensor._ragged_idx != 1:
            raise AssertionError(f"{name} must be ragged in dimension 1, got {tensor._ragged_idx}")
        tensor = tensor.contiguous()
        return _Ragged(tensor.values(), tensor.offsets(), tensor._get_max_seqlen())
    lens = tensor._nested_tensor_size()[:, 0]
    bounds = F.pad(lens.cumsum(0), (1, 0)).to(tensor.device)
    rows = tensor.contiguous().values().view(-1, tensor.size(-1))
    return _Ragged(rows, bounds, int(lens.max()))


def _nested_like(rows: Tensor, tensor: Any, longest: int) -> Tensor:
    """Rows (N, E) as a nested tensor with the layout and lengths of another one."""
    tensor = tensor.contiguous()
    if tensor.layout == torch.jagged:
        return torch.nested.nested_tensor_from_jagged(rows, tensor.offsets(), max_seqlen=longest)
    return torch.ops.aten._nested_view_from_buffer(
        rows.reshape(-1),
        tensor._nested_tensor_size(),
        tensor._nested_tensor_strides(),
        tensor._nested_tensor_storage_offsets(),
    )


def _check_same_lengths(key: Any, value: Any) -> None:
    if key is value:
        return
    same = key.layout == value.layout
    if same and key.layout == torch.jagged:
        same = key.size(1) == value.size(1)
    elif same:
        same = torch.equal(key._nested_tensor_size()[:, 0], value._nested_tensor_size()[:, 0])
    if not same:
        raise AssertionError(
            "nested key and value must have one layout and the same lengths (the same offsets "
            "where they are jagged)"
        )


def _padded(
    q: Tensor, k: Tensor, v: Tensor, q_in: _Ragged, k_in: _Ragged, dropout_p: float
) -> tuple[Tensor, Tensor]:
    """The rows (Nq, H, D) of the output and the weights (B, H, Tq, Tk), zero in the padding."""

    def pad(rows: Tensor, ragged: _Ragged) -> Tensor:
        nested = torch.nested.nested_tensor_from_jagged(
            rows.flatten(1), ragged.bounds, max_seqlen=ragged.longest
        )
        padded = nested.to_padded_tensor(0.0)
        return padded.unflatten(-1, rows.shape[1:]).transpose(1, 2)

    def real(ragged: _Ragged, T: int) -> Tensor:
        return torch.arange(T, device=q.device) < ragged.bounds.diff()[:, None]

    q4, k4, v4 = pad(q, q_in), pad(k, k_in), pad(v, k_in)
    queries, keys = real(q_in, q4.size(2)), real(k_in, k4.size(2))
    mask = queries[:, None, :, None] & keys[:, None, None]
    o, weights = attention_with_weights(q4, k4, v4, mask=mask, dropout_p=dropout_p)
    b = torch.arange(q4.size(0), device=q.device)
    b = b.repeat_interleave(q_in.bounds.diff(), output_size=q.size(0))
    i = torch.arange(q.size(0), device=q.device) - q_in.bounds[b]
    return o.transpose(1, 2)[b, i], weights
