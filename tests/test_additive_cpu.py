"""The C++ kernels of additive attention: promises on bits, the range of each form, awkward sizes,
errors against float64, and what the binding refuses; tests/test_fuzz.py has the raw calls."""

from typing import Any

import pytest
import torch
from torch import Tensor

from seqkern.ops.choice import has_native_kernel
from seqkern.reference import additive as reference
from seqkern.testing.tolerance import assert_within_budget, neighbours

OPS = torch.ops.seqkern
NAMES = "o", "weights", "lse", "dquery", "dkey", "dvalue", "dv", "dbias"

pytestmark = pytest.mark.skipif(
    not has_native_kernel("additive_attention", "cpu"),
    reason="promises of the C++ kernels, which were not built",
)
every_capability = pytest.mark.parametrize(
    "capability", ["avx512", "avx2", "portable"], indirect=True
)


def draw(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(*shape, dtype=torch.float64)).to(dtype)


def inputs_of(B: int, Tq: int, Tk: int, D: int, Dv: int, dtype=torch.float32) -> list[Tensor]:
    v = draw(D, dtype=dtype, scale=D**-0.5)
    return [
        draw(B, Tq, D, dtype=dtype),
        draw(B, Tk, D, dtype=dtype),
        draw(B, Tk, Dv, dtype=dtype),
        v,
    ]


def run(kernel, inputs, mask=None, bias=None, k_lens=None, scale=1.0, grads=None, **needs: bool):
    """All results and gradients of the raw ops or of the reference, by name.

    grads: of o, weights and lse; ones of them that vary, by default.
    """
    args = *inputs, mask, bias, k_lens, scale
    o, weights, lse = kernel.additive_attention(*args, True)
    if grads is None:
        generator = torch.Generator().manual_seed(3)
        grads = [
            torch.rand(t.shape, generator=generator, dtype=torch.float64).to(t.dtype)
            for t in (o, weights, lse)
        ]
    wanted = [needs.get(name, True) for name in NAMES[3:]]
    derived = kernel.additive_attention_backward(*grads, o, lse, *args, *wanted)
    return dict(zip(NAMES, (o, weights, lse, *derived), strict=True))


def assert_same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, t in expected.items():
        assert torch.equal(actual[name], t), name


def assert_near_exact(inputs, names=NAMES, **options: Any) -> None:
    """Checks the results of those names against float64 within the project's budget."""
    dtype = inputs[0].dtype
    bias, mask = options.pop("bias", None), options.pop("mask", None)
    k_lens = options.pop("k_lens", None)
    given = [*inputs, bias] if bias is not None else list(inputs)
    o, weights, lse = OPS.additive_attention(*inputs, mask, bias, k_lens, 1.0, True)
    grads = [draw(*t.shape, dtype=t.dtype) for t in (o, weights, lse)]

    def computed(kernel, dtype: torch.dtype, tensors) -> dict[str, Tensor]:
        tensors = [t.to(dtype) for t in tensors]
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        moved = [g.to(d) for g, d in zip(grads, (dtype, dtype, exact), strict=True)]
        added = tensors[4] if bias is not None else None
        results = run(kernel, tensors[:4], mask, added, k_lens, grads=moved)
        # -inf where nothing was left, on both sides.
        results["lse"] = results["lse"].masked_fill(results["lse"] == -torch.inf, 0).to(dtype)
        return {
            n: t for n, t in results.items() if n in names and (n != "dbias" or bias is not None)
        }

    other = torch.float32 if dtype == torch.float64 else dtype
    runs = [computed(reference, other, m) for m in neighbours([t.to(other) for t in given])]
    exact = computed(reference, torch.float64, given)
    assert_within_budget(computed(OPS, dtype, given), exact, runs, dtype)


