"""Compiles what a build is about to measure, side by side, before anything is timed.

A build tries some hundred configurations of Triton kernels, about a second of compilation each.
Their launches are written down on meta tensors, which differ from the real ones in nothing but the
device, and compiled by threads: Triton's passes and ptxas let go of Python's lock. Triton's cache
on disk hands the results over.
"""

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch

from resfuse.kernels.engine.choice import Choice, key_of
from resfuse.kernels.engine.executor import Executor
from resfuse.kernels.engine.graph import Graph, State
from resfuse.kernels.engine.tactics import TACTICS, triton_kernels

if TYPE_CHECKING:
    from triton.backends.compiler import GPUTarget

    from resfuse.kernels.launch import Launch


def compile_ahead(graph: Graph, state: State, choices: Iterable[Choice], arch: int) -> int:
    """Compiles the kernels of `choices` for the NVIDIA GPU `sm_<arch>`; returns how many launches
    that were. What fails here fails again, and is reported, where it is to be measured."""
    from triton.backends.compiler import GPUTarget

    gpu = GPUTarget("cuda", arch, 32)
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        done = [threads.submit(_compile, launch, gpu) for launch in launches(graph, state, choices)]
    return len(done)


def launches(graph: Graph, state: State, choices: Iterable[Choice]) -> "Iterator[Launch]":
    """What the choices would launch, on meta tensors; of equal parts of the graph once."""
    shapes = {name: tensor.to("meta") for name, tensor in state.items()}
    seen = set()
    for choice in choices:
        part = graph.part(choice.start, choice.stop)
        key = key_of(part), choice.label()
        if is_triton(choice) and key not in seen:
            seen.add(key)
            yield from _launches(part, choice.at_start(), shapes)


def is_triton(choice: Choice) -> bool:
    """Whether kernels of ours compute it."""
    return hasattr(TACTICS[choice.tactic].load(), "configuration")


def _launches(part: Graph, choice: Choice, shapes: State) -> "list[Launch]":
    values = (part.values[name] for name in part.reads)
    inputs = [torch.empty(v.shape, dtype=v.dtype, device="meta") for v in values]
    with triton_kernels.written_down() as found:
        try:
            Executor(part, [choice], shapes)(*inputs)
        except (RuntimeError, ValueError):  # it will be said where it is measured
            return []
    return found


def _compile(launch: "Launch", gpu: "GPUTarget") -> None:
    from resfuse.kernels.inspect import compile_launch

    try:
        compile_launch(launch, gpu)
    except Exception:  # a compiler may raise anything
        return
