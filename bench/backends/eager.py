"""torch as it comes: the module itself. `channels_last` is an axis of the sweep."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from resfuse.bench.backends.streams import CallerStreams, Streams


def build(model: nn.Module, example: Tensor) -> Callable[[Tensor], Tensor]:
    """Returns the model in eval mode under inference_mode."""

    @torch.inference_mode()
    def run(images: Tensor) -> Tensor:
        logits: Tensor = model(images)
        return logits

    return run


def streams(model: nn.Module, example: Tensor, cores: int) -> Streams:
    """All call one module."""
    return CallerStreams([build(model, example)] * cores)


def trainable(model: nn.Module, example: Tensor) -> nn.Module:
    return model
