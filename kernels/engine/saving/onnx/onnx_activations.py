"""The activations of an epilogue in ONNX's operators, of the lowest operator set that has them."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from resfuse.kernels.engine.saving.onnx.onnx_builder import OnnxBuilder
from resfuse.kernels.ops.activation import Slope


def activated(build: OnnxBuilder, x: str, name: str, slope: Slope, dims: int) -> str:
    """Adds an activation of resfuse.kernels.ops.activation; returns the name of its result.

    Args:
        slope: of leaky_relu and prelu.
        dims: how many dimensions x has, its channels being the second.
    """
    if name in _PLAIN:
        return _PLAIN[name](build, x)
    assert slope is not None
    if name == "leaky_relu" and not isinstance(slope, Tensor):
        return build.add("LeakyRelu", [x], alpha=float(slope))
    negative = torch.as_tensor(slope, dtype=torch.float32).reshape(-1, *(1,) * (dims - 2))
    return build.add("PRelu", [x, build.constant(negative, "slope")])


def _relu6(build: OnnxBuilder, x: str) -> str:
    limits = [build.constant(np.float32(limit), "limit") for limit in (0, 6)]
    return build.add("Clip", [x, *limits])


def _hardsigmoid(build: OnnxBuilder, x: str) -> str:
    return build.add("HardSigmoid", [x], alpha=1 / 6, beta=0.5)


def _times_x(gate: Callable[[OnnxBuilder, str], str]) -> Callable[[OnnxBuilder, str], str]:
    return lambda build, x: build.add("Mul", [x, gate(build, x)])


def _plain(op: str, opset: int = 13, **attributes: str) -> Callable[[OnnxBuilder, str], str]:
    return lambda build, x: build.add(op, [x], opset=opset, **attributes)


_PLAIN: dict[str, Callable[[OnnxBuilder, str], str]] = {
    "identity": lambda build, x: x,
    "relu": _plain("Relu"),
    "relu6": _relu6,
    "sigmoid": _plain("Sigmoid"),
    "silu": _times_x(_plain("Sigmoid")),
    "hardsigmoid": _hardsigmoid,
    "hardswish": _times_x(_hardsigmoid),  # HardSwish itself came with operator set 14
    "gelu": _plain("Gelu", 20),
    "gelu_tanh": _plain("Gelu", 20, approximate="tanh"),
}
