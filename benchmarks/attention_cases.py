"""The attentions that are timed, and everyone who computes them."""

import functools
import itertools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import seqkern
from benchmarks.device import l2_bytes

OURS, EAGER = "seqkern", "eager"
# FlexAttention compiles anew for every shape, which takes more than all the timing: it enters
# where all others are, at one length and head dimension a kind.
FLEX_SIZES = {
    "plain": (4096, 128),
    "padded": (2048, 128),
    "bias": (1024, 64),
    "decode": (2048, 128),
}
BACKENDS = {
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
}


@dataclass(frozen=True)
class Case:
    """One attention.

    kind: "plain", "padded" (random lengths from T / 4 to T), "bias" (1, H, T, T) with a gradient,
        or "decode" (one query a row).
    backward: time forward and backward together, else the forward alone.
    """

    kind: str
    B: int
    H: int
    Hkv: int
    T: int
    D: int
    causal: bool = False
    backward: bool = False
    dtype: str = "bfloat16"

    def __str__(self) -> str:
        parts = [self.kind, "causal" if self.causal else "full", f"T{self.T}", f"D{self.D}"]
        parts += [f"B{self.B}", f"H{self.H}-{self.Hkv}", "fwd+bwd" if self.backward else "fwd"]
        return "-".join(parts)

    @property
    def queries(self) -> int:
        return 1 if self.kind == "decode" else self.T

    @property
    def lengths(self) -> list[int]:
        """Of the rows; the full length where they are not padded."""
        if self.kind != "padded":
            return [self.T] * self.B
        generator = torch.Generator().manual_seed(0)
        return torch.randint(self.T // 4, self.T + 1, (self.B,), generator=generator).tolist()

    @property
    def flop(self) -> float:
        """Of the two products forward and the five backward, without what masks exclude."""
        pairs = sum(n * min(n, self.queries) for n in self.lengths) * (0.5 if self.causal else 1)
        return 4 * self.H * self.D * pairs * (3.5 if self.backward else 1)

    @property
    def cache_bytes(self) -> int:
        """Of keys and values."""
        size = getattr(torch, self.dtype).itemsize
        return 2 * self.B * self.Hkv * self.T * self.D * size


def gpu_cases() -> list[Case]:
    """What an H200 is measured on; 16k tokens a call. Time may run out: heads of 128 come first,
    and of those the long sequences."""
    cases = [Case("decode", B, 32, 8, T, 128) for B, T in ((1, 4096), (8, 2048), (32, 2048))]
    cases += [Case("decode", 64, 32, 8, 8192, 128)]
    cases += plain_cases(128)
    cases += [Case("bias", 8192 // T, 12, 12, T, 64, False, True) for T in (512, 1024, 2048)]
    for T in (4096, 2048, 512):
        for backward in (False, True):
            cases.append(Case("padded", 16384 // T, 16, 4, T, 128, True, backward))
            cases.append(Case("padded", 16384 // T, 16, 16, T, 64, False, backward))
    return cases + plain_cases(64) + plain_cases(256)


def plain_cases(D: int) -> list[Case]:
    """From the longest sequence to the shortest."""
    H = 2048 // D
    lengths, both = (16384, 8192, 4096, 2048, 512), (False, True)
    kinds = itertools.product(lengths, both, both)
    return [
        Case("plain", 16384 // T, H, H, T, D, causal, backward) for T, causal, backward in kinds
    ]


def cpu_cases() -> list[Case]:
    """A dry run: small sizes of each kind, for everyone who runs on a CPU."""
    return [
        Case("plain", 1, 2, 2, 128, 32, True, True, "float32"),
        Case("padded", 2, 2, 2, 64, 32, False, False, "float32"),
        Case("bias", 1, 2, 2, 64, 32, False, True, "float32"),
        Case("decode", 2, 4, 2, 128, 32, dtype="float32"),
    ]


@dataclass
class Problem:
    """The inputs of a case, on a device.

    caches: of decoding, keys and values that `step` puts in the place of k and v in turn. Equal
        ones, too many for the L2 cache, which would else hold what a real step has to read.
    """

    case: Case
    q: Tensor
    k: Tensor
    v: Tensor
    do: Tensor
    bias: Tensor | None
    lens: Tensor | None
    mask: Tensor | None
    caches: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @property
    def inputs(self) -> list[Tensor]:
        return [t for t in (self.q, self.k, self.v, self.bias) if t is not None]


def make_problem(case: Case, device: str) -> Problem:
    """Normal inputs: zeros would flatter every kernel by a tenth, as chips draw less power."""
    torch.manual_seed(0)
    dtype = getattr(torch, case.dtype)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype, requires_grad=case.backward)

    q = draw(case.B, case.H, case.queries, case.D)
    k, v = (draw(case.B, case.Hkv, case.T, case.D) for _ in range(2))
    bias = draw(1, case.H, case.T, case.T) if case.kind == "bias" else None
    lens = mask = None
    if case.kind in ("padded", "decode"):
        lens = torch.tensor(case.lengths, dtype=torch.int32, device=device)
    if lens is not None and case.kind == "padded":
        mask = (torch.arange(case.T, device=device) < lens[:, None])[:, None, None, :]
        if case.causal:
            mask = mask & torch.ones(case.T, case.T, dtype=torch.bool, device=device).tril()
    p = Problem(case, q, k, v, torch.randn_like(q), bias, lens, mask)
    if case.kind == "decode":
        copies = math.ceil(2 * l2_bytes() / case.cache_bytes)
        p.caches = [(k, v), *((k.clone(), v.clone()) for _ in range(copies))]
    return p


def eager(p: Problem) -> Tensor:
    """The formula, one operation at a time."""
    group = p.case.H // p.case.Hkv
    k, v = (t.repeat_interleave(group, 1) if group > 1 else t for t in (p.k, p.v))
    s = p.q @ k.mT * p.case.D**-0.5
    if p.bias is not None:
        s = s + p.bias
    if p.mask is not None:
        s = s.masked_fill(~p.mask, -torch.inf)
    elif p.case.causal:
        later = torch.ones(p.case.T, p.case.T, dtype=torch.bool, device=s.device).triu(1)
        s = s.masked_fill(later, -torch.inf)
    return s.softmax(-1) @ v


def sdpa(p: Problem) -> Tensor:
    """PyTorch's function, with the dense mask that it needs."""
    mask = p.bias if p.bias is not None else p.mask
    return F.scaled_dot_product_attention(
        p.q, p.k, p.v, mask,
        is_causal=p.case.causal and mask is None, enable_gqa=p.case.Hkv != p.case.H,
    )  # fmt: skip


def ours(p: Problem) -> Tensor:
    """seqkern's function for the case."""
    if p.case.kind == "decode" and p.lens is not None:
        return seqkern.attention_decode(p.q, p.k, p.v, k_lens=p.lens)
    causal = "top_left" if p.case.causal else None
    return seqkern.attention(
        p.q, p.k, p.v, causal=causal, bias=p.bias, q_lens=p.lens, k_lens=p.lens
    )


def flex(p: Problem) -> Callable[[], Tensor]:
    """Compiled FlexAttention; the mask becomes a block mask once, outside of the timing."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    case, block, score = p.case, None, None
    if p.lens is not None or case.causal:
        lens = p.lens

        def live(b, h, i, j):
            keep = i >= j if case.causal else i >= 0
            return keep if lens is None else keep & (i < lens[b]) & (j < lens[b])

        B = None if lens is None else case.B
        block = create_block_mask(live, B, None, case.queries, case.T, device=str(p.q.device))
    if p.bias is not None:
        bias = p.bias

        def score(s, b, h, i, j):
            return s + bias[0, h, i, j]

    compiled = torch.compile(flex_attention, fullgraph=True)
    gqa = case.Hkv != case.H
    return lambda: compiled(p.q, p.k, p.v, score, block, enable_gqa=gqa)


def on_backend(name: str) -> AbstractContextManager:
    """In which PyTorch's function takes the kernel of a contestant, if that is one of them. It is
    not entered in every call: that takes as long as a short one."""
    return sdpa_kernel(BACKENDS[name]) if name in BACKENDS else nullcontext()


def forwards(p: Problem) -> dict[str, Callable[[], Tensor]]:
    """Everyone's forward, each to be called in its `on_backend`; some may refuse the case then."""
    calls = {OURS: lambda: ours(p), EAGER: lambda: eager(p)}
    if p.q.is_cuda:
        calls |= {name: lambda: sdpa(p) for name in BACKENDS}
        if FLEX_SIZES[p.case.kind] == (p.case.T, p.case.D):
            # Built by its first call: there an error is a peer's refusal.
            built = functools.cache(lambda: flex(p))
            calls["flex"] = lambda: built()()
    else:
        calls["sdpa"] = lambda: sdpa(p)
    return calls


def step(p: Problem, forward: Callable[[], Tensor]) -> Callable[[], Any]:
    """What is timed."""
    if p.caches:
        caches = itertools.cycle(p.caches)

        def decode() -> Tensor:
            p.k, p.v = next(caches)
            return forward()

        return decode
    if not p.case.backward:
        return forward
    return lambda: torch.autograd.grad(forward(), p.inputs, p.do)


def exact(p: Problem) -> Tensor:
    """The result in float32, one batch row and head at a time."""
    case = p.case
    rows = []
    with torch.no_grad():
        for b in range(case.B):
            for h in range(case.H):
                kv = h // (case.H // case.Hkv)
                s = p.q[b, h].float() @ p.k[b, kv].float().T / math.sqrt(case.D)
                if p.bias is not None:
                    s = s + p.bias[0, h].float()
                if p.mask is not None:
                    s = s.masked_fill(~p.mask[b, 0], -torch.inf)
                elif case.causal:
                    s = s.masked_fill(torch.ones_like(s, dtype=torch.bool).triu(1), -torch.inf)
                rows.append(s.softmax(-1) @ p.v[b, kv].float())
    return torch.stack(rows).view(case.B, case.H, case.queries, case.D)
