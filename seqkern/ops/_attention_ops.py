"""The attention ops: schemas, kernels for each device, and shape functions.

The reference serves every device; PyTorch's own function serves the CPU where it means the same,
and Triton's kernels serve CUDA. `choose` decides, for the dispatch and for `seqkern.explain`.
"""

from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from seqkern.ops._attention_autograd import register
from seqkern.ops._attention_checks import (
    check_attention,
    check_attention_backward,
    check_lengths,
)
from seqkern.ops.choice import HAS_TRITON, Choice
from seqkern.reference import attention as reference
from seqkern.reference import packed

_ARGS = (
    "Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? bias, Tensor? q_lens, Tensor? k_lens,"
    " Tensor? alibi_slopes, Tensor? sinks, Tensor? seed, Tensor? cu_q, Tensor? cu_k, str? causal,"
    " int window_left, int window_right, float softcap, float dropout_p, float scale,"
    " SymInt max_q, SymInt max_k, bool deterministic"
)
_LIB = torch.library.Library("seqkern", "FRAGMENT")
_LIB.define(f"attention({_ARGS}) -> (Tensor o, Tensor lse)")
_LIB.define(
    f"attention_backward(Tensor do, Tensor? dlse, Tensor o, Tensor lse, {_ARGS},"
    " bool need_dq, bool need_dkv, bool need_dbias)"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dsinks)"
)

_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

# The largest head of 16 bits that the Triton kernels hold in a block's registers and shared memory;
# the backward of float32 holds half of that.
MAX_HEAD = 512


def refusal(t: Tensor) -> str | None:
    """Why no Triton kernel serves tensors of this device and dtype; None where they do."""
    if t.device.type != "cuda":
        return f"no kernel of seqkern runs on {t.device.type}"
    if not HAS_TRITON:
        return "Triton is not installed"
    if t.dtype == torch.float64:
        return "the kernels add up in float32, too coarse for float64"
    major, minor = _capability(t.get_device())
    if major < 8:
        return f"the kernels need compute capability 8.0, and this GPU has {major}.{minor}"
    return None


@cache
def _capability(device: int) -> tuple[int, int]:
    """Of a GPU, asked for once; of AMD's, and where `explain` asks for one that is not there, a
    sufficient one."""
    if torch.version.hip is not None or not torch.cuda.is_available():
        return 8, 0
    return torch.cuda.get_device_capability(device)


def choose(args: tuple, *, dlse: bool = False) -> Choice:
    """The kernel that computes an attention, forward or backward.

    Args:
        args: of seqkern::attention, in order; no value of a tensor is looked at.
        dlse: of a backward: whether the lse gives a gradient.

    Returns:
        "triton", "torch" (PyTorch's own kernel for the CPU) or "reference", and why.
    """
    q, v = args[0], args[2]
    if q.device.type == "cpu":
        return _choose_on_cpu(args, dlse)
    if reason := refusal(q):
        return Choice("reference", reason)
    if 0 in (q.size(-1), v.size(-1), args[1].size(1)):
        return Choice("reference", "there is nothing to compute")
    most = MAX_HEAD // 2 if q.dtype == torch.float32 else MAX_HEAD
    if max(q.size(-1), v.size(-1)) > most:
        return Choice("reference", f"a {q.dtype} head over {most} does not fit a block's memory")
    return Choice("triton", "seqkern's own kernels serve every feature on this device")


def _choose_on_cpu(args: tuple, dlse: bool) -> Choice:
    q, k, v, _, _, _, _, _, sinks, seed, *rule = args
    reasons = [
        (sinks is not None, "PyTorch's function has no sinks"),
        (rule[5] > 0, "PyTorch's function has no softcap"),
        (seed is not None, "PyTorch's function has no dropout by seed"),
        (dlse, "PyTorch's kernel takes no gradient of the lse"),
        (q.size(-1) != v.size(-1), "PyTorch's kernel wants one head size for q, k and v"),
        # It divides by these sizes, which ends the process where one is 0.
        (0 in (*q.shape, *k.shape, *rule[8:10]), "there is nothing to compute"),
    ]
    for holds, reason in reasons:
        if holds:
            return Choice("reference", reason)
    return Choice("torch", "PyTorch's own kernel means the same")


