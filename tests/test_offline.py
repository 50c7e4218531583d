"""The tools under tests/offline: right numbers, planted faults are caught, gates close."""

from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="the tools are for Triton kernels")

import triton.language as tl
from triton.runtime.errors import OutOfResources
from triton.runtime.jit import JITFunction

from tests.offline import toys
from tests.offline.aot import Budget, Report, compile_for, gate, report
from tests.offline.driver import pretend_gpu
from tests.offline.interpreter import KernelFault, interpreted, poisoned_memory
from tests.offline.targets import MATRIX

bf16 = torch.bfloat16


def philox(counters: np.ndarray, seed: int, rounds: int) -> np.ndarray:
    """Philox4x32 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3")."""
    c = counters.astype(np.uint64)
    key = np.array([seed & 0xFFFFFFFF, seed >> 32], dtype=np.uint64)
    low = np.uint64(0xFFFFFFFF)
    for _ in range(rounds):
        p, q = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = np.stack([(q >> 32) ^ c[1] ^ key[0], q & low, (p >> 32) ^ c[3] ^ key[1], p & low])
        key = (key + np.array([0x9E3779B9, 0xBB67AE85], dtype=np.uint64)) & low
    return c.astype(np.uint32)


# ---- numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, bf16])
def test_elementwise_sum_is_torchs(dtype):
    x, y = torch.randn(2, 1000).to(dtype)
    out = torch.full_like(x, torch.nan)
    with interpreted(toys):
        toys.add_kernel[lambda meta: (-(-1000 // meta["BLOCK"]),)](x, y, out, 1000, BLOCK=64)
    assert torch.equal(out, x + y)


def test_casts_to_bf16_round_to_nearest_even():
    special = [0.0, -0.0, torch.inf, -torch.inf, 1e-40, 3.4e38, 1 + 2**-8, 1 + 3 * 2**-8]
    x = torch.cat([torch.tensor(special), torch.randn(4088)])
    out = torch.empty(4096, dtype=bf16)
    with interpreted(toys):
        toys.cast_kernel[(4,)](x, out, 4096, BLOCK=1024)
        assert torch.equal(out.view(torch.int16), x.to(bf16).view(torch.int16))
        back = torch.empty(4096)
        toys.cast_kernel[(4,)](out, back, 4096, BLOCK=1024)
    assert torch.equal(back, out.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, bf16])
def test_reductions_and_scans(dtype):
    x = torch.randn(6, 32).to(dtype)
    total, largest = torch.empty(2, 6, dtype=dtype)
    last, prefix = torch.empty(6, dtype=torch.int32), torch.empty_like(x)
    with interpreted(toys):
        toys.rows_kernel[(6,)](x, total, largest, last, prefix, N=32)
    eps = torch.finfo(dtype).eps
    scale = x.double().abs().sum(1)
    assert ((total.double() - x.double().sum(1)).abs() <= 5 * eps * scale).all()
    assert ((prefix.double() - x.double().cumsum(1)).abs() <= 32 * eps * scale[:, None]).all()
    assert torch.equal(largest, x.amax(1))
    assert torch.equal(last.long(), x.argmax(1))


def test_reduction_with_a_function_of_its_own():
    x = torch.randn(3, 64)
    out = torch.empty(3)
    with interpreted(toys):
        toys.logsumexp_kernel[(3,)](x, out, N=64)
    torch.testing.assert_close(out, x.logsumexp(1))


@pytest.mark.parametrize(
    ("dtype", "precision", "bound"),
    [
        (torch.float32, "ieee", 1e-6),
        (torch.float32, "tf32", 1e-3),
        (torch.float16, "ieee", 5e-4),
        (bf16, "ieee", 4e-3),
    ],
)
def test_products(dtype, precision, bound):
    a, b = torch.randn(2, 32, 40).to(dtype)
    out = torch.full((32, 32), torch.nan, dtype=dtype)
    with interpreted(toys):
        toys.product_kernel[(2, 2)](a, b, out, 40, TILE=16, PRECISION=precision)
    want = 2 * a.double() @ b.double().T
    error = ((out.double() - want).abs() / (2 * a.double().abs() @ b.double().abs().T)).max()
    assert error < bound
    assert precision != "tf32" or error > 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, bf16])
