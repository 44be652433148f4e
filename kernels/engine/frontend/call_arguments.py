"""Arguments of ATen operations, as the functions that add them read them."""

from typing import Any

import torch.fx as fx

from resfuse.kernels.engine.frontend.graph_builder import Captured


def arguments(node: fx.Node) -> tuple[Any, ...]:
    """Returns a node's positional arguments, whose type in fx is a union of a dozen members."""
    return node.args


def with_defaults(node: fx.Node, defaults: tuple[Any, ...]) -> tuple[Any, ...]:
    """Returns the arguments by position, the last ones filled up from `defaults`."""
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    given = list(node.args) + [node.kwargs[n] for n in names[len(node.args) :] if n in node.kwargs]
    return (*given, *defaults[len(defaults) - (len(names) - len(given)) :])


def keeps(read: Captured, node: fx.Node, x: Any) -> bool:
    """Returns whether a node makes of maps or pixels others of the same shape and dtype."""
    if not (read.is_pixels(x) or read.is_map(x)) or node.kwargs:
        return False
    of_x, result = x.meta["val"], node.meta["val"]
    return (result.shape, result.dtype) == (of_x.shape, of_x.dtype)
