"""Transformer layers and stacks: ``torch.nn``'s parameters and interface on seqkern's attention."""

from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active
from torch._guards import detect_fake_mode
from torch.overrides import has_torch_function

from seqkern.nn.attention import MultiheadAttention, check_mask_dtype
from seqkern.ops._checks import autocast_dtype
from seqkern.ops._derivatives import takes_graph

aten = torch.ops.aten
# Where torch.nn has a fast path. No accelerator besides these is known to this package.
_FAST_DEVICES = ("cpu", "cuda", "xpu")


class TransformerEncoderLayer(torch.nn.TransformerEncoderLayer):
    """Self-attention and a feed-forward net, in place of ``torch.nn.TransformerEncoderLayer``.

    With SA the attention, FF(x) = W_2 f(W_1 x + b_1) + b_2, and dropout after each of them and
    after f (Vaswani et al., Attention Is All You Need, 2017, section 3; ``norm_first``: Xiong et
    al., 2020, arXiv:2002.04745)::

        x = norm1(x + SA(x)),   y = norm2(x + FF(x))        or, with norm_first,
        x = x + SA(norm1(x)),   y = x + FF(norm2(x))

    Args:
        d_model: E, features of input and output.
        nhead: heads of the attention, a divisor of E.
        dim_feedforward: features between W_1 and W_2. Default 2048.
        dropout: probability, of the attention's weights too. Default 0.1.
        activation: f: "relu" (default), "gelu" or a function of one tensor.
        layer_norm_eps: of the norms. Default 1e-5.
        batch_first: batched input and output are (B, T, E) in place of (T, B, E). Default False.
        norm_first: norms before the parts in place of after the sums. Default False.
        bias: whether linear maps and norms have biases. Default True.
        device, dtype: of the parameters.

    It is a subclass of ``torch.nn.TransformerEncoderLayer``, whose constructor, ``state_dict``,
    ``repr``, ``_sa_block`` and ``_ff_block`` it inherits, so that whatever asks by ``isinstance``
    (``torch.nn.TransformerEncoder`` for its nested tensors, FSDP's wrapping policies) knows it,
    and either package's stack takes either package's layer.

    Other than ``torch.nn.TransformerEncoderLayer``: it computes in the same way in every mode,
    where torch.nn has a path of its own in eval mode without gradient; it calls its submodules,
    so their hooks run and they may be quantised; ``self_attn`` is `MultiheadAttention`, which
    says what else differs.
    """

    @wraps(torch.nn.TransformerEncoderLayer.__init__)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # It differs in what it computes with, and in nothing that its constructor does.
        self.self_attn.__class__ = MultiheadAttention

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Run the layer.

        Args:
            src: (T, B, E), (B, T, E) if ``batch_first``, (T, E) without batch, or nested
                (B, j, E).
            src_mask: (T, T) or (B*nhead, T, T): True excludes, or floating, added.
            src_key_padding_mask: (B, T) or (T,): True excludes, or floating, added.
            is_causal: a promise that ``src_mask`` excludes exactly what comes after each query.

        Returns:
            Like ``src``.

        Raises:
            AssertionError, RuntimeError: as `MultiheadAttention` does.
        """
        masks = src_mask, src_key_padding_mask
        if self.norm_first:
            x = src + self._sa_block(self.norm1(src), *masks, is_causal=is_causal)
            return x + self._ff_block(self.norm2(x))
        x = self.norm1(src + self._sa_block(src, *masks, is_causal=is_causal))
        return self.norm2(x + self._ff_block(x))


class TransformerDecoderLayer(torch.nn.TransformerDecoderLayer):
    """Self-attention, attention to a memory and a feed-forward net, in place of
    ``torch.nn.TransformerDecoderLayer``.

    With SA and MA the attention to itself and to the memory m, FF as in
    `TransformerEncoderLayer`, and dropout after each of them (Vaswani et al., 2017,
    section 3)::

        x = norm1(x + SA(x)),   x = norm2(x + MA(x, m)),   y = norm3(x + FF(x))      or, with
        x = x + SA(norm1(x)),   x = x + MA(norm2(x), m),   y = x + FF(norm3(x))    norm_first

    Args: those of `TransformerEncoderLayer`.

    A subclass of ``torch.nn.TransformerDecoderLayer``, all of whose code it inherits:
    ``self_attn`` and ``multihead_attn`` are `MultiheadAttention`, which says what differs.
    """

    @wraps(torch.nn.TransformerDecoderLayer.__init__)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.self_attn.__class__ = MultiheadAttention
        self.multihead_attn.__class__ = MultiheadAttention


class TransformerEncoder(torch.nn.TransformerEncoder):
    """A stack of encoder layers, in place of ``torch.nn.TransformerEncoder``.

    Args:
        encoder_layer: the layer of which each of the stack is a copy; this package's,
            ``torch.nn``'s or another module that is called like them.
        num_layers: how many.
        norm: applied at the end. Default None.
        enable_nested_tensor: in eval mode without gradient, where only padding is masked and the
            layer is one that torch.nn's fast path takes, run the layers without the padding, and
            put zeros there (before ``norm``). Default True.
        mask_check: do so only if all padding is on the right, which is looked up at each call;
            where values are not to be had (see below), not at all. Default True.

    A subclass of ``torch.nn.TransformerEncoder``, whose constructor it inherits. Padded positions
    come out as there. Other than there:

    - Boolean masks are handed on as they are to layers of this package; to others as torch.nn
      does, floating.
    - If ``is_causal`` is None the mask is compared with the causal one as torch.nn does, but not
      where values are not to be had: under ``torch.compile``, ``torch.export``, ``torch.func``,
      ``torch.jit.trace`` and while a CUDA graph is captured. Nor if the mask takes a gradient,
      which it would lose.
    - A floating ``src_key_padding_mask`` with other values than 0 and -inf is added on every
      path; torch.nn takes it for excluding on its fast path.
    """

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """Run all layers and the norm.

        Args:
            src: (T, B, E), (B, T, E) if the layers are ``batch_first``, (T, E) without batch, or
                nested (B, j, E).
            mask: (T, T) or (B*nhead, T, T): True excludes, or floating, added.
            src_key_padding_mask: (B, T) or (T,): True excludes, or floating, added.
            is_causal: a promise that ``mask`` is causal (True) or no promise (False); None: see
                for yourself.

        Returns:
            Like ``src``.

        Raises:
            AssertionError, RuntimeError: as `MultiheadAttention` does.
        """
        check_mask_dtype("mask", mask)
        check_mask_dtype("src_key_padding_mask", src_key_padding_mask)
        if not all(isinstance(layer, TransformerEncoderLayer) for layer in self.layers):
            mask = _additive(mask, src)
            src_key_padding_mask = _additive(src_key_padding_mask, src)
        is_causal = _is_causal(mask, is_causal)
        output, padding = src, src_key_padding_mask
        left_out = None
        if padding is not None and mask is None and self._leaves_out(padding, src):
            left_out = padding.bool()
            # What is traced keeps its shape: there the padding is computed and overwritten. So it
            # is if there is nothing else, which makes a nested tensor that PyTorch cannot pad.
            if _readable(padding) and not left_out.all():
                output, padding = aten._nested_tensor_from_mask(src, ~left_out, False), None
        for layer in self.layers:
            output = layer(output, src_mask=mask, is_causal=is_causal, src_key_padding_mask=padding)
        if output.is_nested and not src.is_nested:
            output = output.to_padded_tensor(0.0, src.size())
        elif left_out is not None:
            output = output.masked_fill(left_out.unsqueeze(-1), 0.0)
        return output if self.norm is None else self.norm(output)

    def _leaves_out(self, padding: Tensor, src: Tensor) -> bool:
        """Whether torch.nn would run the layers without the padding: its conditions."""
        first: Any = self.layers[0]
        if not getattr(self, "use_nested_tensor", False) or first.training:
            return False
        if src.dim() != 3 or src.is_nested or src.device.type not in _FAST_DEVICES:
            return False
        if not torch.backends.mha.get_fastpath_enabled() or autocast_dtype(src) is not None:
            return False
        tensors = src, *first.parameters()
        if has_torch_function(tensors):
            return False
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            return False
        return _only_excludes(padding) and (
            not getattr(self, "mask_check", True) or _on_the_right(src, padding)
        )


class TransformerDecoder(torch.nn.TransformerDecoder):
    """A stack of decoder layers, in place of ``torch.nn.TransformerDecoder``.

    Args:
        decoder_layer: the layer of which each of the stack is a copy; this package's,
            ``torch.nn``'s or another module that is called like them.
        num_layers: how many.
        norm: applied at the end. Default None.

    A subclass of ``torch.nn.TransformerDecoder``, whose constructor it inherits. If
    ``tgt_is_causal`` is None it looks for itself where `TransformerEncoder` does.
    """

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """Run all layers and the norm.

        Args:
            tgt: (T, B, E), (B, T, E) if the layers are ``batch_first``, or (T, E) without batch.
            memory: alike, of S steps.
            tgt_mask, memory_mask: (T, T) and (T, S), or with B*nhead in front: True excludes, or
                floating, added.
            tgt_key_padding_mask, memory_key_padding_mask: (B, T) and (B, S), or (T,) and (S,).
            tgt_is_causal, memory_is_causal: a promise that the mask is causal; None: see for
                yourself.

        Returns:
            Like ``tgt``.

        Raises:
            AssertionError, RuntimeError: as `MultiheadAttention` does.
        """
        arguments = {
            "tgt_mask": tgt_mask,
            "memory_mask": memory_mask,
            "tgt_key_padding_mask": tgt_key_padding_mask,
            "memory_key_padding_mask": memory_key_padding_mask,
            "tgt_is_causal": _is_causal(tgt_mask, tgt_is_causal),
            "memory_is_causal": memory_is_causal,
        }
        output = tgt
        for layer in self.layers:
            output = layer(output, memory, **arguments)
        return output if self.norm is None else self.norm(output)


class Transformer(torch.nn.Transformer):
    """Encoder and decoder, in place of ``torch.nn.Transformer``.

    Args:
        d_model, nhead: E and the heads of all layers. Default 512, 8.
        num_encoder_layers, num_decoder_layers: Default 6, 6.
        dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias: of
            the layers, see `TransformerEncoderLayer`.
        custom_encoder, custom_decoder: taken in place of those built here. Default None.
        device, dtype: of the parameters.

    A subclass of ``torch.nn.Transformer``, all of whose code it inherits; encoder, decoder and
    their layers are this package's.
    """

    @wraps(torch.nn.Transformer.__init__)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        given = [*args, *kwargs.values()]
        for part in (self.encoder, self.decoder):
            if not any(part is argument for argument in given):
                _take_over(part)


REPLACEMENTS: dict[type, type] = {
    torch.nn.MultiheadAttention: MultiheadAttention,
    torch.nn.TransformerEncoderLayer: TransformerEncoderLayer,
    torch.nn.TransformerDecoderLayer: TransformerDecoderLayer,
    torch.nn.TransformerEncoder: TransformerEncoder,
    torch.nn.TransformerDecoder: TransformerDecoder,
    torch.nn.Transformer: Transformer,
}


def _take_over(stack: torch.nn.Module) -> None:
    """Change the classes of what torch.nn's constructor built; no attribute differs."""
    for module in stack.modules():
        module.__class__ = REPLACEMENTS.get(type(module), type(module))


