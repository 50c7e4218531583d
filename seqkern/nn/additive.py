"""Attention of one head for recurrent decoders: additive, and Luong's two dot products.

The three are called alike and can stand in each other's place.
"""

from abc import ABC, abstractmethod
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from seqkern.ops._additive_checks import check_public_mask
from seqkern.ops._attention_checks import check_k_lens
from seqkern.ops._checks import check_alike
from seqkern.ops.additive import additive_attention
from seqkern.ops.attention import attention
from seqkern.ops.attention_weights import attention_with_weights


class _OneHead(nn.Module, ABC):
    """The call that the three have in common.

    Args:
        query_size, key_size, projected_size: the features of query, key and u(key); None for any.
    """

    u: nn.Module

    def __init__(
        self, query_size: int | None, key_size: int | None, projected_size: int | None
    ) -> None:
        super().__init__()
        for size in (query_size, key_size, projected_size):
            if size is None:
                continue
            if not isinstance(size, Integral) or isinstance(size, bool):
                raise TypeError(f"{type(self).__name__}: sizes must be whole numbers, got {size!r}")
            if size < 1:
                raise ValueError(f"{type(self).__name__}: sizes must be at least 1, got {size}")
        self.query_size, self.key_size = query_size, key_size
        self.projected_size = projected_size

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor | None = None,
        *,
        k_lens: Tensor | None = None,
        mask: Tensor | None = None,
        u_key: Tensor | None = None,
        need_weights: bool = False,
    ) -> Any:
        """Attend with each query to the keys of its row of the batch.

        Args:
            query: (B, Tq, query_size).
            key: (B, Tk, key_size).
            value: (B, Tk, Dv); the keys themselves if None.
            k_lens: (B,) int32 or int64, how many of the Tk are real, from 0 to Tk. The others
                take no part.
            mask: broadcasts to (B, Tq, Tk); boolean, True takes part, or floating, added to the
                scores. A floating one has a gradient.
            u_key: ``self.u(key)`` where it was computed before: over the steps of a decoder it
                stays the same.
            need_weights: whether to return the weights too.

        Returns:
            The context (B, Tq, Dv); with ``need_weights`` also the weights (B, Tq, Tk). Both are
            zeros for a query to which nothing is left.

        Raises:
            TypeError: an argument is of the wrong type.
            ValueError: a size, dtype or device does not fit; the message names it.
        """
        self._check("query", query, self.query_size)
        self._check("key", key, self.key_size)
        if query.size(0) != key.size(0):
            raise ValueError(
                f"{type(self).__name__}: query must have the batch size {key.size(0)} of key, got "
                f"{tuple(query.shape)}"
            )
        value = key if value is None else value
        self._check("value", value, None, of=key)
        tensors = {"query": query, "key": key, "value": value}
        if u_key is not None:
            self._check("u_key", u_key, self.projected_size or query.size(2), of=key)
            tensors["u_key"] = u_key
        if mask is not None:
            check_public_mask(type(self).__name__, mask, query, key)
        # With weights PyTorch's operations serve, which take some mixtures.
        if need_weights and len({(t.dtype, t.device) for t in tensors.values()}) > 1:
            self._check_kinds(tensors)
        try:
            projected = self.u(key) if u_key is None else u_key
            return self._attend(query, projected, value, k_lens, mask, need_weights)
        except (AttributeError, RuntimeError, TypeError, ValueError):
            # By the names that they have here, which only an error is worth the time for.
            self._check_kinds(tensors)
            if k_lens is not None:
                check_k_lens(type(self).__name__, k_lens, query, key.size(1), "query")
            raise

    @abstractmethod
    def _attend(
        self,
        query: Tensor,
        u_key: Tensor,
        value: Tensor,
        k_lens: Tensor | None,
        mask: Tensor | None,
        need_weights: bool,
    ) -> Any:
        """`forward` with the keys projected."""

    def _check(self, name: str, t: Tensor, size: int | None, of: Tensor | None = None) -> None:
        owner = type(self).__name__
        if not isinstance(t, Tensor):
            raise TypeError(f"{owner}: {name} must be a Tensor, got {type(t).__name__}")
        steps = "Tq" if name == "query" else "Tk"
        if t.dim() != 3 or (size is not None and t.size(2) != size):
            raise ValueError(
                f"{owner}: {name} must be (B, {steps}, {size or 'D'}), got {tuple(t.shape)}"
            )
        if of is not None and t.shape[:2] != of.shape[:2]:
            raise ValueError(
                f"{owner}: {name} must have the B, Tk = {tuple(of.shape[:2])} of key, got "
                f"{tuple(t.shape)}"
            )

    def _check_kinds(self, tensors: dict[str, Tensor]) -> None:
        """One dtype and one device, those of the parameters where there are any."""
        like = next(self.parameters(), tensors["query"])
        of = "query" if like is tensors["query"] else "the parameters"
        check_alike(type(self).__name__, tensors, like, of)

    def extra_repr(self) -> str:
        """The sizes, for repr()."""
        named = ("query_size", self.query_size), ("key_size", self.key_size)
        return ", ".join(f"{name}={size}" for name, size in named if size is not None)


