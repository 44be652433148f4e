"""What the compiler makes of every shipped launch, for GPUs that need not be here: registers,
spills, shared memory, tensor-core instructions, occupancy.

It says what a kernel compiles to, not that it is fast or right. Triton carries all it takes:
ptxas, cuobjdump and nvdisasm for NVIDIA, LLVM for AMD; its cache makes a second run quick.
"""

import contextlib
import functools
import hashlib
import io
import json
import re
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import triton
from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource, make_backend
from triton.runtime.cache import get_cache_key, get_cache_manager
from triton.runtime.jit import create_function_from_signature

from resfuse.kernels.gpu.common.launch import Launch, interpreting
from resfuse.kernels.gpu.inspect.disassembly import disassemble, output_of
from resfuse.kernels.gpu.inspect.ptxas import is_sound
from resfuse.kernels.gpu.inspect.targets import (
    DEFAULT_TARGETS,
    TARGETS,
    TENSOR_MEMORY_COLUMNS,
    Target,
    resident_ctas,
)
from resfuse.kernels.gpu.registry import KERNELS

BATCH = 32  # launches that a process compiles before it disassembles them together
Job = tuple[str, int, str]  # kernel, number of its shipped launch, target


@dataclass(frozen=True)
class Inspection:
    """One launch compiled for one target. Registers and spills are per thread, shared memory per
    CTA, `ctas` and `warps` what a multiprocessor holds at once."""

    kernel: str
    label: str
    target: str
    num_warps: int
    num_stages: int
    registers: int = 0
    spill_bytes: int = 0  # local memory, which nothing but a spill uses here
    spill_stores: int = 0
    shared_bytes: int = 0
    tensor_memory_columns: int = 0
    tensor_core_instructions: int = 0
    dots: int = 0  # of the source, those made for tensor cores: all but ieee fp32
    slow_dots: int = 0  # of those after lowering, the ones that miss them
    register_operands: int = 0  # Hopper's dots that read A from registers: see ptxas.py
    ctas: int = 0
    warps: int = 0
    assembler: str = ""
    assembler_version: str = ""
    error: str = ""  # what the compiler said where it made nothing


def problems(result: Inspection) -> list[str]:
    """What is wrong with a shipped launch, a sentence each."""
    if result.error:
        return [f"does not compile: {result.error}"]
    target = TARGETS[result.target]
    found = []
    if result.spill_bytes or result.spill_stores:
        found.append(f"spills {result.spill_bytes} bytes a thread, {result.spill_stores} stores")
    if result.shared_bytes > target.cta_shared_bytes:
        found.append(
            f"{_kib(result.shared_bytes)} of shared memory, {result.target} has "
            f"{_kib(target.cta_shared_bytes)}"
        )
    if result.tensor_memory_columns > TENSOR_MEMORY_COLUMNS:
        found.append(
            f"{result.tensor_memory_columns} columns of tensor memory, {result.target} has "
            f"{TENSOR_MEMORY_COLUMNS}"
        )
    if result.slow_dots or (result.dots and not result.tensor_core_instructions):
        found.append(
            f"{result.slow_dots or result.dots} dots miss {result.target}'s tensor cores "
            f"({result.tensor_core_instructions} instructions of them)"
        )
    return found


def has_risky_operands(result: Inspection) -> bool:
    """True where a ptxas that may corrupt them assembled register operands (ptxas.py)."""
    return bool(result.register_operands) and not is_sound(result.assembler_version)


def inspect(
    kernels: Sequence[str] = tuple(KERNELS),
    targets: Sequence[str] = DEFAULT_TARGETS,
    processes: int = 2,
) -> Iterator[Inspection]:
    """Compiles every shipped launch of `kernels` for each of `targets` it is meant for.

    Raises:
        RuntimeError: this process interprets kernels; nothing can be compiled in it.
    """
    return inspect_jobs(jobs(kernels, targets), processes)


def jobs(kernels: Sequence[str], targets: Sequence[str]) -> list[Job]:
    """All there is to compile."""
    return [
        (kernel, index, target)
        for kernel in kernels
        for index, (_, launch) in enumerate(KERNELS[kernel].launches())
        for target in targets
        if _is_meant_for(launch, TARGETS[target].gpu)
    ]


