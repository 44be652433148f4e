"""GPUs to compile for: what a multiprocessor of each holds, and how its tensor cores' instructions
are called.
"""

from dataclasses import dataclass

from triton.backends.compiler import GPUTarget

TENSOR_MEMORY_COLUMNS = 512  # of a multiprocessor, from sm_100 on: PTX ISA, tcgen05.alloc


@dataclass(frozen=True)
class Target:
    """A GPU to compile for, and what one of its multiprocessors holds.

    instruction: of its tensor cores, a pattern in the disassembly.
    fast_dot: a dot in Triton's GPU IR that becomes such instructions.
    registers: 32-bit ones of a scheduler; a multiprocessor has four schedulers.
    register_unit: a warp gets a multiple of so many.
    cta_shared_bytes: the most one CTA may have; of the multiprocessor's `shared_bytes` the system
        takes `shared_reserved` for every CTA.
    """

    gpu: GPUTarget
    instruction: str
    fast_dot: str
    warps: int
    ctas: int
    registers: int
    register_unit: int
    shared_bytes: int
    shared_reserved: int
    cta_shared_bytes: int


# NVIDIA: CUDA C Programming Guide, "Technical Specifications per Compute Capability", and the
# register allocation unit of the CUDA occupancy calculator. gfx942: AMD's CDNA3 ISA guide (512
# vector registers of 64 lanes, eight waves a SIMD, 64 KB of LDS a compute unit) and LLVM's
# AMDGPUBaseInfo.cpp (units of eight; 16 work-groups of more than one wave).
_NVIDIA = {"warps": 64, "ctas": 32, "registers": 16384, "register_unit": 256}
_HOPPER = {"shared_bytes": 228 << 10, "shared_reserved": 1 << 10, "cta_shared_bytes": 227 << 10}
_MMA_RESULT = r"tt\.dot .*-> tensor<[^>]*#mma"
TARGETS: dict[str, Target] = {
    "sm_80": Target(
        GPUTarget("cuda", 80, 32), r"\b[HBI]MMA", _MMA_RESULT, **_NVIDIA,
        shared_bytes=164 << 10, shared_reserved=1 << 10, cta_shared_bytes=163 << 10,
    ),
    "sm_90": Target(
        GPUTarget("cuda", 90, 32), r"\b[HQI]GMMA", r"ttng\.warp_group_dot ", **_NVIDIA, **_HOPPER
    ),
    "sm_100": Target(
        GPUTarget("cuda", 100, 32), r"\bUTC[A-Z]*MMA", r"ttng\.tc_gen5_mma ", **_NVIDIA, **_HOPPER
    ),
    "gfx942": Target(
        GPUTarget("hip", "gfx942", 64), r"\bv_mfma", _MMA_RESULT, warps=32, ctas=16,
        registers=512 * 64, register_unit=8 * 64,
        shared_bytes=64 << 10, shared_reserved=0, cta_shared_bytes=64 << 10,
    ),
}  # fmt: skip
# Launches are chosen for NVIDIA's shared memory; most want more than the 64 KB of gfx942, which is
# there to be asked for.
DEFAULT_TARGETS = ("sm_80", "sm_90", "sm_100")


def resident_ctas(
    target: Target, num_warps: int, registers: int, shared_bytes: int, tensor_memory_columns: int
) -> int:
    """CTAs a multiprocessor holds at once: the least that warps, registers and memories allow."""
    limits = [target.ctas, target.warps // num_warps]
    of_a_warp = _round_up(max(registers, 1) * target.gpu.warp_size, target.register_unit)
    limits.append(4 * (target.registers // of_a_warp) // num_warps)
    of_a_cta = _round_up(shared_bytes, 128) + target.shared_reserved
    if of_a_cta:
        limits.append(target.shared_bytes // of_a_cta)
    if tensor_memory_columns:
        limits.append(TENSOR_MEMORY_COLUMNS // tensor_memory_columns)
    return min(limits)


def _round_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit
