"""What torch.utils.flop_counter.FlopCounterMode counts for the ops.

Two operations for each multiply-add of the products, as it counts a matrix product. Rows and keys
beyond a sequence's length are left out where the lengths have values; fake tensors have none. As in
PyTorch's own formulas for attention, causality, windows and masks change nothing, and a backward
computes the scores again.
"""

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode

from seqkern.ops._decoder_autograd import GRADS, SAVED
from seqkern.reference.decoder import Arguments

_COUNTER = "torch.utils.flop_counter"


# ---- recurrent layers ---------------------------------------------------------------------


def _recurrent(x: Tensor, batch_sizes, h0, c0, weights: list[Tensor], *_, **__) -> int:
    """Every row of every step meets each matrix once."""
    return 2 * x.shape[:-1].numel() * sum(w.numel() for w in weights if w.dim() == 2)


def _recurrent_backward(dy, dh_n, dc_n, *args, **_) -> int:
    x, _, h0, _, weights, _, _, _, _, need_dx, need_dw = args
    every = sum(w.numel() for w in weights if w.dim() == 2)
    inputs = sum(w.numel() for w in weights[:: len(weights) // h0.size(0)])
    return 2 * x.shape[:-1].numel() * (every - inputs + need_dx * inputs + need_dw * every)


# ---- attention ----------------------------------------------------------------------------


def _lengths(lens: Tensor | None, rows: int, full: int) -> Sequence[int]:
    if lens is None or lens.is_meta or detect_fake_mode(lens) is not None:
        return [full] * rows
    return lens.clamp(0, full).tolist()


def _pairs(args: tuple) -> int:
    """Pairs of a query of any head and a key, of the arguments of seqkern::attention."""
    q, q_lens, k_lens, cu_q, cu_k, max_q, max_k = (args[i] for i in (0, 5, 6, 10, 11, 18, 19))
    if cu_q is not None:
        q_lens, k_lens = cu_q.diff(), cu_k.diff()
    rows = q.size(0) if q_lens is None else q_lens.size(0)
    lens = zip(_lengths(q_lens, rows, max_q), _lengths(k_lens, rows, max_k), strict=True)
    return q.size(1) * sum(q_len * k_len for q_len, k_len in lens)


def _attention(*args, **_) -> int:
    return 2 * _pairs(args) * (args[0].size(-1) + args[2].size(-1))


def _attention_backward(do, dlse, o, lse, *args, **_) -> int:
    """Scores and the gradients of the weights, and what is asked for."""
    *args, need_dq, need_dkv, _ = args
    D, Dv = args[0].size(-1), args[2].size(-1)
    return 2 * _pairs(tuple(args)) * (D + Dv + need_dq * D + need_dkv * (D + Dv))


def _attention_decode(q, k_cache, v_cache, k_lens, block_table, *_, **__) -> int:
    places = k_cache.size(2) * (1 if block_table is None else block_table.size(1))
    pairs = q.size(1) * q.size(2) * sum(_lengths(k_lens, q.size(0), places))
    return 2 * pairs * (q.size(3) + v_cache.size(3))


# ---- additive attention and its decoder ---------------------------------------------------


def _scores(queries: int, key: Tensor, value: Tensor, k_lens: Tensor | None) -> int:
    """The scores and the weighted sums of so many queries of each source."""
    keys = sum(_lengths(k_lens, key.size(0), key.size(1)))
    return 2 * queries * keys * (key.size(2) + value.size(2))


def _additive_attention(query, key, value, v, mask, bias, k_lens, *_, **__) -> int:
    return _scores(query.size(1), key, value, k_lens)


def _additive_attention_backward(do, dweights, dlse, o, lse, *args, **_) -> int:
    """The scores and the gradients of the weights, and what is asked for. Those of query and key
    are one product, with v, which is added up in two ways."""
    query, key, value, _, _, _, k_lens, _, need_dq, need_dk, need_dvalue, need_dv, _ = args
    Tq, keys = query.size(1), sum(_lengths(k_lens, key.size(0), key.size(1)))
    asked = ((need_dq or need_dk) + need_dv) * key.size(2) + need_dvalue * value.size(2)
    return _scores(Tq, key, value, k_lens) + 2 * Tq * keys * asked


def _attention_decoder(*args, **_) -> int:
    """Every row of every step meets each matrix once, and attends."""
    a = Arguments(*args)
    N, T, _ = a.gates_x.shape
    products = 2 * N * T * sum(w.numel() for w in (a.w_q, a.w_c, a.w_hh))
    return products + _attending(a)


def _attending(a: Arguments) -> int:
    N, T, _ = a.gates_x.shape
    return _scores(N * T // max(a.key.size(0), 1), a.key, a.value, a.k_lens)


def _attention_decoder_backward(*args, **_) -> int:
    """Two products for each of the attention's. The gradients of W_q, W_c and W_hh are products of
    PyTorch's, after the op."""
    a = Arguments(*args[GRADS + SAVED :])
    return _attention_decoder(*a) + _attending(a)


# ---- registration -------------------------------------------------------------------------

FORMULAS: dict[str, Callable[..., int]] = {
    "recurrent": _recurrent,
    "recurrent_inference": _recurrent,
    "recurrent_backward": _recurrent_backward,
    "attention": _attention,
    "attention_backward": _attention_backward,
    "attention_decode": _attention_decode,
    "additive_attention": _additive_attention,
    "additive_attention_backward": _additive_attention_backward,
    "attention_decoder": _attention_decoder,
    "attention_decoder_inference": _attention_decoder,
    "attention_decoder_backward": _attention_decoder_backward,
}


def _register(counter: ModuleType) -> None:
    for name, formula in FORMULAS.items():
        op = getattr(torch.ops.seqkern, name)
        counter.register_flop_formula(op, get_raw=True)(formula)


class _Registrar(MetaPathFinder):
    """Registers the formulas when somebody imports the counter, which brings Triton with it and
    takes longer to import than seqkern."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path) if fullname == _COUNTER else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register(module)

        spec.loader.exec_module = execute_and_register
        return spec


def install() -> None:
    """Makes the counter know the ops, whether it is imported before seqkern or after it."""
    if counter := sys.modules.get(_COUNTER):
        _register(counter)
    else:
        sys.meta_path.insert(0, _Registrar())
