"""PROVIDERS: every way to compute one convolution with bias and ReLU.

The contract is a backend's: `build(layer, example) -> run` does everything that happens once,
`run(x)` is what gets timed, and what cannot run here raises `Unavailable` with the reason.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from resfuse.bench.backends import load
from resfuse.bench.common.selection import pick

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from resfuse.bench.backends.providers.layer import ConvRelu

    Run = Callable[[Tensor], Tensor]
    Build = Callable[[ConvRelu, Tensor], Run]


@dataclass(frozen=True)
class Provider:
    build: str  # "module:function"
    does: str  # for `resfuse list`
    memory_format: str  # of x; y may have another
    # (backend, memory format) that runs a whole network this way; None where there is none
    whole: tuple[str, str] | None = None


PROVIDERS: dict[str, Provider] = {
    "eager": Provider(
        "resfuse.bench.backends.eager:build",
        "conv2d with folded bias, relu_; what the others are compared with",
        "contiguous",
        ("eager", "contiguous"),
    ),
    "eager_channels_last": Provider(
        "resfuse.bench.backends.eager:build",
        "the same in channels_last",
        "channels_last",
        ("eager", "channels_last"),
    ),
    "compiled": Provider(
        "resfuse.bench.backends.compiled:build",
        "torch.compile of that one layer, weights frozen",
        "channels_last",
        ("compiled", "channels_last"),
    ),
    "fused": Provider(
        "resfuse.bench.backends.providers.fused_layer:build",
        "our conv_bn_act kernel; on a CPU our native step, or oneDNN where there is none",
        "channels_last",
        ("fused", "channels_last"),
    ),
    "onednn": Provider(
        "resfuse.bench.backends.providers.fused_layer:build_onednn",
        "oneDNN's fused convolution, weight prepacked; CPU",
        "channels_last",
    ),
    "fused_conv1x1": Provider(
        "resfuse.bench.backends.providers.fused_layer:build_conv1x1",
        "our kernel for 1x1 convolutions; CUDA",
        "channels_last",
    ),
    "fused_split_k": Provider(
        "resfuse.bench.backends.providers.fused_layer:build_split_k",
        "our split-K kernel for small batches; CUDA",
        "channels_last",
    ),
    "cudnn": Provider(
        "resfuse.bench.backends.providers.cudnn_layer:build",
        "cuDNN's convolution + bias + ReLU by torch's fastest right op; CUDA",
        "channels_last",
        ("cudnn_fused", "channels_last"),
    ),
}
BASELINE = "eager"


def load_provider(name: str) -> "Build":
    """Raises UsageError for an unknown name, Unavailable where a package is missing."""
    build: Build = load(PROVIDERS[pick("--providers", [name], list(PROVIDERS))[0]].build)
    return build
