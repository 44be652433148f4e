"""Builds a module from given layers and a given forward, without a class for each."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class Scope(nn.Module):
    """A module around one function of its layers, for forwards of every shape."""

    def __init__(self, forward: Callable[[Any, Tensor], Any], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.function = forward

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)
