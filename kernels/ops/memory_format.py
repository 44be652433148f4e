"""Memory formats of whole models."""

import torch
from torch import nn


def to_memory_format(model: nn.Module, memory_format: torch.memory_format) -> nn.Module:
    """Lays out a model's parameters and buffers of four dimensions in a memory format, in place.

    `model.to(memory_format=torch.channels_last)` raises where one has five (a Conv3d's weight).
    """
    model._apply(lambda t: t.to(memory_format=memory_format) if t.dim() == 4 else t)
    return model