def test_descriptors_fill_and_clip(dtype):
    a, b = torch.randn(2, 40, 24).to(dtype)
    a = a[:24]
    out = torch.full((24, 40), torch.nan, dtype=dtype)
    with interpreted(toys):
        toys.described_product_kernel[(2, 3)](a, b, out, 24, 40, 24, TILE=16)
    eps = {torch.float32: 2e-3, bf16: 4e-3}[dtype]
    want = a.double() @ b.double().T
    assert ((out.double() - want).abs() <= eps * (a.double().abs() @ b.double().abs().T)).all()


@pytest.mark.parametrize("dtype", [torch.float32, bf16])
def test_maximum_and_minimum_ignore_nan(dtype):
    x = torch.tensor([1.0, torch.nan, 3.0, torch.nan], dtype=dtype)
    y = torch.tensor([2.0, 5.0, torch.nan, torch.nan], dtype=dtype)
    larger, smaller = torch.empty(2, 4, dtype=dtype)
    with interpreted(toys):
        toys.extremes_kernel[(1,)](x, y, larger, smaller, N=4)
    assert larger[:3].tolist() == [2, 5, 3]
    assert smaller[:3].tolist() == [1, 5, 3]
    assert larger[3].isnan()
    assert smaller[3].isnan()


def test_tanh_of_libdevice():
    x, out = torch.randn(16), torch.empty(16)
    with interpreted(toys):
        toys.tanh_kernel[(1,)](x, out, N=16)
    torch.testing.assert_close(out, x.tanh())


@pytest.mark.parametrize("rounds", [7, 10])
@pytest.mark.parametrize("seed", [0, 12345, 0x9ABCDEF012345678 >> 1])
def test_philox(rounds, seed):
    start = 2**31 - 40
    words, high = torch.empty(4, 64, dtype=torch.int32), torch.empty(64, dtype=torch.int32)
    uniform = torch.empty(64)
    with interpreted(toys):
        toys.philox_kernel[(1,)](words, uniform, high, seed, start, N=64, ROUNDS=rounds)
        spread = torch.empty(4, 64, dtype=torch.int32)
        toys.philox_words_kernel[(1,)](spread, seed, N=64, ROUNDS=rounds)
    at = np.arange(start, start + 64).astype(np.uint32)
    want = philox(np.stack([at, at * 0, at * 0, at * 0]), seed, rounds)
    assert np.array_equal(words.numpy().view(np.uint32), want)
    product = want[0].astype(np.uint64) * want[1] >> np.uint64(32)
    assert np.array_equal(high.numpy().view(np.uint32), product.astype(np.uint32))
    folded = want[0].view(np.int32).astype(np.int64)
    folded = np.where(folded < 0, -folded - 1, folded)
    assert np.allclose(uniform.numpy(), folded / 2**31, atol=1e-7)
    at = np.arange(64, dtype=np.int64)
    counters = np.stack([at, at + 7, at * 3, at - 5]).astype(np.uint32)
    assert np.array_equal(spread.numpy().view(np.uint32), philox(counters, seed, rounds))


def test_philox_of_this_file_is_the_published_one():
    zeros, ones = np.zeros((4, 1), np.uint32), np.full((4, 1), 0xFFFFFFFF, np.uint32)
    known = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert philox(zeros, 0, 10)[:, 0].tolist() == known
    known = [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    assert philox(ones, 2**64 - 1, 10)[:, 0].tolist() == known


# ---- planted faults


def test_load_out_of_bounds_names_kernel_argument_and_program():
    x, out = torch.ones(100), torch.empty(100)
    told = r"too_far_kernel, program \(1, 0, 0\).*load of 28 element.* outside `X`.*number 100"
    with interpreted(toys), pytest.raises(KernelFault, match=told):
        toys.too_far_kernel[(2,)](x, out, 100, BLOCK=64)
    with interpreted(toys, bounds=False):
        toys.too_far_kernel[(2,)](torch.ones(128)[:100], out, 100, BLOCK=64)


def test_load_out_of_bounds_into_another_argument():
    memory = torch.ones(200)
    with interpreted(toys), pytest.raises(KernelFault, match="outside `X`"):
        toys.too_far_kernel[(2,)](memory[:100], memory[100:], 100, BLOCK=64)


def test_races():
    x = torch.ones(64)
    with interpreted(toys), pytest.raises(KernelFault, match="race: store to `OUT` of 1 element"):
        toys.same_place_kernel[(4,)](x, torch.empty(1), BLOCK=16)
    with interpreted(toys), pytest.raises(KernelFault, match=r"race: (load|store) to `X`"):
        toys.neighbour_kernel[(4,)](x.clone(), BLOCK=16)
    with interpreted(toys, races=False):
        toys.same_place_kernel[(4,)](x, torch.empty(1), BLOCK=16)
    total = torch.zeros(1)
    with interpreted(toys):
        toys.counted_kernel[(4,)](x, total, BLOCK=16)
    assert total.item() == 64


def test_order_of_programs_is_the_seeds():
    x = torch.arange(64.0)

    def last_sum(seed: int) -> float:
        out = torch.empty(1)
        with interpreted(toys, races=False, seed=seed):
            toys.same_place_kernel[(4,)](x, out, BLOCK=16)
        return out.item()

    assert last_sum(1) == last_sum(1)
    assert len({last_sum(seed) for seed in range(8)}) > 1


def test_undefined_lanes_are_nan():
    out = torch.zeros(1)
    with interpreted(toys):
        toys.undefined_kernel[(1,)](torch.ones(10), out, 10, BLOCK=16)
    assert out.isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, bf16])