# ---- bits ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "sizes", [(5, 7, 9, 17, 5), (5, 1, 33, 70, 20), (3, 140, 5, 3, 1)], ids=str
)
@every_capability
@pytest.mark.usefixtures("capability")
def test_bits_depend_neither_on_threads_nor_on_the_batch(sizes, dtype) -> None:
    torch.manual_seed(0)
    B, Tq, Tk = sizes[:3]
    inputs = inputs_of(*sizes, dtype)
    bias, mask = draw(1, Tq, Tk), torch.rand(B, Tq, Tk) > 0.2
    k_lens = torch.tensor([Tk, 0, Tk - 1, 3, 1][:B], dtype=torch.int32)
    runs = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            runs.append(run(OPS, inputs, mask, bias, k_lens))
        finally:
            torch.set_num_threads(1)
    for other in runs[1:]:
        assert_same_bits(other, runs[0])

    v, whole = inputs[3], runs[0]
    generator = torch.Generator().manual_seed(3)
    grads = [
        torch.rand(t.shape, generator=generator, dtype=torch.float64).to(t.dtype)
        for t in (whole["o"], whole["weights"], whole["lse"])
    ]
    for b in range(B):
        row = slice(b, b + 1)
        one = run(
            OPS,
            [*(t[row] for t in inputs[:3]), v],
            mask[row],
            bias,
            k_lens[row],
            grads=[g[row] for g in grads],
        )
        for name in ("o", "weights", "lse", "dquery", "dkey", "dvalue"):
            assert torch.equal(one[name][0], whole[name][b]), (name, b)


@pytest.mark.parametrize("Tq", [1, 6])
@every_capability
@pytest.mark.usefixtures("capability")
def test_a_gradient_has_the_same_bits_alone(Tq: int) -> None:
    torch.manual_seed(0)
    inputs, bias = inputs_of(2, Tq, 7, 37, 6), draw(2, 1, 7)
    whole = run(OPS, inputs, bias=bias)
    for name in NAMES[3:]:
        others = {other: False for other in NAMES[3:] if other != name}
        alone = run(OPS, inputs, bias=bias, **others)
        assert torch.equal(alone[name], whole[name]), name
        assert all(alone[other].shape == (0,) for other in others)


# ---- values -------------------------------------------------------------------------------


@pytest.mark.parametrize("D", [1, 3, 15, 16, 17, 64, 511, 1024])
@pytest.mark.parametrize("Dv", [1, 15, 33])
@every_capability
@pytest.mark.usefixtures("capability")
def test_sizes_around_the_vectors(D: int, Dv: int) -> None:
    torch.manual_seed(D + Dv)
    for Tq in (1, 3):
        assert_near_exact(inputs_of(2, Tq, 5, D, Dv))


@pytest.mark.parametrize("Tk", [0, 1, 2, 5, 33, 70])
@pytest.mark.parametrize("Tq", [0, 1, 2, 5, 33, 130])
@every_capability
@pytest.mark.usefixtures("capability")
def test_sizes_around_the_tiles(Tq: int, Tk: int) -> None:
    torch.manual_seed(Tq + Tk)
    lens = torch.tensor([Tk, Tk - 1, 2**31 - 1, -5], dtype=torch.int32)
    assert_near_exact(inputs_of(4, Tq, Tk, 19, 17), k_lens=lens)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("Tq", [1, 2, 9])
@every_capability
@pytest.mark.usefixtures("capability")
def test_dtypes(Tq: int, dtype: torch.dtype) -> None:
    torch.manual_seed(Tq)
    assert_near_exact(inputs_of(3, Tq, 11, 21, 18, dtype), bias=draw(3, Tq, 1, dtype=dtype))
    assert_near_exact(inputs_of(1, Tq, 40, 130, 70, dtype), mask=torch.rand(1, Tq, 40) > 0.3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "size", [1e-30, 1e-4, 0.01, 0.2, 0.24, 0.3, 2.0, 5.2, 5.3, 19.9, 50.0, 1e4]
)
@pytest.mark.parametrize("Tq", [1, 5])
@every_capability
@pytest.mark.usefixtures("capability")
def test_arguments_of_every_size(size: float, Tq: int, dtype: torch.dtype) -> None:
    """Up to each change of form and beyond it: queries and keys are uniform in [-size, size]."""
    torch.manual_seed(7)
    inputs = inputs_of(6, Tq, 9, 40, 8, dtype)
    for i in (0, 1):
        inputs[i] = ((torch.rand(inputs[i].shape, dtype=torch.float64) * 2 - 1) * size).to(dtype)
    # Beyond 19 the oracle's own 1 - tanh^2 is rounding alone in float64.
    cancelled = dtype == torch.float64 and size > 19
    assert_near_exact(inputs, NAMES[:3] if cancelled else NAMES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1e-4, 1e-3, 0.01, 0.1, 1.0])
