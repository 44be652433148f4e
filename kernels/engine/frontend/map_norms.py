"""Adds batch, group and instance norms of maps."""

from typing import Any

import torch.fx as fx

from resfuse.kernels.engine.frontend.call_arguments import arguments, keeps, with_defaults
from resfuse.kernels.engine.frontend.graph_builder import Captured
from resfuse.kernels.engine.ir.graph import Affine, GroupNorm, Norm


def add_batch_norm(read: Captured, node: fx.Node) -> bool:
    x, weight, bias, mean, var, _, eps = arguments(node)
    return _normalised(read, node, x, (mean, var, weight, bias), eps)


def _normalised(
    read: Captured, node: fx.Node, x: Any, tensors: tuple[Any, ...], eps: float
) -> bool:
    """Adds a batch norm by its mean, variance, weight and bias, the last two of which may be
    None."""
    mean, var, weight, bias = names = [read.state_of(tensor) for tensor in tensors]
    computed = [t for t, name in zip(tensors, names, strict=True) if t is not None and name is None]
    if mean is None or var is None or computed or not read.is_map(x):
        return False
    read.add(node, Affine(Norm(mean, var, weight, bias, eps)), x)
    return True


def add_group_norm(read: Captured, node: fx.Node) -> bool:
    x, groups, weight, bias, eps, _ = with_defaults(node, (None, None, 1e-5, True))
    return _normalised_by_groups(read, node, x, groups, weight, bias, eps)


def add_instance_norm(read: Captured, node: fx.Node) -> bool:
    """Adds an instance norm as a group norm of a group for each channel or, where it has running
    statistics, as the batch norm that it is then."""
    x, weight, bias, mean, var, by_input, _, eps, _ = arguments(node)
    if by_input:
        running = mean is not None or var is not None  # which it would update
        groups = x.meta["val"].shape[1]
        return not running and _normalised_by_groups(read, node, x, groups, weight, bias, eps)
    return _normalised(read, node, x, (mean, var, weight, bias), eps)


def _normalised_by_groups(
    read: Captured, node: fx.Node, x: Any, groups: int, weight: Any, bias: Any, eps: float
) -> bool:
    """Adds a group norm of maps whose weight and bias are of the state, if it has any."""
    names = [read.state_of(t) for t in (weight, bias)]
    for name, tensor in zip(names, (weight, bias), strict=True):
        if tensor is not None and (name is None or not read.state[name].is_floating_point()):
            return False
    if not read.is_map(x) or not keeps(read, node, x) or eps < 0:
        return False
    read.add(node, GroupNorm(groups, names[0], names[1], float(eps)), x)
    return True
