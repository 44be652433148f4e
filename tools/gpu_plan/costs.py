"""COSTS: what a case takes on an H200, in seconds. Data; the sources stand beside the numbers.

From the rows of 28 November 2026 on that machine (torch 2.11, triton 3.6): a case at batch 256 is
10 s old when its answer is first checked (imports, photographs, the fp64 reference of 768 images),
and 17 s old when it has passed with `--seconds 2`. What a build adds was counted without a GPU, by
the same day's audit: launches, kernels to compile, candidates to check and time at 40 to 80 ms.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from resfuse.bench.records.case import Case


@dataclass(frozen=True)
class Cost:
    """`expected_s`: with the kernels' cache carried along. A case is not begun with less, and is a
    `timeout` after `bound_s`: without the cache an engine takes that long."""

    expected_s: float
    bound_s: float


ONE, MANY = 1, 256
ENGINE_BESIDE_CUDNN = "engine beside cudnn_fused"  # in one process, from a warm timing cache
ENGINE_IN_INT8 = "engine in int8"
# Milliseconds of ResNet-50 that tools/h200_budget.py predicts, which takes torch to work out: the
# best peer and our plan in fp16, and our plan in int8.
PREDICTED_MS: Mapping[tuple[str, int], float] = {
    ("peer", MANY): 5.33,
    ("fp16", MANY): 4.84,
    ("int8", MANY): 3.44,
    ("fp16", ONE): 0.234,
    ("int8", ONE): 0.282,
}
COSTS: Mapping[tuple[str, int], Cost] = {
    ("eager", ONE): Cost(15, 60),
    ("eager", MANY): Cost(17, 60),
    # 53 convolution plans by heuristics; one graph.
    ("cudnn_fused", ONE): Cost(18, 60),
    ("cudnn_fused", MANY): Cost(18, 60),
    # 674 candidates, 490 kernels: 80 to 110 s where they must be compiled.
    ("engine", ONE): Cost(40, 150),
    # 551 candidates, 418 kernels: 105 to 200 s with compilation and chunks.
    ("engine", MANY): Cost(60, 200),
    # Export, launchers, capture; every choice is known. The interval asks for a few seconds more.
    (ENGINE_BESIDE_CUDNN, ONE): Cost(30, 90),
    (ENGINE_BESIDE_CUDNN, MANY): Cost(35, 90),
    # Some 330 and 400 candidates; ranges from 64 photographs and the errors of layers, on the CPU.
    (ENGINE_IN_INT8, ONE): Cost(55, 180),
    (ENGINE_IN_INT8, MANY): Cost(75, 220),
    # 21 and 22 kernels, compiled in line: 40 and 45 s without the cache.
    ("fused", ONE): Cost(18, 70),
    ("fused", MANY): Cost(22, 75),
    ("compiled", ONE): Cost(45, 110),
    ("compiled", MANY): Cost(45, 110),
    # Some 400 Triton kernels, and their benchmarks: 150 to 200 s a batch size.
    ("compiled_max_autotune", ONE): Cost(150, 240),
    ("compiled_max_autotune", MANY): Cost(150, 240),
    # The provider is missing on that machine, which the survey says; with it an exhaustive search.
    ("onnxrt", ONE): Cost(30, 90),
    ("onnxrt", MANY): Cost(40, 120),
}
# Of ResNet-50's, by what is to be compiled and timed: ResNet-18 has 666 launches for 1,113,
# ResNeXt-50 353 for 495 at batch 256; deeper networks repeat their shapes.
NETWORKS: Mapping[str, float] = {
    "resnet18": 0.7, "resnet34": 0.8, "resnet101": 1.15, "resnet152": 1.3, "wide_resnet50_2": 1.2,
}  # fmt: skip
TRAINING = Cost(45, 120)  # eager, compiled or fused: three kinds of step, two graphs compiled
# What these have done before they are cut off is kept (measured times, compiled kernels), so that
# what is left over is well spent on them.
KEPT = ("engine", "compiled", "compiled_max_autotune")
KEPT_S = 30.0


def cost(case: Case) -> Cost:
    """Returns what a case takes; one that is not in the table, as much as the nearest that is."""
    size = MANY if case.batch_size >= 32 else ONE
    if case.mode == "train":
        return TRAINING
    beside = (case.backend, case.baseline) == ("engine", "cudnn_fused")
    name = ENGINE_BESIDE_CUDNN if beside else case.backend
    if case.backend == "engine" and case.precision == "int8":
        name = ENGINE_IN_INT8
    found = COSTS.get((name, size), COSTS["compiled", size])
    factor = NETWORKS.get(case.model, 1.0)
    return Cost(found.expected_s * factor, found.bound_s * max(1.0, factor))
