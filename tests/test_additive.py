"""seqkern.additive_attention: the plain formula as the peer, masks, NaN, transforms, bad input."""

import subprocess
import sys
from importlib import import_module
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import seqkern
from seqkern.ops._additive_ops import MAX_WIDTH, choose
from seqkern.ops.choice import HAS_TRITON, Choice, has_native_kernel
from seqkern.reference import additive as reference
from tests.additive_inputs import F64, assert_close, attend, draw, eager, inputs_of

# What serves the op, and the definition behind it, must keep the same promises.
KERNELS = ["op", "reference"]
every_kernel = pytest.mark.parametrize("kernel", KERNELS)


def run(kernel: str, inputs, grads, *, k_lens=None, mask=None, scale=1.0):
    """The results and the gradients of query, key, value and v."""
    if kernel == "op":
        leaves = [t.detach().requires_grad_() for t in inputs]
        results = attend(*leaves, k_lens=k_lens, mask=mask, scale=scale)
        return [t.detach() for t in results], torch.autograd.grad(results, leaves, grads)
    boolean = mask if mask is None or mask.dtype == torch.bool else None
    added = None if boolean is not None else mask
    args = *(t.detach() for t in inputs), boolean, added, k_lens, scale
    o, weights, lse = reference.additive_attention(*args, True)
    needs = True, True, True, True, False
    derived = reference.additive_attention_backward(*grads, o, lse, *args, *needs)
    return [o, weights, lse], derived[:4]


def assert_equal(actual, expected) -> None:
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


# ---- the plain formula --------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(
    sizes=st.tuples(
        st.integers(1, 4),
        st.integers(1, 9),
        st.integers(1, 20),
        st.integers(1, 35),
        st.integers(1, 18),
    ),
    lens=st.booleans(),
    mask=st.sampled_from(["none", "bool", "float", "row", "column"]),
    scale=st.sampled_from([1.0, 0.37]),
    seed=st.integers(0, 2**20),
)
def test_values_and_gradients_are_those_of_the_formula(sizes, lens, mask, scale, seed) -> None:
    torch.manual_seed(seed)
    B, Tq, Tk = sizes[:3]
    inputs = inputs_of(*sizes)
    masks = {
        "bool": torch.rand(B, Tq, Tk) > 0.4,
        "float": draw(B, Tq, Tk),
        "row": draw(Tk),
        "column": draw(Tq, 1),
    }
    m = masks.get(mask)
    options: dict[str, Any] = {"scale": scale, "mask": m}
    options["k_lens"] = torch.randint(-2, Tk + 3, (B,)) if lens else None
    derived = [*inputs, m] if m is not None and m.dtype != torch.bool else inputs
    ours, theirs = attend(*inputs, **options), eager(*inputs, **options)
    assert_close(ours, theirs)
    grads = [torch.randn_like(t) for t in theirs]
    # eager's lse of an empty row is a constant -inf, and so is ours.
    assert_close(
        torch.autograd.grad(ours, derived, grads), torch.autograd.grad(theirs, derived, grads)
    )


def test_which_results_are_returned() -> None:
    inputs = inputs_of()
    o, weights, lse = attend(*inputs)
    assert torch.equal(seqkern.additive_attention(*inputs), o)
    pair = seqkern.additive_attention(*inputs, return_weights=True)
    assert_equal(pair, (o, weights))
    pair = seqkern.additive_attention(*inputs, return_lse=True)
    assert_equal(pair, (o, lse))
    assert_close([weights.sum(-1)], [torch.ones(2, 3, dtype=F64)])


def test_dtypes_of_the_results() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, F64):
        o, weights, lse = attend(*inputs_of(dtype=dtype), k_lens=torch.tensor([3, 0]))
        exact = F64 if dtype == F64 else torch.float32
        assert (o.dtype, weights.dtype, lse.dtype) == (dtype, dtype, exact)
        assert all(t.is_contiguous() for t in (o, weights, lse))


def test_bias_is_added_inside_the_tanh() -> None:
    query, key, value, v = inputs_of()
    bias = draw(7)
    ours = seqkern.additive_attention(query, key, value, v, bias=bias)
    theirs = eager(query + bias, key, value, v)[0]
    inputs, g = (query, key, value, v, bias), torch.randn_like(ours)
    assert_close(
        [ours, *torch.autograd.grad(ours, inputs, g)],
        [theirs, *torch.autograd.grad(theirs, inputs, g)],
    )


