"""Compiles the Triton kernels that a build is about to measure, in parallel, before any is timed.

A build tries some hundred configurations, half a second of compilation each. Their launches are
recorded on meta tensors, which differ from the real ones in the device only. Results are passed on
in Triton's cache on disk; a kernel that is in it already costs a millisecond.
"""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch

from resfuse.kernels.engine.ir.candidate import Candidate, key_of
from resfuse.kernels.engine.ir.graph import Graph, State
from resfuse.kernels.engine.runtime.executor import Executor
from resfuse.kernels.engine.tactics import TACTICS
from resfuse.kernels.engine.tactics.gpu import triton_kernels

if TYPE_CHECKING:
    from triton.backends.compiler import GPUTarget

    from resfuse.kernels.gpu.common.launch import Launch
    from resfuse.kernels.gpu.inspect.inspect import Specialized


def compile_ahead(graph: Graph, state: State, candidates: Iterable[Candidate], arch: int) -> int:
    """Compiles the kernels of `candidates` for the NVIDIA GPU `sm_<arch>`, and their launchers
    where Triton has one for each, and returns the number of launches. A failure is not reported
    here: it repeats, and is reported, when the candidate is measured."""
    found = list(launches(graph, state, candidates))
    compile_launches(found, arch)
    return len(found)


def compile_launches(found: "Iterable[Launch]", arch: int) -> None:
    """Compiles the kernels of launches, each once and those missing in Triton's cache first."""
    from triton.backends.compiler import GPUTarget

    from resfuse.kernels.engine.tuning.compile_processes import compile_in_processes

    gpu = GPUTarget("cuda", arch, 32)
    kernels: dict[str, tuple[Specialized, Launch]] = {}
    for launch in found:
        kernel = _specialize(launch, gpu)
        if kernel is not None:
            kernels.setdefault(kernel.key, (kernel, launch))
    missing = {key: both for key, both in kernels.items() if both[0].cached_metadata() is None}
    compile_in_processes([launch for _, launch in missing.values()], arch, cores())
    for workers in (cores(), 1):  # what failed beside others is tried once more, alone
        _side_by_side(lambda key: _compile(missing[key][0]), missing, workers)
    _build_launchers(kernel for kernel, _ in kernels.values())


def cores() -> int:
    """Returns the number of CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def launches(graph: Graph, state: State, candidates: Iterable[Candidate]) -> "Iterator[Launch]":
    """Yields the launches of the candidates on meta tensors, once for equal parts of the graph."""
    shapes = {name: tensor.to("meta") for name, tensor in state.items()}
    seen = set()
    for candidate in candidates:
        part = graph.part(candidate.start, candidate.stop)
        key = key_of(part), candidate.label()
        if is_triton(candidate) and key not in seen:
            seen.add(key)
            yield from _launches(part, candidate.at_start(), shapes)


def is_triton(candidate: Candidate) -> bool:
    """Returns whether Triton kernels compute a candidate."""
    return hasattr(TACTICS[candidate.tactic].load(), "configuration")


def _launches(part: Graph, candidate: Candidate, shapes: State) -> "list[Launch]":
    values = (part.values[name] for name in part.reads)
    inputs = [torch.empty(v.shape, dtype=v.dtype, device="meta") for v in values]
    with triton_kernels.written_down() as found:
        try:
            Executor(part, [candidate], shapes)(*inputs)
        except (RuntimeError, ValueError):  # reported when it is measured
            return []
    return found


def _specialize(launch: "Launch", gpu: "GPUTarget") -> "Specialized | None":
    from resfuse.kernels.gpu.inspect.inspect import specialize

    try:
        kernel = specialize(launch, gpu)
        return kernel if kernel.key else None
    except Exception:  # Triton may raise anything
        return None


def _compile(kernel: "Specialized") -> None:
    """Compiles a kernel unless a process has already done so."""
    if kernel.cached_metadata() is None:
        kernel.compile()


def _build_launchers(kernels: "Iterable[Specialized]") -> None:
    """Compiles the C launchers of Triton 3.6 (c_launchers.py), each once."""
    from resfuse.kernels.gpu.common import c_launchers

    sources = set()
    for kernel in kernels:
        metadata = kernel.cached_metadata()  # None where it does not compile
        if metadata is not None:
            source = c_launchers.source_of(kernel.source, SimpleNamespace(**metadata))
            if source is None:
                return  # this Triton has one launcher for all kernels
            sources.add(source)
    _side_by_side(c_launchers.build_ahead, sources, cores())


def _side_by_side(work: Callable[[str], object], keys: Iterable[str], workers: int) -> None:
    """Runs `work` on all keys by threads: Triton's passes, ptxas and gcc release Python's lock."""

    def attempt(key: str) -> None:
        with contextlib.suppress(Exception):  # a compiler may raise anything
            work(key)

    with ThreadPoolExecutor(workers) as threads:
        for key in keys:
            threads.submit(attempt, key)