class AdditiveAttention(_OneHead):
    """Additive attention (Bahdanau, Cho and Bengio 2015, appendix A.1.2)::

        e_ij = v . tanh(w query_i + b + u key_j)
        a_ij = softmax_j(e_ij),    c_i = sum_j a_ij value_j

    with v replaced by g v / ||v|| where ``normalize`` (weight normalisation, Salimans and Kingma
    2016).

    Args:
        query_size: features of the query, such as the state of a decoder.
        key_size: features of the keys, such as the outputs of an encoder.
        attention_size: D, units of the score.
        bias: whether the query's projection has a bias. Default True.
        normalize: whether v is normalised. Default False.
        device, dtype: of the parameters.

    Parameters: ``w.weight`` (D, query_size), ``w.bias`` (D,), ``u.weight`` (D, key_size), ``v``
    (D,), and with ``normalize`` ``g`` (). The projections start like ``nn.Linear``, v uniform
    within D**-0.5 around 0, and g as ||v||, which leaves the scores as they are without it.

    Raises:
        TypeError: a size is no whole number.
        ValueError: a size is less than 1.
    """

    def __init__(
        self,
        query_size: int,
        key_size: int,
        attention_size: int,
        *,
        bias: bool = True,
        normalize: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(query_size, key_size, attention_size)
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        self.attention_size, self.normalize = attention_size, normalize
        self.w = nn.Linear(query_size, attention_size, bias=bias, **like)
        self.u = nn.Linear(key_size, attention_size, bias=False, **like)
        self.v = nn.Parameter(torch.empty(attention_size, **like))
        self.g = nn.Parameter(torch.empty((), **like)) if normalize else None
        self._reset_v()

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        for projection in self.children():
            if isinstance(projection, nn.Linear):
                projection.reset_parameters()
        self._reset_v()

    def _reset_v(self) -> None:
        bound = self.attention_size**-0.5
        nn.init.uniform_(self.v, -bound, bound)
        if self.g is not None:
            with torch.no_grad():
                self.g.copy_(torch.linalg.vector_norm(self.v))

    def _attend(self, query, u_key, value, k_lens, mask, need_weights) -> Any:
        return additive_attention(
            self.w(query),
            u_key,
            value,
            self.v,
            g=self.g,
            k_lens=k_lens,
            mask=mask,
            return_weights=need_weights,
        )

    def extra_repr(self) -> str:
        """The sizes and options, for repr()."""
        more = ", normalize=True" if self.normalize else ""
        return f"{super().extra_repr()}, attention_size={self.attention_size}{more}"


class DotAttention(_OneHead):
    """Attention by the dot product (Luong, Pham and Manning 2015, section 3.1, "dot")::

        e_ij = query_i . key_j,    a_ij = softmax_j(e_ij),    c_i = sum_j a_ij value_j

    Query and key have as many features; there are no parameters, and ``u`` is the identity. The
    scores are not divided by the root of the number of features, as they are in
    ``seqkern.attention``.
    """

    def __init__(self) -> None:
        super().__init__(None, None, None)
        self.u = nn.Identity()

    def _attend(self, query, u_key, value, k_lens, mask, need_weights) -> Any:
        self._check("key", u_key, query.size(2))
        return _dot(query, u_key, value, k_lens, mask, need_weights)


class GeneralAttention(_OneHead):
    """Attention by a bilinear form (Luong, Pham and Manning 2015, section 3.1, "general")::

        e_ij = query_i . u key_j,    a_ij = softmax_j(e_ij),    c_i = sum_j a_ij value_j

    Args:
        query_size, key_size: features of the query and of the keys.
        device, dtype: of the parameter.

    Parameter: ``u.weight`` (query_size, key_size), W_a in the paper.

    Raises:
        TypeError: a size is no whole number.
        ValueError: a size is less than 1.
    """

    def __init__(
        self,
        query_size: int,
        key_size: int,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(query_size, key_size, query_size)
        self.u = nn.Linear(key_size, query_size, bias=False, device=device, dtype=dtype)

    def _attend(self, query, u_key, value, k_lens, mask, need_weights) -> Any:
        return _dot(query, u_key, value, k_lens, mask, need_weights)


def _dot(query, u_key, value, k_lens, mask, need_weights) -> Any:
    """Scaled dot-product attention with one head and the scale 1."""
    q, k, v = (t.unsqueeze(1) for t in (query, u_key, value))
    m = mask.unsqueeze(1) if isinstance(mask, Tensor) and mask.dim() == 3 else mask
    boolean = isinstance(m, Tensor) and m.dtype == torch.bool
    masks = {"mask": m} if boolean else {"bias": m}
    options: dict[str, Any] = {**masks, "k_lens": k_lens, "scale": 1.0}
    if not need_weights:
        return attention(q, k, v, **options).squeeze(1)
    context, weights = attention_with_weights(q, k, v, **options)
    return context.squeeze(1), weights.squeeze(1)
