"""What the targets can hold: grids, shared memory, tensor memory, registers."""

from triton.backends.compiler import GPUTarget

GRID_LIMITS = (2**31 - 1, 65535, 65535)
TENSOR_COLUMNS = 512
# Shared memory that one block may ask for, in bytes (CUDA C++ Programming Guide, "Technical
# Specifications per Compute Capability"; AMD CDNA 3 ISA, "LDS").
SHARED_BYTES = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, "gfx942": 64 << 10}
# The instruction of the target's matrix unit, as the assembler's input spells it.
MATRIX = {80: "mma.sync", 89: "mma.sync", 90: "wgmma", 100: "tcgen05.mma", "gfx942": "v_mfma"}

Arch = int | str


def target_of(arch: Arch) -> GPUTarget:
    """Triton's name of a compute capability, as 90, or of an AMD processor, as "gfx942"."""
    if arch not in SHARED_BYTES:
        raise ValueError(f"arch must be one of {list(SHARED_BYTES)}, got {arch!r}")
    return GPUTarget("cuda", arch, 32) if isinstance(arch, int) else GPUTarget("hip", arch, 64)


def full_grid(grid: tuple) -> tuple[int, int, int]:
    """The grid with its three sizes, each within what a GPU takes."""
    sizes = tuple(int(n) for n in (*grid, 1, 1, 1)[:3])
    if len(grid) > 3 or any(not 0 <= n <= most for n, most in zip(sizes, GRID_LIMITS)):
        raise ValueError(f"grid {grid} is beyond the limits {GRID_LIMITS}")
    return sizes


def most_threads(registers: int) -> int:
    """How many threads of so many registers one block may have on an NVIDIA GPU."""
    # Registers are handed out by 256 a warp, to each of the four schedulers its quarter.
    per_warp = -(-max(registers, 1) * 32 // 256) * 256
    return min(1024, 4 * (16384 // per_warp) * 32)