@pytest.mark.parametrize("Tq", [1, 5])
@every_capability
@pytest.mark.usefixtures("capability")
def test_arguments_of_every_size_under_a_large_v(size: float, Tq: int, dtype: torch.dtype) -> None:
    """A large v makes scores of what small arguments leave of their tanhs; and makes scores so
    large that gradients see whether the weights add up to 1."""
    for v in (1, 30, 1e3):
        torch.manual_seed(0)
        query, key = (
            draw(2, Tq, 70, dtype=dtype, scale=size),
            draw(2, 9, 70, dtype=dtype, scale=size),
        )
        value, v = draw(2, 9, 8, dtype=dtype), draw(70, dtype=dtype, scale=v)
        assert_near_exact([query, key, value, v])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@every_capability
@pytest.mark.usefixtures("capability")
def test_saturated_units_of_one_query_take_no_gradient(dtype: torch.dtype) -> None:
    torch.manual_seed(6)
    inputs = inputs_of(2, 1, 9, 40, 8, dtype)
    limit = 9.1 if dtype == torch.float32 else 20
    far = (limit + 10 * torch.rand(2, 9, 20)) * (torch.rand(2, 9, 20) - 0.5).sign()
    inputs[1][..., :20] = far.to(dtype) - inputs[0][..., :20]
    results = run(OPS, inputs)
    assert not results["dquery"][..., :20].any()
    assert not results["dkey"][..., :20].any()
    assert results["dkey"][..., 20:].all()


@pytest.mark.parametrize("Tq", [1, 6])
@every_capability
@pytest.mark.usefixtures("capability")
def test_tokens_of_different_sizes_side_by_side(Tq: int) -> None:
    """Every form in one tile, and infinities of both signs."""
    torch.manual_seed(8)
    sizes = torch.tensor([1e-3, 0.1, 1.0, 5.0, 12.0, 19.9, 20.1, 45.0, 1e4, 3e38])
    inputs = inputs_of(1, Tq, 20, 33, 4)
    inputs[0] = (torch.rand(1, Tq, 33) * 2 - 1) * sizes[torch.randint(9, (Tq,))][:, None]
    inputs[1] = (torch.rand(1, 20, 33) * 2 - 1) * sizes.repeat(2)[:, None]
    assert_near_exact(inputs)
    inputs[1][0, 3], inputs[1][0, 7, 5] = torch.inf, -torch.inf
    assert_near_exact(inputs)


@pytest.mark.parametrize("size", [1e-20, 1e3, 1e12, 1e30])
@pytest.mark.parametrize("Tq", [1, 5])
@every_capability
@pytest.mark.usefixtures("capability")
def test_large_and_small_v(size: float, Tq: int) -> None:
    torch.manual_seed(9)
    inputs = inputs_of(2, Tq, 6, 70, 8)
    inputs[3] = inputs[3] * size
    args = *inputs, None, None, None, 1 / max(size, 1.0)
    exact = reference.additive_attention(*(t.double() for t in inputs), *args[4:], True)
    plain, ours = reference.additive_attention(*args, True), OPS.additive_attention(*args, True)
    names = NAMES[:3]
    assert_within_budget(
        *(dict(zip(names, r, strict=True)) for r in (ours, exact)),
        [dict(zip(names, plain, strict=True))],
        torch.float32,
    )


@pytest.mark.parametrize("Tq", [1, 5])
@every_capability
@pytest.mark.usefixtures("capability")
def test_error_of_one_tanh(Tq: int) -> None:
    """What docs/ops/additive.md says of it, on scores that take one element of 64."""
    v = torch.zeros(64)
    v[5] = 1
    for size in (1e-6, 0.01, 0.25, 0.3, 1.0, 3.0, 9.0, 20.0):
        query, key = (2 * size * torch.rand(2000, T, 64) - size for T in (Tq, 1))
        _, _, lse = OPS.additive_attention(query, key, key, v, None, None, None, 1.0, False)
        exact = (query.double() + key)[..., 5].tanh()
        assert (lse - exact).abs().max() < 4e-7, size
        if size <= 0.25:
            assert ((lse - exact) / exact).abs().max() < 4e-7, size


# ---- what must not be read, and NaN -------------------------------------------------------


