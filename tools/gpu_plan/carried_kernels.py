"""Compiles for a GPU that is not here all that an engine's build measures and `fused` launches, or
counts what of it is missing: a program of its own, as kernels are compiled with Triton's cache and
ptxas as they are when it is imported.

    python -m resfuse.tools.gpu_plan.carried_kernels build|count resnet50:256:float16 ...

Its last line on stdout is JSON: the fields of Made.
"""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from resfuse.kernels.engine.frontend.export import capture
from resfuse.kernels.engine.quantization.quantized_graph import unseen_int8
from resfuse.kernels.engine.tactics import tactics_for
from resfuse.kernels.engine.tuning.compile_ahead import compile_launches, launches
from resfuse.kernels.fusion.fuse import fuse
from resfuse.kernels.gpu.common import c_launchers
from resfuse.kernels.gpu.common import launch as launch_module
from resfuse.kernels.gpu.common.launch import Launch
from resfuse.kernels.gpu.common.stand_in_driver import StandInDriver, stand_in
from resfuse.resnet_ref import create, input_size
from resfuse.tools.gpu_plan.carried_manifest import Wanted, facts_here

ARCH = 90  # an H100's or H200's


@dataclass
class Made:
    """What came of it, and what `compiled` and `launchers_missing` say of Triton's cache as it was
    when the launches were made.

    files: of Triton's cache, from its root: all that the launches need.
    failed: a launch that does not compile, or does not fit the GPU, as it will there.
    """

    facts: dict[str, Any]
    launches: int = 0
    kernels: int = 0
    compiled: int = 0
    launchers: int = 0
    launchers_missing: int = 0
    files: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)


def build(wanted: Sequence[Wanted]) -> Made:
    """Compiles kernels and launchers into Triton's cache, side by side; then launches each under a
    stand-in driver, so that what Triton's own launches need is known to be there."""
    found = [launch for one in wanted for launch in engine_launches(one)]
    say(f"{len(found)} launches of the engine; compiling what Triton's cache does not have")
    compile_launches(found, ARCH)
    return _launched(found, wanted, builds=True)


def count(wanted: Sequence[Wanted]) -> Made:
    """Launches the same; what is missing is compiled on the way, one by one, and counted."""
    found = [launch for one in wanted for launch in engine_launches(one)]
    return _launched(found, wanted, builds=False)


def engine_launches(one: Wanted) -> Iterator[Launch]:
    """Lists what an engine's build would measure but for chunks, whose batch sizes are others."""
    in_int8 = one.dtype == "int8"
    dtype = torch.float32 if in_int8 else getattr(torch, one.dtype)
    model = create(one.model, device="meta").eval().to(dtype)
    images = torch.empty(_shape(one), dtype=dtype, device="meta")
    graph, state = capture(model, images)
    if in_int8:
        graph, corrections = unseen_int8(graph, state)
        state = {**state, **corrections}
    tactics = tactics_for("cuda").values()
    offered = (c for at in range(len(graph.nodes)) for t in tactics for c in t.segments(graph, at))
    return launches(graph, state, offered)


def run_fused(one: Wanted) -> None:
    """A forward of the fused network, on CPU tensors that pass for a GPU's: every kernel goes to
    the driver. Their memory is reserved, not written."""
    dtype = getattr(torch, one.dtype)
    network = fuse(create(one.model).eval().to(dtype), inplace=True)
    images = torch.empty(_shape(one), dtype=dtype, memory_format=torch.channels_last)
    with torch.inference_mode(), _on_gpu(), patch.object(launch_module, "interpreting", _yes):
        network(images)


def _shape(one: Wanted) -> tuple[int, int, int, int]:
    size = input_size(one.model)
    return one.batch_size, 3, size, size


@contextmanager
def _on_gpu() -> Iterator[None]:
    """Within it every tensor says that it is on a GPU. A TorchFunctionMode would say so, too, but
    fused layers leave the work to the original ones where there is one."""
    with (
        patch.object(Tensor, "is_cuda", property(lambda self: True)),
        patch.object(Tensor, "is_cpu", property(lambda self: False)),
    ):
        yield


def _yes() -> bool:
    return True


def _launched(found: Sequence[Launch], wanted: Sequence[Wanted], *, builds: bool) -> Made:
    """Lists the launches of the engine and of `fused`, under a stand-in driver."""
    made = Made(asdict(facts_here(ARCH)))
    with stand_in(ARCH, keeps_launches=False) as driver:
        for launch in found:
            made.failed += _errors_of(launch.kernel.__name__, launch.run)
        for one in wanted:
            if one.dtype == "int8":
                continue  # `fuse` has none
            before = driver.launches
            made.failed += _errors_of(f"fused {one}", partial(run_fused, one))
            say(f"fused {one}: {driver.launches - before} launches")
            if driver.launches == before:
                made.failed.append(f"fused {one}: it launched no kernel")
        made.launches = driver.launches
        made.kernels = len(set(driver.folders))
        made.compiled = len(driver.compiled)
        made.launchers = len(driver.launchers)
        made.launchers_missing = len(driver.launchers_missing)
    if builds:
        for source in driver.launchers:
            c_launchers.build_ahead(source)
        c_launchers.build_driver_ahead()
        made.files = sorted(_files(driver))
    return made


def _errors_of(what: str, run: Callable[[], object]) -> list[str]:
    """Why it failed, if it did: on the GPU it will fail again, and be reported there."""
    try:
        run()
    except Exception as error:  # a compiler may raise anything
        first = (str(error).strip().splitlines() or [""])[0]
        return [f"{what}: {type(error).__name__}: {first}"]
    return []


def _files(driver: StandInDriver) -> Iterator[str]:
    """Lists the files that a launch reads; the stages between source and cubin stay behind."""
    for folder in set(driver.folders):
        yield from (
            f"{folder.name}/{path.name}"
            for path in folder.iterdir()
            if path.suffix in (".cubin", ".json")
        )
    for library in (*map(c_launchers.cached, driver.launchers), c_launchers.cached_driver()):
        if library is not None:
            yield f"{library.parent.name}/{library.name}"


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(arguments: Sequence[str]) -> None:
    wanted = [Wanted.parse(text) for text in arguments[1:]]
    made = {"build": build, "count": count}[arguments[0]](wanted)
    print(json.dumps(asdict(made)))


if __name__ == "__main__":
    main(sys.argv[1:])
