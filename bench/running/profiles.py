"""PROFILES: ready-made sweeps by size and device; GPU batch sizes are hopeless on a CPU."""

from dataclasses import dataclass

DEPTHS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
RELATIVES = ("resnext50_32x4d", "wide_resnet50_2", "vgg19_bn")
SMALL = ("cifar_resnet20", "cifar_resnet56", "cifar_resnet110")
EVERYWHERE = (
    "eager",
    "compiled",
    "fused",
    "cudnn_fused",
    "onnxrt",
    "onnxrt_tensorrt",
    "openvino",
    "tensorrt",
)
# The same for a CPU: what runs there, ours last.
ON_A_CPU = ("eager", "compiled", "onnxrt", "openvino", "fused", "engine")
LEAST_S = 5.0  # about what the subprocess of a case needs to import torch


@dataclass(frozen=True)
class Profile:
    models: tuple[str, ...]  # names or wildcards
    backends: tuple[str, ...]
    batch_sizes: tuple[int, ...]
    precisions: tuple[str, ...]
    seconds: float  # timed seconds a case
    does: str
    # Each backend in channels_last alone, where it takes that; eager in both.
    is_fastest_format_only: bool = False


PROFILES: dict[tuple[str, str], Profile] = {
    ("quick", "cpu"): Profile(
        ("resnet18", "resnet50"),
        ON_A_CPU,
        (1, 8),
        ("float32",),
        2.0,
        "two networks, some minutes",
        is_fastest_format_only=True,
    ),
    ("core", "cpu"): Profile(
        DEPTHS,
        ON_A_CPU,
        (1, 8),
        ("float32",),
        5.0,
        "depth scaling, 18 to 152, half an hour",
        is_fastest_format_only=True,
    ),
    ("full", "cpu"): Profile(
        (*DEPTHS, *RELATIVES, *SMALL),
        ("*",),
        (1, 8, 32),
        ("float32", "bf16"),
        10.0,
        "families and precisions, some hours",
    ),
    ("quick", "cuda"): Profile(
        ("resnet18", "resnet50"),
        EVERYWHERE,
        (1, 256),
        ("float16",),
        2.0,
        "two networks, some minutes",
    ),
    ("core", "cuda"): Profile(
        DEPTHS, ("*",), (1, 32, 256), ("float16",), 2.0, "depth scaling, 18 to 152"
    ),
    ("full", "cuda"): Profile(
        (*DEPTHS, *RELATIVES, *SMALL),
        ("*",),
        (1, 32, 256),
        ("float32", "tf32", "float16", "bfloat16"),
        4.0,
        "families and precisions",
    ),
}
NAMES = ("quick", "core", "full")