def inspect_jobs(todo: Sequence[Job], processes: int = 2) -> Iterator[Inspection]:
    """Compiles some of `jobs`, in that order."""
    require_compiler()
    # spawned, not forked: a fork after torch has started its threads can hang
    batches = [todo[at : at + BATCH] for at in range(0, len(todo), BATCH)]
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        for results in pool.map(_inspect_shipped, batches):
            yield from results


def _is_meant_for(launch: Launch, gpu: GPUTarget) -> bool:
    return launch.least_capability <= (gpu.arch if gpu.backend == "cuda" else 80)


def require_compiler() -> None:
    if interpreting():
        raise RuntimeError(
            "TRITON_INTERPRET is set, so kernels are interpreted and nothing is compiled; "
            "unset it to inspect them"
        )


def _inspect_shipped(todo: Sequence[Job]) -> list[Inspection]:
    named = [(kernel, *_shipped(kernel)[index], target) for kernel, index, target in todo]
    return inspect_launches(named)


@functools.cache
def _shipped(kernel: str) -> list[tuple[str, Launch]]:
    """Returns a kernel's shipped launches, which take 0.1 s to choose for some."""
    return list(KERNELS[kernel].launches())


def inspect_launch(kernel: str, label: str, launch: Launch, target: str) -> Inspection:
    """Compiles one launch for one of TARGETS and reads the result."""
    (inspection,) = inspect_launches([(kernel, label, launch, target)])
    return inspection


def inspect_launches(named: Sequence[tuple[str, str, Launch, str]]) -> list[Inspection]:
    """Compiles launches and reads the results.

    Args:
        named: kernel, label, launch and one of TARGETS for each.
    """
    require_compiler()
    compiled = [_compile(launch, target) for _, _, launch, target in named]
    listings = _listings([target for *_, target in named], compiled)
    return [
        _read(one, each, listing)
        for one, each, listing in zip(named, compiled, listings, strict=True)
    ]


def _compile(launch: Launch, target: str) -> Any:
    """Returns the triton.CompiledKernel, or in a sentence why there is none."""
    try:
        # Triton prints the whole program where the assembler fails; the error says enough.
        with contextlib.redirect_stdout(io.StringIO()):
            return _compiled_with_stages(launch, TARGETS[target].gpu)
    except Exception as error:  # anything the compiler raises is a finding
        lines = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {lines[0]}"


def _listings(targets: Sequence[str], compiled: Sequence[Any]) -> list[str]:
    """Returns the disassembly of each compiled kernel, in one go for each GPU of NVIDIA's; AMD's
    compiler writes one as it compiles."""
    listings = ["" if isinstance(each, str) else each.asm.get("amdgcn", "") for each in compiled]
    for target in {name for name in targets if TARGETS[name].gpu.backend == "cuda"}:
        own = [
            number
            for number, each in enumerate(compiled)
            if targets[number] == target and not isinstance(each, str)
        ]
        cubins = [compiled[number].asm["cubin"] for number in own]
        for number, listing in zip(own, disassemble(cubins, TARGETS[target].gpu.arch), strict=True):
            listings[number] = listing
    return listings


def _read(named: tuple[str, str, Launch, str], compiled: Any, listing: str) -> Inspection:
    kernel, label, launch, target = named
    what = (kernel, label, target, launch.num_warps, launch.num_stages)
    if isinstance(compiled, str):
        return Inspection(*what, error=compiled)
    read = _read_nvidia if TARGETS[target].gpu.backend == "cuda" else _read_amd
    measured = {**read(compiled, listing, TARGETS[target]), **_read_dots(compiled, TARGETS[target])}
    measured["shared_bytes"] = compiled.metadata.shared
    measured["tensor_memory_columns"] = getattr(compiled.metadata, "tmem_size", None) or 0
    num_warps = compiled.metadata.num_warps  # warp specialisation adds some
    ctas = resident_ctas(
        TARGETS[target],
        num_warps,
        measured["registers"],
        measured["shared_bytes"],
        measured["tensor_memory_columns"],
    )
    return Inspection(*what, **measured, ctas=ctas, warps=ctas * num_warps)


