"""Copies a model around an engine's weights, to serve batch sizes the engine was not built for."""

import copy
from collections.abc import Iterator, Mapping

from torch import Tensor, nn


def with_weights(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Returns a copy of the model whose tensors are those in `state`, and copies of the others.

    The model itself stays unchanged: the caller may be running or training it.
    """
    own = dict(tensors_of(model))
    new = {id(old): _like(old, state[name]) for name, old in own.items() if name in state}
    # Other tensors of a module may be no leaves (the old weight_norm's), which deepcopy refuses.
    others = [t for m in model.modules() for t in vars(m).values() if isinstance(t, Tensor)]
    return copy.deepcopy(model, {id(t): t.detach().clone() for t in others} | new)


def _like(old: Tensor, new: Tensor) -> Tensor:
    new = new.detach().to(old.device, old.dtype)
    return nn.Parameter(new, requires_grad=False) if isinstance(old, nn.Parameter) else new


def tensors_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yields parameters and buffers under every name they have."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)