def test_the_normalised_form_is_weight_norms() -> None:
    """torch's parametrization of a Linear with one output has the same g, v and arithmetic."""
    query, key, value, v = inputs_of()
    linear = torch.nn.Linear(7, 1, bias=False, dtype=F64)
    torch.nn.utils.parametrizations.weight_norm(linear)
    with torch.no_grad():
        linear.parametrizations.weight.original0.fill_(0.6)
        linear.parametrizations.weight.original1.copy_(v)
    theirs = linear((query.unsqueeze(2) + key.unsqueeze(1)).tanh()).squeeze(-1).softmax(-1) @ value
    g = torch.tensor(0.6, dtype=F64, requires_grad=True)
    ours = seqkern.additive_attention(query, key, value, v, g=g)
    do = torch.randn_like(ours)
    dquery, dv, dg = torch.autograd.grad(ours, (query, v, g), do)
    weights = linear.parametrizations.weight
    of = query, weights.original1, weights.original0
    expected = torch.autograd.grad(theirs, of, do)
    assert_close([ours, dquery], [theirs, expected[0]])
    assert_close([dv, dg], [expected[1].squeeze(0), expected[2].squeeze()])


# ---- large numbers, masks and NaN ---------------------------------------------------------


@every_kernel
def test_large_logits(kernel: str) -> None:
    """Scores of 1e4 and arguments of tanh far out: nothing overflows and nothing is NaN."""
    inputs = inputs_of(Tk=9)
    inputs[3] = 1e4 * inputs[3].detach()
    grads = [torch.randn_like(t) for t in eager(*inputs)]
    for factor in (1.0, 30.0, 1e3):
        inputs[0] = factor * inputs[0].detach()
        leaves = [t.detach().requires_grad_() for t in inputs]
        expected = eager(*leaves)
        results, derived = run(kernel, inputs, grads)
        torch.testing.assert_close(results, list(expected), rtol=1e-9, atol=1e-9)
        wanted = torch.autograd.grad(expected, leaves, grads)
        for a, e in zip(derived, wanted, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-8, atol=1e-10 * float(e.abs().max() + 1))


@every_kernel
@pytest.mark.parametrize("form", ["bool", "float", "lens"])
def test_rows_with_nothing_left(kernel: str, form: str) -> None:
    """They give zeros and take and give no gradient; the other rows do not notice."""
    inputs = inputs_of(Tk=6, grad=False)
    live = torch.rand(2, 3, 6) > 0.3
    live[0, 1], live[1], live[0, 2, 3] = False, False, True
    options: dict[str, Any] = {"mask": live}
    if form == "float":
        options = {"mask": torch.zeros(2, 3, 6).masked_fill(~live, -torch.inf)}
    elif form == "lens":
        live = (torch.arange(6) < torch.tensor([[4], [0]])).unsqueeze(1).expand(2, 3, 6)
        options = {"k_lens": torch.tensor([4, 0], dtype=torch.int32)}
    leaves = [t.detach().requires_grad_() for t in inputs]
    expected = eager(*leaves, mask=live)
    grads = [torch.randn_like(t) for t in expected]
    (o, weights, lse), derived = run(kernel, inputs, grads, **options)
    assert_close([o, weights, lse], expected)
    assert_close(derived, torch.autograd.grad(expected, leaves, grads))
    empty = ~live.any(-1)
    assert empty.any()
    assert not empty.all()
    assert not o[empty].any()
    assert not weights[empty].any()
    assert (lse[empty] == -torch.inf).all()
    assert not derived[0][empty].any()


@every_kernel
def test_padding_is_never_read(kernel: str) -> None:
    inputs = inputs_of(B=3, Tk=9, D=17, grad=False)
    k_lens = torch.tensor([9, 4, 0], dtype=torch.int32)
    beyond = torch.arange(9) >= k_lens.unsqueeze(1)
    grads = [torch.randn(3, 3, 4), torch.randn(3, 3, 9), torch.randn(3, 3)]
    grads = [g.to(F64) for g in grads]
    clean = run(kernel, inputs, grads, k_lens=k_lens)
    for i in (1, 2):
        inputs[i] = inputs[i].masked_fill(beyond.unsqueeze(-1), torch.nan)
    spoilt = run(kernel, inputs, grads, k_lens=k_lens)
    for a, b in zip(clean, spoilt, strict=True):
        assert_equal(a, b)
    assert not spoilt[1][1][beyond].any()
    assert not spoilt[1][2][beyond].any()


