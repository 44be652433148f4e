"""Normalisations."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import nn

from resfuse.kernels.onnx_reader.operators.convolution_layers import weight_of
from resfuse.kernels.onnx_reader.reading.node import OnnxNode, Operators
from resfuse.kernels.onnx_reader.reading.values import Computed, Value

if TYPE_CHECKING:
    from resfuse.kernels.onnx_reader.reading.graph_reader import Reader

_BATCH_NORMS: dict[int, Callable[..., nn.Module]] = {
    2: nn.BatchNorm1d,
    3: nn.BatchNorm1d,
    4: nn.BatchNorm2d,
    5: nn.BatchNorm3d,
}
_INSTANCE_NORMS: dict[int, Callable[..., nn.Module]] = {
    3: nn.InstanceNorm1d,
    4: nn.InstanceNorm2d,
    5: nn.InstanceNorm3d,
}


def _batch_norm(
    reader: "Reader", node: OnnxNode, x: Value, scale: Value, bias: Value, mean: Value, var: Value
) -> Computed:
    x = reader.computed(x)
    node.require("training_mode", 0)
    node.require("spatial", 1)
    node.attribute("momentum")  # of training
    eps, channels = node.attribute("epsilon", 1e-5), x.size(1)
    weights = [weight_of(node, each, "a statistic") for each in (scale, bias, mean, var)]
    weight, shift, mean_, var_ = weights
    return reader.layer(
        node, lambda: _BATCH_NORMS[x.rank](channels, eps), x,
        weight=weight, bias=shift, running_mean=mean_, running_var=var_,
    )  # fmt: skip


def _instance_norm(
    reader: "Reader", node: OnnxNode, x: Value, scale: Value, bias: Value
) -> Computed:
    x = reader.computed(x)
    eps, channels = node.attribute("epsilon", 1e-5), x.size(1)
    if all(math.prod(shape[2:]) == 1 for shape in x.shapes):
        raise node.refusal("an instance of one pixel")
    return reader.layer(
        node, lambda: _INSTANCE_NORMS[x.rank](channels, eps, affine=True), x,
        weight=weight_of(node, scale, "a scale"), bias=weight_of(node, bias, "a bias"),
    )  # fmt: skip


def _layer_norm(
    reader: "Reader", node: OnnxNode, x: Value, scale: Value, bias: Value | None = None
) -> Computed:
    x = reader.computed(x)
    node.require("stash_type", 1)
    eps, axis = node.attribute("epsilon", 1e-5), node.attribute("axis", -1) % x.rank
    sizes = [x.size(dim) for dim in range(axis, x.rank)]
    weight = weight_of(node, scale, "a scale")
    shift = None if bias is None else weight_of(node, bias, "a bias")
    if list(weight.shape) != sizes:
        raise node.refusal(f"a scale of {list(weight.shape)} for {sizes}")
    return reader.layer(
        node, lambda: nn.LayerNorm(sizes, eps, bias=shift is not None), x,
        weight=weight, bias=shift,
    )  # fmt: skip


def _group_norm(reader: "Reader", node: OnnxNode, x: Value, scale: Value, bias: Value) -> Computed:
    if node.opset < 21:
        raise node.refusal("a scale for each group")  # one a group until then, as nothing else has
    x = reader.computed(x)
    node.require("stash_type", 1)
    eps, groups = node.attribute("epsilon", 1e-5), node.attribute("num_groups")
    channels = x.size(1)
    return reader.layer(
        node, lambda: nn.GroupNorm(groups, channels, eps), x,
        weight=weight_of(node, scale, "a scale"), bias=weight_of(node, bias, "a bias"),
    )  # fmt: skip


def _lrn(reader: "Reader", node: OnnxNode, x: Value) -> Computed:
    size = node.attribute("size")
    if size % 2 == 0 or not 0 < size < 1000:  # an even one is lopsided in another way than torch's
        raise node.refusal(f"size={size}")
    alpha, beta = node.attribute("alpha", 1e-4), node.attribute("beta", 0.75)
    return reader.call(
        F.local_response_norm, x, size, alpha=alpha, beta=beta, k=node.attribute("bias", 1.0)
    )


def _lp_norm(reader: "Reader", node: OnnxNode, x: Value) -> Computed:
    order, axis = node.attribute("p", 2), node.attribute("axis", -1)
    if order not in (1, 2):
        raise node.refusal(f"p={order}")
    return reader.call(F.normalize, x, float(order), axis, eps=1e-38)


NORMS: Operators = {
    "BatchNormalization": _batch_norm,
    "InstanceNormalization": _instance_norm,
    "LayerNormalization": _layer_norm,
    "GroupNormalization": _group_norm,
    "LRN": _lrn,
    "LpNormalization": _lp_norm,
}