@dataclass(frozen=True)
class Specialized:
    """A kernel as Triton compiles it for a GPU, for all launches whose arguments specialise so."""

    source: ASTSource
    options: Any  # triton.backends.nvidia.compiler.CUDAOptions or another backend's
    gpu: GPUTarget

    @functools.cached_property
    def key(self) -> str:
        """What Triton's cache on disk knows it by."""
        variables = get_cache_invalidating_env_vars()
        key = get_cache_key(self.source, make_backend(self.gpu), self.options, env_vars=variables)
        return hashlib.sha256(key.encode()).hexdigest()

    def compile(self) -> Any:
        """The triton.CompiledKernel; from the cache where that has it."""
        return triton.compile(self.source, target=self.gpu, options=self.options.__dict__)

    def cached_metadata(self) -> dict[str, Any] | None:
        """What Triton's cache on disk says of it; None where it is not there."""
        name = f"{self.source.name[:150]}.json"  # as triton.compile has it
        path = (get_cache_manager(self.key).get_group(name) or {}).get(name)
        return None if path is None else json.loads(Path(path).read_text())


def specialize(launch: Launch, gpu: GPUTarget) -> Specialized:
    """What a launch compiles on `gpu`.

    The arguments are specialised by Triton's own code (JITFunction.run with triton 3.6 to 3.8, but
    for the driver, which needs the GPU), so divisibility by 16, ones and None count as they will.
    """
    function = launch.kernel
    backend = make_backend(gpu)
    bind = create_function_from_signature(function.signature, function.params, backend)
    given = {**launch.args, **launch.constants, **launch.options}
    bound, specialization, options = bind(**given)
    options, signature, constants, attributes = function._pack_args(
        backend, given, bound, specialization, options
    )
    return Specialized(ASTSource(function, signature, constants, attributes), options, gpu)


def compile_launch(launch: Launch, gpu: GPUTarget) -> Any:
    """The triton.CompiledKernel a launch on `gpu` would run."""
    return specialize(launch, gpu).compile()


def _compiled_with_stages(launch: Launch, gpu: GPUTarget) -> Any:
    """compile_launch, anew where Triton's cache has no more than the binary: kernels that were
    carried here come without the stages before it, and so does what TRITON_STORE_BINARY_ONLY left.
    """
    compiled = compile_launch(launch, gpu)
    if "ttgir" in compiled.asm:
        return compiled
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.always_compile = True
        return compile_launch(launch, gpu)


def _read_nvidia(compiled: Any, listing: str, target: Target) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = output_of("cuobjdump", "-res-usage", cubin.name)
    ptxas = get_ptxas(target.gpu.arch)
    return {
        "registers": _number(r"REG:(\d+)", usage),
        "spill_bytes": _number(r"STACK:(\d+)", usage) + _number(r"LOCAL:(\d+)", usage),
        "spill_stores": len(re.findall(r"\bSTL\b", listing)),
        "tensor_core_instructions": len(re.findall(target.instruction, listing)),
        "assembler": ptxas.path,
        "assembler_version": ptxas.version,
    }


def _read_amd(compiled: Any, listing: str, target: Target) -> dict[str, Any]:
    return {
        "registers": _number(r"\.vgpr_count:\s*(\d+)", listing),
        "spill_bytes": _number(r"\.private_segment_fixed_size:\s*(\d+)", listing),
        "spill_stores": _number(r"\.vgpr_spill_count:\s*(\d+)", listing),
        "tensor_core_instructions": len(re.findall(target.instruction, listing)),
        "assembler": "LLVM",
        "assembler_version": f"of triton {triton.__version__}",
    }


def _read_dots(compiled: Any, target: Target) -> dict[str, Any]:
    """What became of the dots that are made for tensor cores."""
    lowered = [line for line in compiled.asm["ttgir"].splitlines() if _is_fast_type(line)]
    in_registers = r"ttng\.warp_group_dot .* : tensor<"
    return {
        "dots": sum(_is_fast_type(line) for line in compiled.asm["ttir"].splitlines()),
        "slow_dots": sum(not re.search(target.fast_dot, line) for line in lowered),
        "register_operands": sum(
            bool(re.search(in_registers, line)) for line in compiled.asm["ttgir"].splitlines()
        ),
    }


def _is_fast_type(line: str) -> bool:
    """True for a `tt.dot` tensor cores can do: any type but fp32, and fp32 unless it is ieee."""
    if not re.search(r"= tt\.dot(_scaled)? ", line):
        return False
    return "inputPrecision = " in line or not re.search(r": tensor<[\dx]+xf32[,>]", line)


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found is not None, f"no {pattern} in the compiler's output"
    return int(found.group(1))


def _kib(size: int) -> str:
    return f"{size / 1024:.0f} KB"
