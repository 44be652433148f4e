"""Recognises a batch norm that a forward writes out, as torchvision's FrozenBatchNorm2d does:

    scale = weight * (var + eps).rsqrt();  y = x * scale + (bias - mean * scale)

It becomes a Norm with its own eps, and is folded like any other.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.fx as fx

from resfuse.kernels.engine.ir.graph import Norm

aten = torch.ops.aten
_VIEWS = (aten.view.default, aten.reshape.default, aten.unsqueeze.default)
StateOf = Callable[[Any], str | None]


def spelled_norm(node: fx.Node, state_of: StateOf) -> tuple[fx.Node, Norm] | None:
    """Returns the input and the norm that the sum `node` computes, None if it is no batch norm.

    Args:
        state_of: returns the name of a placeholder in the state, None for any other argument.
    """
    for product, shift in _either(node, aten.add.Tensor):
        for x, scale in _either(product, aten.mul.Tensor):
            found = _norm(_plain(scale), _plain(shift), state_of)
            if found is not None and _is_per_channel(x, scale) and _is_per_channel(x, shift):
                return x, found
    return None


def _norm(scale: Any, shift: Any, state_of: StateOf) -> Norm | None:
    if not _is(shift, aten.sub.Tensor) or shift.kwargs:
        return None
    bias, product = map(_plain, shift.args)
    for weight, root in _either(scale, aten.mul.Tensor):
        var, eps = _under_root(_plain(root))
        for mean, same in _either(product, aten.mul.Tensor):
            names = [state_of(_plain(each)) for each in (mean, var, weight, bias)]
            if _plain(same) is scale and None not in names:
                return Norm(str(names[0]), str(names[1]), names[2], names[3], eps)
    return None


def _under_root(root: Any) -> tuple[Any, float]:
    if _is(root, aten.rsqrt.default):
        added = _plain(root.args[0])
        if _is(added, aten.add.Tensor) and isinstance(added.args[1], float) and not added.kwargs:
            return added.args[0], added.args[1]
    return None, 0.0


def _either(node: Any, target: Any) -> list[tuple[Any, Any]]:
    """Returns the operands of a sum or product of two tensors, in both orders."""
    if not _is(node, target) or node.kwargs:
        return []
    a, b = node.args
    return [(a, b), (b, a)]


def _is(node: Any, target: Any) -> bool:
    return isinstance(node, fx.Node) and node.target is target


def _plain(arg: Any) -> Any:
    """Returns the argument that `arg` is a view of, or `arg` itself."""
    while isinstance(arg, fx.Node) and arg.target in _VIEWS:
        arg = arg.args[0]
    return arg


def _is_per_channel(x: Any, factor: Any) -> bool:
    """Returns whether `factor` has one number for each channel of the maps `x`."""
    if not isinstance(x, fx.Node) or not isinstance(x.meta.get("val"), torch.Tensor):
        return False
    shape, given = x.meta["val"].shape, factor.meta["val"].shape
    return len(shape) == 4 and tuple(given)[-3:] == (shape[1], 1, 1) and given.numel() == shape[1]
