"""The model that serves batch sizes an engine was not built for, after a refresh."""

import copy
from collections.abc import Iterator, Mapping

from torch import Tensor, nn


def with_weights(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """A copy of the model's modules around the tensors in `state`; the others are the model's own.

    The model itself stays as it is: it is somebody else's, and may be running.
    """
    own = dict(tensors_of(model))
    copied = copy.deepcopy(model, {id(tensor): tensor for tensor in own.values()})
    for name, old in own.items():
        if (new := state.get(name)) is not None:
            new = new.detach().to(old.device, old.dtype)
            path, _, leaf = name.rpartition(".")
            is_parameter = isinstance(old, nn.Parameter)
            tensor = nn.Parameter(new, requires_grad=False) if is_parameter else new
            setattr(copied.get_submodule(path), leaf, tensor)
    return copied


def tensors_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers under every name they have."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)