# ---- every device -------------------------------------------------------------------------


def _reference(*args):
    check_attention("attention", *args)
    return _laid_out(*reference.attention(*args), args[0])


def _reference_backward(*args):
    _check_backward(*args)
    return _laid_out_grads(*reference.attention_backward(*args), *args[4:7])


def _check_backward(do, dlse, o, lse, *args) -> None:
    op, rule = "attention_backward", args[:-3]
    check_attention(op, *rule)
    check_attention_backward(op, do, dlse, o, lse, args[0], args[2], args[10] is not None)


def _in_order_of(t: Tensor, result: Tensor) -> Tensor:
    """The result (B, H, T, D) in the memory order of t: (B, T, H, D) where t has that, as heads
    that were split off a projection have; so joining them again costs no copy."""
    if result.dim() == 4 and t.stride(1) < t.stride(2):
        return result.transpose(1, 2).contiguous().transpose(1, 2)
    return result.contiguous()


def _laid_out(o: Tensor, lse: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    return _in_order_of(q, o), lse.contiguous()


def _laid_out_grads(dq, dk, dv, dbias, dsinks, q, k, v):
    """Nothing may alias another result, as the placeholders of what is absent would."""
    ordered = (
        _in_order_of(t, g) if g.dim() > 1 else q.new_empty(0)
        for t, g in ((q, dq), (k, dk), (v, dv))
    )
    dbias = dbias.contiguous() if dbias.dim() > 1 else q.new_empty(0)
    return *ordered, dbias, dsinks


_LIB.impl("attention", _reference, "CompositeExplicitAutograd")
_LIB.impl("attention_backward", _reference_backward, "CompositeExplicitAutograd")


# ---- the CPU ------------------------------------------------------------------------------


def _cpu(*args):
    check_attention("attention", *args)
    check_lengths("attention", *args)
    forward = reference.attention if choose(args).kernel == "reference" else _torch
    return _laid_out(*forward(*args), args[0])


def _cpu_backward(do, dlse, o, lse, *rest):
    args = rest[:-3]
    _check_backward(do, dlse, o, lse, *rest)
    check_lengths("attention_backward", *args)
    choice = choose(args, dlse=dlse is not None)
    backward = reference.attention_backward if choice.kernel == "reference" else _torch_backward
    return _laid_out_grads(*backward(do, dlse, o, lse, *rest), *args[:3])


def _torch(*args):
    if args[10] is not None:
        return packed.forward(_torch, args)
    q, k, v, m, is_causal = _torch_arguments(args)
    o, lse = _FLASH(q, k, v, 0.0, is_causal, attn_mask=m, scale=args[17])
    if m is not None:
        lse = lse.masked_fill((m == -torch.inf).all(-1), -torch.inf)
    return o, lse


def _torch_backward(do, dlse, o, lse, *rest):
    args, needs = rest[:-3], rest[-3:]
    if args[10] is not None:
        return packed.backward(_torch_backward, (do, dlse, o, lse), args, needs)
    q, k, v, m, is_causal = _torch_arguments(args)
    do, o = (_unit_stride(t) for t in (reference.zero_beyond(do, args[5]), o))
    finite = lse.masked_fill(lse == -torch.inf, 0)
    grads = _FLASH_BACKWARD(do, q, k, v, o, finite, 0.0, is_causal, attn_mask=m, scale=args[17])
    none = q.new_empty(0)
    dq, dk, dv = (g if need else none for g, need in zip(grads, (needs[0], *[needs[1]] * 2)))
    dbias = none
    if needs[2] and args[4] is not None:
        given: tuple[Any, ...] = do, None, o, lse, *args, False, False, True
        dbias = reference.attention_backward(*given)[3]
    return dq, dk, dv, dbias, none


def _unit_stride(t: Tensor) -> Tensor:
    """PyTorch's kernel takes the last dimension to be contiguous, without a look."""
    return t if t.stride(-1) == 1 else t.contiguous()


def _torch_arguments(args) -> tuple[Tensor, Tensor, Tensor, Tensor | None, bool]:
    """q, k and v; what PyTorch's kernel takes in place of all else, an additive mask
    (B, H, Tq, Tk) of which each dimension may be 1; and whether it shall leave out the keys after
    each query's."""
    q, k, v, mask, bias, q_lens, k_lens, slopes, *_, causal, left, right, _, _, _, _, _, _ = args
    # A length says that what lies beyond is not read, and 0 * NaN would show that it was.
    q = _unit_stride(reference.zero_beyond(q, q_lens))
    k, v = (_unit_stride(reference.zero_beyond(t, k_lens)) for t in (k, v))
    bias = reference.with_alibi(q, k, bias, q_lens, k_lens, slopes, causal)
    aligned = causal == "top_left" or (causal is not None and q.size(2) == k.size(2))
    plain = all(t is None for t in (mask, bias, q_lens, k_lens)) and left < 0 and right < 0
    if plain and (aligned or causal is None):
        return q, k, v, None, aligned
    live = reference.live_elements(q, k, mask, q_lens, k_lens, causal, left, right)
    dtype = q.dtype if q.dtype == torch.float64 else torch.float32
    m = q.new_zeros((), dtype=dtype) if bias is None else bias.to(dtype)
    if live is not None:
        m = torch.where(live, m, -torch.inf)
    return q, k, v, m[(None,) * (4 - m.dim())].expand(-1, -1, -1, k.size(2)), False


_LIB.impl("attention", _cpu, "CPU")
_LIB.impl("attention_backward", _cpu_backward, "CPU")


# ---- CUDA ---------------------------------------------------------------------------------


def _cuda(*args):
    if choose(args).kernel == "reference":
        return _reference(*args)
    # By its name, and only here: importing seqkern must not need Triton.
    return import_module("seqkern.kernels.attention_forward").attention_forward(*args)


def _cuda_backward(do, dlse, o, lse, *rest):
    if choose(rest[:-3]).kernel == "reference":
        return _reference_backward(do, dlse, o, lse, *rest)
    backward = import_module("seqkern.kernels.attention_backward").attention_backward
    return backward(do, dlse, o, lse, *rest)


# Without Triton the reference stays, and `seqkern doctor` says so.
if HAS_TRITON:
    _LIB.impl("attention", _cuda, "CUDA")
    _LIB.impl("attention_backward", _cuda_backward, "CUDA")


# ---- shape functions ----------------------------------------------------------------------


@torch.library.register_fake("seqkern::attention", lib=_LIB)
def _attention_fake(*args):
    check_attention("attention", *args)
    q, v = args[0], args[2]
    rows = q.shape[:-1] if q.dim() == 4 else (q.size(1), q.size(0))
    dtype = q.dtype if q.dtype == torch.float64 else torch.float32
    return _in_order_of(q, q.new_empty(*q.shape[:-1], v.size(-1))), q.new_empty(rows, dtype=dtype)


@torch.library.register_fake("seqkern::attention_backward", lib=_LIB)
def _attention_backward_fake(do, dlse, o, lse, *rest):
    _check_backward(do, dlse, o, lse, *rest)
    q, k, v, _, bias, _, _, _, sinks, *_, need_dq, need_dkv, need_dbias = rest
    none = q.new_empty(0)
    return (
        _in_order_of(q, q.new_empty(q.shape)) if need_dq else none,
        _in_order_of(k, k.new_empty(k.shape)) if need_dkv else q.new_empty(0),
        _in_order_of(v, v.new_empty(v.shape)) if need_dkv else q.new_empty(0),
        q.new_empty(0) if bias is None or not need_dbias else bias.new_empty(bias.shape),
        q.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape),
    )


register(_LIB)