@every_kernel
@pytest.mark.parametrize("options", [{}, {"k_lens": torch.tensor([5, 3], dtype=torch.int32)}])
def test_nan_of_a_query_stays_in_its_row(kernel: str, options: dict) -> None:
    inputs = inputs_of(Tq=6, D=19, grad=False)
    grads = [torch.randn(2, 6, n, dtype=F64) for n in (4, 5)] + [torch.randn(2, 6, dtype=F64)]
    clean, clean_grads = run(kernel, inputs, grads, **options)
    inputs[0] = inputs[0].clone()
    inputs[0][0, 2, 5] = torch.nan
    results, derived = run(kernel, inputs, grads, **options)
    for a, b in zip((*results, derived[0]), (*clean, clean_grads[0]), strict=True):
        rows = torch.ones(2, 6, dtype=torch.bool)
        rows[0, 2] = False
        assert torch.equal(a[rows], b[rows])
    assert results[0][0, 2].isnan().all()
    assert results[2][0, 2].isnan()
    # The keys and values of the other element of the batch know nothing of it either.
    for a, b in zip(derived[1:3], clean_grads[1:3], strict=True):
        assert torch.equal(a[1], b[1])


@every_kernel
def test_nan_of_a_key_stays_in_its_element(kernel: str) -> None:
    inputs = inputs_of(grad=False)
    grads = [torch.randn(2, 3, n, dtype=F64) for n in (4, 5)] + [torch.randn(2, 3, dtype=F64)]
    clean, clean_grads = run(kernel, inputs, grads)
    inputs[1] = inputs[1].clone()
    inputs[1][1, 4, 0] = torch.nan
    results, derived = run(kernel, inputs, grads)
    for a, b in zip((*results, *derived[:3]), (*clean, *clean_grads[:3]), strict=True):
        assert torch.equal(a[0], b[0])
    assert results[0][1].isnan().all()


@every_kernel
@pytest.mark.parametrize("form", ["bool", "float"])
def test_nan_that_a_mask_excludes(kernel: str, form: str) -> None:
    """A key that takes no part for any query is not seen, whatever it holds."""
    inputs = inputs_of(grad=False)
    mask = torch.tensor([True, True, False, True, True])
    if form == "float":
        mask = torch.zeros(5, dtype=F64).masked_fill(~mask, -torch.inf)
    mask = mask.view(1, 1, 5)
    grads = [torch.randn(2, 3, n, dtype=F64) for n in (4, 5)] + [torch.randn(2, 3, dtype=F64)]
    clean, clean_grads = run(kernel, inputs, grads, mask=mask)
    inputs[1] = inputs[1].clone()
    inputs[1][:, 2] = torch.nan
    results, derived = run(kernel, inputs, grads, mask=mask)
    assert_close((*results, *derived), (*clean, *clean_grads))


def test_a_mask_of_one_row_is_not_copied_for_the_batch() -> None:
    """Its gradient is the sum over what it was broadcast to, in its own shape and dtype."""
    inputs = inputs_of(dtype=torch.bfloat16)
    for shape in ((5,), (3, 1), (1, 3, 5), (2, 1, 1), ()):
        mask = draw(*shape, dtype=torch.float32)
        weights = attend(*inputs, mask=mask)[1]
        (grad,) = torch.autograd.grad(weights[..., 0].float().sum(), mask)
        assert grad.shape == mask.shape
        assert grad.dtype == torch.float32
        exact = [t.detach().double() for t in inputs]
        wide = mask.detach().double().requires_grad_()
        (expected,) = torch.autograd.grad(eager(*exact, mask=wide)[1][..., 0].sum(), wide)
        torch.testing.assert_close(grad.double(), expected, rtol=2e-2, atol=2e-2)


# ---- memory -------------------------------------------------------------------------------

