"""torch_tensorrt, ahead of time, for one shape; the `tensorrt` extra installs it."""

import importlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from resfuse.bench.common.errors import Unavailable


def require(device: torch.device) -> None:
    """Raises Unavailable without a CUDA device, ModuleNotFoundError without torch_tensorrt."""
    if device.type != "cuda":
        raise Unavailable("TensorRT needs an NVIDIA GPU")
    importlib.import_module("torch_tensorrt")


def build(model: nn.Module, example: Tensor) -> Callable[[Tensor], Tensor]:
    """Compiles for the example's shape and precision only: no silent fallback to fp16.

    Raises:
        Unavailable: no CUDA device, or torch_tensorrt is not installed.
    """
    require(example.device)
    import torch_tensorrt

    from resfuse.bench.common.precision import tf32_allowed

    compiled = torch_tensorrt.compile(
        model,
        ir="dynamo",
        inputs=[example],
        enabled_precisions={example.dtype},
        disable_tf32=not tf32_allowed(),
    )

    @torch.inference_mode()
    def run(images: Tensor) -> Tensor:
        logits: Tensor = compiled(images)
        return logits

    return run
