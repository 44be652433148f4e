"""Loops that are to be pipelined are: what a build for an H200 would measure holds in shared memory
as many stages of its tiles as it was asked for. Triton says nothing where it pipelines none.

It needs no GPU, but a process that does not interpret kernels, so this file is imported once more
in a subprocess.
"""

import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn
from triton.backends.compiler import GPUTarget

from resfuse.kernels.engine.frontend.export import capture
from resfuse.kernels.engine.ir.graph import Graph, State
from resfuse.kernels.engine.tactics import TACTICS
from resfuse.kernels.engine.tactics.gpu import triton_conv
from resfuse.kernels.engine.tuning.compile_ahead import launches
from resfuse.kernels.gpu.common.launch import Launch
from resfuse.kernels.gpu.conv.conv_config import Config
from resfuse.kernels.gpu.inspect.inspect import compile_launch
from resfuse.resnet_ref import create

pytestmark = pytest.mark.slow

# Tactics whose kernels have a pipelined loop, and how many of its different tiles are compiled:
# some 2 s each. A tail's loops and operands are of several kinds, and inspect.py looks after them.
SAMPLE = {"triton_conv": 8, "triton_conv1x1": 8, "projection": 2, "split_k": 4}
GPU = GPUTarget("cuda", 90, 32)


@functools.cache
def captured(batch: int) -> tuple[Graph, State]:
    model = create("resnet50", device="meta").eval().half()
    return capture(model, torch.empty(batch, 3, 224, 224, dtype=torch.float16, device="meta"))


def offered(batch: int, tactic: str) -> list[Launch]:
    """What the tactic would launch for ResNet-50 in fp16, one launch for each tile."""
    graph, state = captured(batch)
    return list({_tile(at): at for at in _launches(graph, state, tactic)}.values())


def stem_as_an_implicit_gemm() -> Launch:
    """Of three channels a step: what triton_conv does not offer."""
    model = nn.Conv2d(3, 64, 7, 2, 3, device="meta").eval().half()
    x = torch.empty(256, 3, 224, 224, dtype=torch.float16, device="meta")
    graph, state = capture(model, x)
    tile = Config(128, 64, 64, num_warps=4, num_stages=3, loop="flat")
    (launch,) = launches(graph, state, [triton_conv._candidate(0, "implicit_gemm", tile)])
    return launch


def _launches(graph: Graph, state: State, tactic: str) -> Iterator[Launch]:
    module = TACTICS[tactic].load()
    for at in range(len(graph.nodes)):
        yield from launches(graph, state, module.segments(graph, at))


def _tile(launch: Launch) -> str:
    blocks = {name: value for name, value in launch.constants.items() if name != "ACTIVATION"}
    tile = {name: value for name, value in blocks.items() if name.startswith("BLOCK_")}
    loop = blocks.get("LOOP"), blocks.get("DESCRIPTORS")
    return repr((launch.kernel.__name__, tile, loop, launch.num_warps, launch.num_stages))


def shared_of_a_sample() -> list[tuple[str, int, int]]:
    """The launch, bytes of shared memory, and of its stages: of the sample, then of a stem."""
    sample: list[Launch] = []
    for tactic, most in SAMPLE.items():
        found = offered(1 if tactic == "split_k" else 256, tactic)
        sample += found[:: -(-len(found) // most)]
    sample.append(stem_as_an_implicit_gemm())
    with ThreadPoolExecutor(2) as threads:
        shared = threads.map(lambda at: int(compile_launch(at, GPU).metadata.shared), sample)
        return [(_tile(at), got, stages_bytes(at)) for at, got in zip(sample, shared, strict=True)]


def stages_bytes(launch: Launch) -> int:
    m, n, k = (launch.constants[f"BLOCK_{side}"] for side in "MNK")
    return int(launch.num_stages * (m + n) * k * 2)


def test_every_pipelined_candidate_holds_its_stages() -> None:
    paths = [
        *(str(Path(__file__).parents[2] / f) for f in ("helpers", "helpers/networks")),
        str(Path(__file__).parent),
        os.environ.get("PYTHONPATH", ""),
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    environment.pop("TRITON_INTERPRET", None)
    script = "import json, test_engine_pipelines as t; print(json.dumps(t.shared_of_a_sample()))"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment, capture_output=True, text=True, timeout=1800,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    *found, (_, shared, meant) = json.loads(done.stdout.splitlines()[-1])
    assert shared < meant  # three channels come without a pipeline
    assert 12 <= len(found) <= sum(SAMPLE.values())
    kernels = ("conv_kernel", "conv1x1_kernel", "split_k_kernel")
    assert all(any(f"'{name}'" in tile for tile, *_ in found) for name in kernels)
    wrong = [f"{tile}: {got} bytes, {meant} meant" for tile, got, meant in found if got < meant]
    assert not wrong, "\n".join(wrong)
