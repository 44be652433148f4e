"""Layers that files spell out in several operators, put together again: SiLU as x * sigmoid(x),
Hardswish, and a bias that is added behind a convolution or a linear layer.

Exact but for the order of roundings.
"""

import operator
from typing import Any

import torch
import torch.fx as fx
import torch.nn.functional as F
from torch import Tensor, nn

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def merge_patterns(module: fx.GraphModule) -> None:
    """Changes the graph in place; its last line stays the output."""
    for node in list(module.graph.nodes):
        if _is(node, operator.mul):
            _activation(module, node)
        if _is(node, operator.truediv):
            _hardswish_by_six(module, node)
        if _is(node, operator.add):
            _bias(module, node)
    module.graph.eliminate_dead_code()


def _activation(module: fx.GraphModule, node: fx.Node) -> None:
    for x, gate in _either(node):
        if _is(gate, torch.sigmoid) and gate.args == (x,):
            _replace(module, node, x, nn.SiLU())
            return
        if _is(gate, F.hardsigmoid) and gate.args == (x,):
            _replace(module, node, x, nn.Hardswish())
            return
        if _is(gate, operator.truediv) and gate.args[1] == 6 and _relu6_of(module, gate.args[0], x):
            _replace(module, node, x, nn.Hardswish())
            return


def _hardswish_by_six(module: fx.GraphModule, node: fx.Node) -> None:
    """x * relu6(x + 3) / 6."""
    product, six = node.args
    if six != 6 or not _is(product, operator.mul):
        return
    assert isinstance(product, fx.Node)
    for x, gate in _either(product):
        if _relu6_of(module, gate, x):
            _replace(module, node, x, nn.Hardswish())
            return


def _relu6_of(module: fx.GraphModule, node: Any, x: Any) -> bool:
    """Whether `node` is relu6(x + 3)."""
    if not isinstance(_layer(module, node), nn.ReLU6):
        return False
    shifted = node.args[0]
    return _is(shifted, operator.add) and shifted.args in ((x, 3.0), (3.0, x))


def _bias(module: fx.GraphModule, node: fx.Node) -> None:
    """Adds a constant to the bias of the layer in front, where nothing else reads that."""
    for x, added in _either(node):
        layer = _layer(module, x)
        if not isinstance(layer, (*_CONVS, nn.Linear)) or len(x.users) > 1:
            continue
        bias = _bias_of(module, layer, added)
        if bias is None or bias.dtype != layer.weight.dtype:
            continue
        own = layer.bias
        layer.bias = nn.Parameter(bias if own is None else own.detach() + bias)
        node.replace_all_uses_with(x)
        module.graph.erase_node(node)  # else it would still be taken for a reader of the layer
        return


def _bias_of(module: fx.GraphModule, layer: nn.Module, added: Any) -> Tensor | None:
    """[features], where `added` is a constant with a number a feature."""
    if not isinstance(added, fx.Node) or added.op != "get_attr":
        return None
    constant = getattr(module, str(added.target))
    assert isinstance(constant, Tensor)
    shape: tuple[int, ...]
    if isinstance(layer, nn.Linear):
        features, shape = layer.out_features, ()
    else:
        assert isinstance(layer, _CONVS)
        features = layer.out_channels
        shape = (1,) * (layer.weight.dim() - 2)
    if tuple(constant.shape) not in ((features, *shape), (1, features, *shape)):
        return None
    return constant.detach().reshape(features).clone()


def _layer(module: fx.GraphModule, node: Any) -> nn.Module | None:
    if isinstance(node, fx.Node) and node.op == "call_module":
        return module.get_submodule(str(node.target))
    return None


def _is(node: Any, target: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target is target


def _either(node: fx.Node) -> list[tuple[Any, Any]]:
    a, b = node.args
    return [(a, b), (b, a)]


def _replace(module: fx.GraphModule, node: fx.Node, x: fx.Node, layer: nn.Module) -> None:
    name = f"{node.name}_{type(layer).__name__.lower()}"
    while hasattr(module, name):
        name += "_"
    module.add_submodule(name, layer)
    with module.graph.inserting_before(node):
        node.replace_all_uses_with(module.graph.call_module(name, (x,)))
