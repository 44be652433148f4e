"""What a network returns beside one tensor: lists, tuples and dictionaries, for runtimes that know
tensors alone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from resfuse.bench.common.errors import CannotTake


@dataclass(frozen=True)
class OutputTree:
    """The tensors of an output, and how they are put together again."""

    tensors: tuple[Tensor, ...]  # on the meta device: shapes and dtypes
    leaves: tuple[Any, ...]  # the tensors, and what else there is among them
    spec: TreeSpec

    def rebuild(self, tensors: Sequence[Tensor]) -> Any:
        """The output with these tensors instead."""
        if len(self.leaves) == 1:
            return tree_unflatten(list(tensors), self.spec)
        given = iter(tensors)
        leaves = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        return tree_unflatten(leaves, self.spec)


def output_tree(model: Callable[[Tensor], Any], example: Tensor) -> OutputTree:
    """Runs a network once, and takes its output apart.

    Raises:
        CannotTake: there is no tensor in it.
    """
    with torch.no_grad():
        found, spec = tree_flatten(model(example))
    leaves = [leaf.to("meta") if isinstance(leaf, Tensor) else leaf for leaf in found]
    tensors = tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))
    if not tensors:
        raise CannotTake("the network returns no tensor")
    return OutputTree(tensors, tuple(leaves), spec)


def require_one_tensor(model: nn.Module, example: Tensor, backend: str) -> None:
    """Raises CannotTake where a network returns anything else."""
    with torch.no_grad():
        output = model(example)
    if not isinstance(output, Tensor):
        raise CannotTake(f"{backend} is driven here with networks that return one tensor")