def _additive(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """A boolean mask as the floating one that torch.nn's stack hands to its layers."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask, -torch.inf)


def _is_causal(mask: Tensor | None, promised: bool | None) -> bool:
    """Whether the mask is known to exclude exactly the keys after each query."""
    if promised is not None or mask is None:
        return promised is True
    if mask.dim() != 2 or mask.size(0) != mask.size(1) or mask.requires_grad:
        return False
    if not _readable(mask):
        return False
    later = torch.ones_like(mask, dtype=torch.bool).triu(1)
    if mask.dtype != torch.bool:
        later = torch.zeros_like(mask).masked_fill_(later, -torch.inf)
    return torch.equal(mask, later)


def _readable(mask: Tensor) -> bool:
    """Whether the values of the mask may decide what is computed."""
    if takes_graph() or _are_functorch_transforms_active():
        return False
    # As under `explain`, which follows shapes alone.
    if detect_fake_mode(mask) is not None:
        return False
    return not (mask.is_cuda and torch.cuda.is_current_stream_capturing())


def _only_excludes(padding: Tensor) -> bool:
    """Whether the mask is boolean, or floating and known to hold 0 and -inf alone."""
    if padding.dtype == torch.bool:
        return True
    return _readable(padding) and bool(((padding == 0) | padding.isneginf()).all())


def _on_the_right(src: Tensor, padding: Tensor) -> bool:
    """Whether it is known that no real position comes after padding."""
    if not _readable(padding):
        return False
    return aten._nested_tensor_from_mask_left_aligned(src, padding.logical_not())