PEAK = """
import sys, torch, seqkern
torch.set_num_threads(1)

def status(name):
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith(name)) * 1024

def call(Tq, Tk, D):
    shapes = (1, Tq, D), (1, Tk, D), (1, Tk, 8), (D,)
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    o = seqkern.additive_attention(*inputs)
    if sys.argv[1] == "backward":
        o.sum().backward()

call(3, 5, 7)
before = status("VmRSS")
with open("/proc/self/clear_refs", "w") as f:
    f.write("5")  # the peak starts anew
call(2048, 2048, 48)
print(status("VmHWM") - before)
"""


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_peak_memory(direction: str) -> None:
    """Nothing of Tq x Tk x D, even by the reference; and by the kernel nothing of Tq x Tk."""
    command = [sys.executable, "-P", "-c", PEAK, direction]
    done = subprocess.run(command, capture_output=True, text=True, timeout=170, check=True)
    scores = 2048 * 2048 * 4
    native = has_native_kernel("additive_attention", "cpu")
    assert int(done.stdout) < (scores / 2 if native else scores * 48 / 8)


@pytest.mark.parametrize("shape", [(2, 11, 5), (1, 11, 1), (2, 1, 5)])
def test_the_reference_takes_queries_in_blocks(monkeypatch, shape: tuple) -> None:
    """Blocks of some of the queries give what all of them at once give."""
    query, key, value, v = inputs_of(Tq=11, grad=False)
    mask, bias = torch.rand(shape) > 0.3, draw(*shape, grad=False)
    args = query, key, value, v, mask, bias, torch.tensor([5, 3]), 0.7
    do, dweights, dlse = draw(2, 11, 4), draw(2, 11, 5), draw(2, 11)
    runs = []
    for elements in (2**20, 2 * 5 * 7 * 4, 1):
        monkeypatch.setattr(reference, "_BLOCK_ELEMENTS", elements)
        o, weights, lse = reference.additive_attention(*args, True)
        grads = do, dweights, dlse, o, lse
        derived = reference.additive_attention_backward(*grads, *args, *[True] * 5)
        runs.append([o, weights, lse, *derived])
    assert_close(runs[1], runs[0])
    assert_close(runs[2], runs[0])


# ---- which kernel -------------------------------------------------------------------------


def test_explain() -> None:
    inputs = inputs_of()
    (found,) = seqkern.explain(attend, *inputs)
    native = has_native_kernel("additive_attention", "cpu")
    assert found.kernel == ("native" if native else "reference")
    assert found.reason
    assert found.op == "seqkern::additive_attention"
    assert found.k == (2, 5, 7)
    assert (found.instructions is not None) == native
    assert "additive_attention" in str(found)
    args = *inputs, None, None, None, 1.0
    meta = tuple(t.to("meta") if isinstance(t, Tensor) else t for t in args)
    assert choose(meta) == Choice("reference", "no kernel of seqkern is loaded for meta")


def test_which_kernel_serves_on_cuda() -> None:
    """The choice looks at shapes alone, so that fake tensors of a device that is not there do."""
    with FakeTensorMode():
        for dtype, width, kernel in (
            (torch.bfloat16, 7, "triton"),
            (torch.float32, MAX_WIDTH, "triton"),
            (torch.float32, MAX_WIDTH + 1, "reference"),
            (F64, 7, "reference"),
        ):
            t = torch.empty(2, 3, width, device="cuda", dtype=dtype)
            assert choose((t, t, t)).kernel == (kernel if HAS_TRITON else "reference")
    if HAS_TRITON:
        assert import_module("seqkern.kernels.additive_table").MAX_WIDTH == MAX_WIDTH


# ---- bad arguments ------------------------------------------------------------------------

GOOD = {"query": (2, 3, 7), "key": (2, 5, 7), "value": (2, 5, 4), "v": (7,)}
BAD_SHAPES = {
    "query": [(3, 7)],
    "key": [(5, 7), (2, 5, 8), (3, 5, 7), (2, 5, 0)],
    "value": [(5, 4), (2, 4, 4), (1, 5, 4), (2, 5, 0)],
    "v": [(7, 1), (6,), ()],
}


@pytest.mark.parametrize(
    ("name", "shape"), [(name, shape) for name, shapes in BAD_SHAPES.items() for shape in shapes]
)
def test_refuses_shapes_by_name(name: str, shape: tuple) -> None:
    inputs = {n: torch.zeros(shape if n == name else good) for n, good in GOOD.items()}
    with pytest.raises(ValueError, match=rf"additive_attention: {name} must .*got \("):
        seqkern.additive_attention(**inputs)
    args = *inputs.values(), None, None, None, 1.0
    with pytest.raises((ValueError, RuntimeError), match=rf"additive_attention: {name} must"):
        torch.ops.seqkern.additive_attention(*args, False)


