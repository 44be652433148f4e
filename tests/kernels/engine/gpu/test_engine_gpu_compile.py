"""Every kernel of a plan for an H200, compiled for one: it needs no GPU, but a process that does
not interpret kernels, so this file is imported once more in a subprocess.
"""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision

from resfuse.kernels.engine import predict
from resfuse.kernels.engine.frontend.export import capture
from resfuse.kernels.engine.quantization.quantized_graph import unseen_int8
from resfuse.kernels.engine.runtime.executor import Executor
from resfuse.kernels.engine.tactics.gpu import triton_kernels
from resfuse.kernels.gpu.common.launch import Launch
from resfuse.kernels.gpu.inspect.inspect import (
    Inspection,
    has_risky_operands,
    inspect_launches,
    problems,
)
from resfuse.kernels.gpu.inspect.ptxas import sound_path

pytestmark = pytest.mark.slow

# Those of our own kernels that plan all of ResNet-50: big batches in chains, small ones split.
PLANS = {
    256: ("stem", "triton_conv", "triton_conv1x1", "projection", "block_tail", "eager"),
    1: ("stem", "split_k", "triton_conv1x1", "eager"),
}


IN_INT8 = ("int8", "int8_maps")


def compile_plans() -> list[dict]:
    """An Inspection of each distinct launch, by a run of each plan on the meta device."""
    launches: dict[str, tuple[str, str, Launch, str]] = {}

    def collect(label: str) -> Callable[[Launch], None]:
        def instead(launch: Launch) -> None:
            key = repr((launch.kernel.__name__, launch.constants, launch.num_warps))
            launches.setdefault(key, (launch.kernel.__name__, label, launch, "sm_90"))

        return instead

    for n, tactics in PLANS.items():
        triton_kernels.run = collect(f"batch {n}")
        with torch.device("meta"):
            model = torchvision.models.resnet50(weights=None).eval().half()
            x = torch.empty(n, 3, 224, 224, dtype=torch.float16)
            plan = predict.plan_for(model, x, tactics=tactics)
            _, state = capture(model, x)
            candidates = [segment.candidate for segment in plan.segments]
            assert {candidate.tactic for candidate in candidates} == set(tactics)
            (y,) = Executor(plan.graph, candidates, state)(x)
            assert y.shape == (n, 1000)
    for n in PLANS:
        triton_kernels.run = collect(f"int8, batch {n}")
        with torch.device("meta"):
            model = torchvision.models.resnet50(weights=None).eval()
            x = torch.empty(n, 3, 224, 224)
            plan = predict.plan_for(model, x, tactics=IN_INT8, precision="int8")
            graph, state = capture(model, x)
            _, corrections = unseen_int8(graph, state)
            candidates = [segment.candidate for segment in plan.segments]
            (y,) = Executor(plan.graph, candidates, {**state, **corrections})(x)
            assert y.shape == (n, 1000) and y.dtype == torch.float32
    made = inspect_launches(list(launches.values()))
    return [dataclasses.asdict(inspection) for inspection in made]


def test_the_kernels_of_a_plan_compile_for_the_gpu_it_is_for() -> None:
    """Assembled by a sound ptxas, if Triton brings one: as block_tail's refusal asks for."""
    paths = [
        *(str(Path(__file__).parents[3] / f) for f in ("helpers", "helpers/networks")),
        str(Path(__file__).parent),
        os.environ.get("PYTHONPATH", ""),
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    environment.pop("TRITON_INTERPRET", None)
    if sound := sound_path():
        environment["TRITON_PTXAS_PATH"] = sound
    script = "import json, test_engine_gpu_compile as t; print(json.dumps(t.compile_plans()))"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment, capture_output=True, text=True, timeout=1800,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    results = [Inspection(**row) for row in json.loads(done.stdout.splitlines()[-1])]
    assert {result.kernel for result in results} == {
        "stem_kernel", "conv_kernel", "conv1x1_kernel", "split_k_kernel", "_block_tail_kernel",
        "conv_int8_kernel", "conv1x1_int8_kernel", "convert_int8_kernel", "pool_int8_kernel"
    }  # fmt: skip
    assert [(r.kernel, said) for r in results for said in problems(r)] == []
    if sound:
        assert not any(has_risky_operands(result) for result in results)
