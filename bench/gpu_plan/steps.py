"""STEPS: what the plan measures, in order. Each stands for command lines of `resfuse`.

fp8 is left out: nothing here computes in it yet. Energy, clocks and throttling are columns of every
row. Bounds are for a whole of BUDGET_S and grow with it; about 20 s of each case on an H200 are
imports, photographs and the fp64 reference.
"""

from dataclasses import dataclass

BUDGET_S = 540.0


@dataclass(frozen=True)
class Step:
    """`commands`: what to run, in order; none for what every command begins with."""

    name: str
    measures: str
    bound_s: float
    commands: tuple[str, ...]


_TURNS = "--memory-format channels_last --baseline-memory-format channels_last"
_ONNX = "--backend onnxrt --memory-format contiguous --baseline-memory-format channels_last"
_HEADLINE = "bench -m resnet50 --precision float16 --seconds 2"
_DEPTH = (
    "bench -m resnet18,resnet34,resnet101,resnet152,resnext50_32x4d,wide_resnet50_2 --seconds 1"
)

STEPS: tuple[Step, ...] = (
    Step("facts", "device, driver, versions; ceilings of copying and multiplying", 30, ()),
    Step("kernels", "every configuration of every kernel against fp64", 80, ("check",)),
    Step(
        "headline",
        "ResNet-50 in fp16, each beside eager channels_last in turns",
        170,
        (
            f"{_HEADLINE} -b 256 --backend eager,engine,fused,cudnn_fused {_TURNS}",
            f"{_HEADLINE} -b 1 --backend eager,engine,fused,cudnn_fused {_TURNS}",
            f"{_HEADLINE} -b 256,1 {_ONNX}",
        ),
    ),
    Step(
        "explain",
        "where the engine's time goes, a line a segment with its share of the floor",
        30,
        ("engine resnet50 -b 256 --precision float16", "engine resnet50 -b 1 --precision float16"),
    ),
    Step(
        "compiled",
        "the same headline for torch.compile, max-autotune and frozen, which tunes for minutes",
        110,
        (f"{_HEADLINE} -b 256,1 --backend compiled_max_autotune {_TURNS}",),
    ),
    Step(
        "depth",
        "other depths and widths, in fp16 and then bf16",
        60,
        (
            *(
                f"{_DEPTH} -b {batch} --precision {precision} "
                f"--backend engine,fused,cudnn_fused {_TURNS}"
                for precision in ("float16", "bfloat16")
                for batch in (256, 1, 32)
            ),
            f"{_DEPTH} -b 256,1,32 --precision float16 {_ONNX}",
            f"{_DEPTH} -b 256,1,32 --precision float16 --backend compiled {_TURNS}",
        ),
    ),
    Step(
        "training",
        "a training step of ResNet-50 under autocast to bf16; peak memory",
        60,
        (
            "bench -m resnet50 -b 256 --precision amp_bf16 --bench train --seconds 2 "
            f"--backend eager,compiled,fused {_TURNS}",
        ),
    ),
)