def test_unwritten_output_is_nan(dtype):
    x = torch.ones(16, dtype=dtype)
    with interpreted(toys), poisoned_memory():
        out = torch.empty_like(x)
        toys.half_written_kernel[(1,)](out, 16, BLOCK=16)
    assert out.isnan().tolist() == [False] * 8 + [True] * 8
    assert not torch.are_deterministic_algorithms_enabled()


def test_wrong_launches_are_refused():
    x = torch.ones(16)
    with interpreted(toys):
        with pytest.raises(KeyError, match="num_wraps"):
            toys.add_kernel[(1,)](x, x, x, 16, BLOCK=16, num_wraps=4)
        with pytest.raises(ValueError, match="grid"):
            toys.add_kernel[(1, 70000)](x, x, x, 16, BLOCK=16)
        with pytest.raises(TypeError, match="complex64"):
            toys.add_kernel[(1,)](x.to(torch.complex64), x, x, 16, BLOCK=16)
        with pytest.raises(AssertionError, match="K >= 16"):
            toys.product_kernel[(1, 1)](x, x, x, 4, TILE=4, PRECISION="ieee")


def test_words_mean_what_the_compiler_means():
    x = torch.tensor([2.0, -3.0, 20.0, 4.0])
    out = torch.empty(4)
    with interpreted(toys):
        toys.word_kernel[(1,)](x, out, N=4)
        assert out.tolist() == [5, -3, 20, 5]
        with pytest.raises(TypeError, match="a condition must be a scalar"):
            toys.block_condition_kernel[(1,)](x, out, N=4)
        with pytest.raises(NotImplementedError, match="chain of comparisons"):
            toys.chained_kernel[(1,)](x, out, N=4)


# ---- the stand-in driver


def test_modes_alternate_and_leave_no_trace():
    def language() -> list[dict[str, object]]:
        owners = (tl, tl.core, tl.math, tl.tensor, tl.block_type, tl.dtype, JITFunction)
        # Python makes __annotations__ when somebody first asks for them.
        return [{k: v for k, v in vars(x).items() if k != "__annotations__"} for x in owners]

    before = language()
    x, y = torch.randn(2, 100)
    for arch in (90, 80):
        out = torch.full((100,), torch.nan)
        with interpreted(toys):
            toys.add_kernel[(2,)](x, y, out, 100, BLOCK=64)
        assert torch.equal(out, x + y)
        out.fill_(torch.nan)
        with pretend_gpu(arch) as launches:
            toys.add_kernel[(2,)](x, y, out, 100, BLOCK=64)
        assert out.isnan().all()
        assert launches[0].compiled.metadata.target.arch == arch
    assert language() == before


def test_nothing_stays_patched_after_a_fault():
    load, run = vars(tl)["load"], JITFunction.run
    x = torch.ones(100)
    with pytest.raises(KernelFault), interpreted(toys):
        toys.too_far_kernel[(2,)](x, x, 100, BLOCK=64)
    assert (vars(tl)["load"], JITFunction.run) == (load, run)


def test_only_the_named_modules_are_interpreted():
    x = torch.ones(16)
    with pretend_gpu(90) as launches, interpreted(np):
        toys.add_kernel[(1,)](x, x, x, 16, BLOCK=16)
    assert len(launches) == 1


