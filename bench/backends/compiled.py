"""torch.compile as documented: frozen for inference, compiled for the one shape in use."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def build(model: nn.Module, example: Tensor) -> Callable[[Tensor], Tensor]:
    """Default mode: inductor folds batch norm into the convolutions and prepacks weights."""
    return _frozen(model, "default")


def build_max_autotune(model: nn.Module, example: Tensor) -> Callable[[Tensor], Tensor]:
    """Frozen, in mode max-autotune: measured kernel choices, and CUDA graphs on a GPU."""
    return _frozen(model, "max-autotune")


def trainable(model: nn.Module, example: Tensor) -> nn.Module:
    return _compiled(model, {})


def trainable_max_autotune(model: nn.Module, example: Tensor) -> nn.Module:
    return _compiled(model, torch._inductor.list_mode_options("max-autotune"))


def _frozen(model: nn.Module, mode: str) -> Callable[[Tensor], Tensor]:
    compiled = _compiled(model, {**torch._inductor.list_mode_options(mode), "freezing": True})

    @torch.no_grad()  # not inference_mode: freezing needs tensors whose versions it can track
    def run(images: Tensor) -> Tensor:
        return compiled(images)

    return run


def _compiled(model: nn.Module, options: dict[str, Any]) -> nn.Module:
    # A mode and an option cannot be given together: a mode is a set of options, and here it is one.
    module = torch.compile(model, dynamic=False, options=options)
    assert isinstance(module, nn.Module)
    return module