@pytest.mark.parametrize("Tq", [1, 6, 9])
@every_capability
@pytest.mark.usefixtures("capability")
def test_a_nan_stays_where_it_is(Tq: int) -> None:
    torch.manual_seed(1)
    clean = inputs_of(2, Tq, 9, 20, 7)
    whole = run(OPS, clean)
    spoilt = [t.clone() for t in clean]
    spoilt[0][1, Tq // 2, 3] = torch.nan
    dirty = run(OPS, spoilt)
    for name in ("o", "weights", "lse", "dquery"):
        assert dirty[name][1, Tq // 2].isnan().all(), name
        others = torch.ones(2, Tq, dtype=torch.bool)
        others[1, Tq // 2] = False
        # Queries share tiles, so the others may round differently but not otherwise.
        torch.testing.assert_close(dirty[name][others], whole[name][others], rtol=1e-5, atol=1e-6)
    for name in ("dkey", "dvalue"):
        assert torch.equal(dirty[name][0], whole[name][0]), name


@pytest.mark.parametrize("Tq", [1, 6])
@pytest.mark.parametrize("what", [torch.nan, torch.inf])
@every_capability
@pytest.mark.usefixtures("capability")
def test_what_is_left_out_is_not_seen(Tq: int, what: float) -> None:
    """By length, by a mask, by -inf; keys, values, and the gradients of rows without anything."""
    torch.manual_seed(2)
    inputs = inputs_of(3, Tq, 8, 20, 7)
    k_lens = torch.tensor([8, 5, 0], dtype=torch.int32)
    mask = torch.rand(3, Tq, 8) > 0.3
    mask[:, :, 2] = False
    bias = draw(3, 1, 8)
    bias[0, 0, 4] = -torch.inf
    grads = [draw(3, Tq, 7), draw(3, Tq, 8), draw(3, Tq)]
    clean = run(OPS, inputs, mask, bias, k_lens, grads=grads)
    for t in inputs[1:3]:
        t[1, 5:], t[2], t[:, 2], t[0, 4] = what, what, what, what
    for g in grads:
        g[2] = what
    dirty = run(OPS, inputs, mask, bias, k_lens, grads=grads)
    for name in NAMES:
        torch.testing.assert_close(dirty[name], clean[name], rtol=1e-5, atol=1e-6)
    assert not clean["o"][2].any()
    assert not clean["dquery"][2].any()
    assert (clean["lse"][2] == -torch.inf).all()


@every_capability
@pytest.mark.usefixtures("capability")
def test_a_masked_value_is_not_seen_by_one_query_and_is_by_another() -> None:
    inputs = inputs_of(1, 4, 6, 5, 3)
    inputs[2][0, 2, 1] = torch.nan
    mask = torch.ones(1, 4, 6, dtype=torch.bool)
    mask[0, :2, 2] = False
    o, _, _ = OPS.additive_attention(*inputs, mask, None, None, 1.0, False)
    assert o[0, :2].isfinite().all()
    assert o[0, 2:, 1].isnan().all()
    assert o[0, 2:, 0].isfinite().all()


@every_capability
@pytest.mark.usefixtures("capability")
def test_strides_of_every_kind() -> None:
    torch.manual_seed(4)
    query, key = draw(6, 3, 20).transpose(0, 1), draw(3, 20, 9).transpose(1, 2)
    value, v = draw(3, 9, 14)[..., ::2], draw(40)[::2]
    mask = (torch.rand(9) > 0.2).expand(3, 6, 9)
    bias = draw(3, 6, 1).expand(3, 6, 9)
    strided = run(OPS, [query, key, value, v], mask, bias)
    plain = [t.contiguous() for t in (query, key, value, v)]
    assert_same_bits(run(OPS, plain, mask.contiguous(), bias.contiguous()), strided)


# ---- raw calls ----------------------------------------------------------------------------


REFUSED = {
    "query": lambda c: c | {"query": c["query"][0]},
    "key": lambda c: c | {"key": c["key"][..., 1:]},
    "value": lambda c: c | {"value": c["value"].double()},
    "v": lambda c: c | {"v": c["v"][1:]},
    "mask": lambda c: c | {"mask": torch.ones(2, 2, 4, dtype=torch.bool)},
    "bias": lambda c: c | {"bias": torch.ones(2, 3, 4, dtype=torch.float16)},
    "k_lens": lambda c: c | {"k_lens": torch.ones(2)},
}


@pytest.mark.parametrize("name", REFUSED)
def test_the_binding_names_what_it_refuses(name: str) -> None:
    names = "query", "key", "value", "v", "mask", "bias", "k_lens"
    call = dict(zip(names, [*inputs_of(2, 3, 4, 5, 6), None, None, None], strict=True))
    with pytest.raises(RuntimeError, match=f"additive_attention: {name} must"):
        OPS.additive_attention(*REFUSED[name](call).values(), 1.0, False)
