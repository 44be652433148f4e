"""The model that serves batch sizes an engine was not built for, with the engine's weights."""

import copy
from collections.abc import Iterator, Mapping

from torch import Tensor, nn


def with_weights(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """A copy of the model's modules around the tensors in `state`, and copies of the others.

    The model itself stays as it is: it is somebody else's, and may be running or training.
    """
    own = dict(tensors_of(model))
    new = {id(old): _like(old, state[name]) for name, old in own.items() if name in state}
    # what a module has beside those, as the old weight_norm does, may be no leaf: deepcopy refuses
    beside = [t for m in model.modules() for t in vars(m).values() if isinstance(t, Tensor)]
    return copy.deepcopy(model, {id(t): t.detach().clone() for t in beside} | new)


def _like(old: Tensor, new: Tensor) -> Tensor:
    new = new.detach().to(old.device, old.dtype)
    return nn.Parameter(new, requires_grad=False) if isinstance(old, nn.Parameter) else new


def tensors_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers under every name they have."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)