def test_launch_is_recorded():
    x, out = torch.empty(2, 1000).to(bf16)
    with pretend_gpu(90) as launches:
        toys.add_kernel[lambda meta: (1000 // meta["BLOCK"], 2)](
            x, x[1:], out, 1000, BLOCK=64, num_warps=2, num_stages=4
        )
    (launch,) = launches
    assert (launch.kernel, launch.grid) == ("add_kernel", (15, 2, 1))
    assert launch.arguments["X"] is x
    assert launch.arguments["n"] == 1000
    assert launch.constants == {"BLOCK": 64}
    assert (launch.warps, launch.stages) == (2, 4)
    aligned = {i for (i,), marks in launch.compiled.src.attrs.items() if marks}
    assert aligned == {0, 2}


def test_driver_refuses_what_does_not_fit():
    a, out = torch.empty(128, 256, dtype=bf16), torch.empty(128, 128)
    product = toys.described_product_kernel[(2, 2)]
    with pretend_gpu(80), pytest.raises(OutOfResources, match="shared memory"):
        product(a, a, out, 128, 128, 256, TILE=64, STAGES=16)
    with pretend_gpu(90), pytest.raises(OutOfResources, match="threads"):
        toys.add_kernel[(1,)](a, a, a, 8, BLOCK=64, num_warps=64)
    with pretend_gpu(90), pytest.raises(ValueError, match="grid"):
        toys.add_kernel[(1, 2**16)](a, a, a, 8, BLOCK=64)
    with pytest.raises(ValueError, match="arch must be one of"), pretend_gpu(70):
        raise AssertionError("a target that nobody knows was taken")


# ---- gates


@pytest.mark.parametrize(
    ("arch", "required"),
    [
        (80, ("HMMA", "LDGSTS")),
        (90, ("HGMMA", "UTMALDG")),
        (100, ("UTCHMMA", "UTMALDG")),
        ("gfx942", ()),
    ],
)
def test_gate_lets_a_good_kernel_pass(arch, required):
    a, out = torch.empty(128, 256, dtype=bf16), torch.empty(128, 128)
    with pretend_gpu(arch) as launches:
        toys.described_product_kernel[(2, 2)](a, a, out, 128, 128, 256, TILE=64)
    found = report(launches[0])
    gate(found, Budget(required=required))
    assert found.products[MATRIX[arch]] > 0
    assert found.registers > 16
    assert found.shared_bytes >= 16384
    assert (found.tensor_columns > 0) == (arch == 100)


def compiled_toy(
    kernel: JITFunction, constants: dict[str, int], arch: int = 90, **options: int
) -> Report:
    names = [name for name in kernel.arg_names if name not in constants]
    kinds = {name: "*bf16:16" if name in "XAB" else "*fp32:16" for name in names}
    sizes = {name: "i32:16" for name in names if name.islower()}
    return report(compile_for(arch, kernel, kinds | sizes, constants, **options))


def test_gate_stops_spills():
    spilling = compiled_toy(toys.squares_kernel, {"TILE": 128, "ATOMIC": False}, 80, maxnreg=64)
    told = r"squares_kernel for 80, 4 warps: 64 registers.*bytes spilled: \d+, at most 0 allowed"
    with pytest.raises(AssertionError, match=told):
        gate(spilling)
    gate(spilling, Budget(spill_bytes=spilling.spill_bytes))


def test_gate_stops_atomics():
    atomic = compiled_toy(toys.squares_kernel, {"TILE": 64, "ATOMIC": True})
    with pytest.raises(AssertionError, match=r"atomics: \d+, at most 0"):
        gate(atomic)
    gate(atomic, Budget(atomics=atomic.atomics))


def test_gate_stops_too_much_shared_memory():
    large = compiled_toy(toys.described_product_kernel, {"TILE": 64, "STAGES": 16})
    with pytest.raises(AssertionError, match=r"shared memory: 2\d{5}, at most 232448"):
        gate(large)


def test_gate_stops_a_kernel_without_its_matrix_instruction():
    vector = compiled_toy(toys.add_kernel, {"BLOCK": 64})
    gate(vector, Budget(matrix=None))
    with pytest.raises(AssertionError, match="no wgmma"):
        gate(vector)
    with pytest.raises(AssertionError, match="no HGMMA"):
        gate(vector, Budget(matrix=None, required=("HGMMA",)))


def test_gate_stops_serialised_products_and_too_much_tensor_memory():
    good = compiled_toy(toys.squares_kernel, {"TILE": 64, "ATOMIC": False})
    gate(good)
    with pytest.raises(AssertionError, match="wgmma serialised"):
        gate(replace(good, serialised=True))
    with pytest.raises(AssertionError, match="columns of tensor memory: 576, at most 512"):
        gate(replace(good, tensor_columns=576))