def test_unbatched_input_is_refused_with_the_reason() -> None:
    query, key, value, v = (torch.zeros(shape) for shape in GOOD.values())
    with pytest.raises(ValueError, match=r"query must be \(B, Tq, D\).*batch of one, unsqueeze"):
        seqkern.additive_attention(query[0], key[0], value[0], v)


BAD_OPTIONS = [
    ({"bias": torch.zeros(6)}, ValueError, r"bias must be \(7,\), got \(6,\)"),
    ({"bias": torch.zeros(7, dtype=F64)}, ValueError, "bias must be torch.float32, got"),
    ({"bias": 1.0}, TypeError, "bias must be a Tensor, got float"),
    ({"g": torch.zeros(1)}, ValueError, r"g must be a scalar, \(\), got \(1,\)"),
    ({"g": torch.tensor(1.0, dtype=F64)}, ValueError, "g must have the dtype and device of v"),
    ({"g": 2.0}, TypeError, "g must be a Tensor, got float"),
    ({"k_lens": torch.ones(3).int()}, ValueError, r"k_lens must be \(2,\), got \(3,\)"),
    ({"k_lens": torch.ones(2)}, ValueError, "k_lens must be torch.int32 or torch.int64"),
    ({"k_lens": [5, 2]}, TypeError, "k_lens must be a Tensor, got list"),
    ({"mask": torch.ones(2, 3, 4).bool()}, ValueError, r"mask must broadcast to .* \(2, 3, 5\)"),
    ({"mask": torch.ones(1, 2, 3, 5).bool()}, ValueError, "mask must broadcast to"),
    ({"mask": torch.ones(3, 5).int()}, ValueError, "mask must be boolean, torch.float32"),
    ({"mask": torch.ones(3, 5).to(F64)}, ValueError, "mask must be boolean, torch.float32"),
    ({"mask": "causal"}, TypeError, "mask must be a Tensor, got str"),
    ({"scale": float("nan")}, ValueError, "scale must be finite, got nan"),
    ({"scale": float("inf")}, ValueError, "scale must be finite, got inf"),
    ({"scale": "1"}, TypeError, "scale must be a number, got str"),
    ({"scale": torch.ones(1)}, TypeError, "scale must be a number, got Tensor"),
    ({"scale": torch.ones((), requires_grad=True)}, TypeError, "scale must be .* no gradient"),
]


@pytest.mark.parametrize(
    ("options", "error", "message"), BAD_OPTIONS, ids=[f"{i}" for i in range(len(BAD_OPTIONS))]
)
def test_refuses_options_by_name(options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        seqkern.additive_attention(*(torch.zeros(s) for s in GOOD.values()), **options)


@pytest.mark.parametrize("name", GOOD)
def test_refuses_types_and_dtypes_by_name(name: str) -> None:
    inputs: dict[str, Any] = {n: torch.zeros(s) for n, s in GOOD.items()}
    whole = {n: t.int() if n == name else t for n, t in inputs.items()}
    with pytest.raises(ValueError, match=rf"{name} must .*got torch.int32"):
        seqkern.additive_attention(**whole)
    with pytest.raises(TypeError, match=f"{name} must be a Tensor, got NoneType"):
        seqkern.additive_attention(**inputs | {name: None})


def test_lengths_beyond_32_bits_do_not_wrap() -> None:
    inputs = inputs_of()
    wrapping = torch.tensor([2**32 + 1, -(2**32) + 2])
    expected = attend(*inputs, k_lens=torch.tensor([5, 0]))
    assert_close(attend(*inputs, k_lens=wrapping), expected)


def test_the_raw_backward_checks_its_gradients() -> None:
    args = *(torch.zeros(s) for s in GOOD.values()), None, None, None, 1.0
    o, _, lse = torch.ops.seqkern.additive_attention(*args, False)
    good = {"do": o, "dweights": torch.zeros(2, 3, 5), "dlse": lse, "o": o, "lse": lse}
    needs = True, True, True, True, False
    for name, t in good.items():
        for wrong in (t[:, :-1], t.double(), t[..., None]):
            grads = (good | {name: wrong}).values()
            with pytest.raises((ValueError, RuntimeError), match=f"{name} must"):
                torch.ops.seqkern.additive_attention_backward(*grads, *args, *needs)
