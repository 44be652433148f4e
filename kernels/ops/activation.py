"""The activations an epilogue can apply, in plain torch: what each computes, and its derivative.

The kernels' device counterpart is `epilogue.activate`; both go by these names.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Slope = Tensor | float | None


@dataclass(frozen=True)
class Activation:
    """`forward(z, slope)` and `backward(grad, z, slope)`, both elementwise on z [N, K, P, Q].

    `slope` is what multiplies negative values: a number for leaky_relu, a tensor [K] for prelu;
    the others ignore it.
    """

    forward: Callable[[Tensor, Slope], Tensor]
    backward: Callable[[Tensor, Tensor, Slope], Tensor]


def _by_channel(slope: Slope, z: Tensor) -> Tensor | float:
    if isinstance(slope, Tensor):
        return slope.reshape(1, -1, *(1,) * (z.dim() - 2)).to(z.dtype)
    assert slope is not None
    return slope


def _prelu(z: Tensor, slope: Slope) -> Tensor:
    return torch.where(z > 0, z, z * _by_channel(slope, z))


def _prelu_backward(grad: Tensor, z: Tensor, slope: Slope) -> Tensor:
    return torch.where(z > 0, grad, grad * _by_channel(slope, z))


def _silu_backward(grad: Tensor, z: Tensor, _: Slope) -> Tensor:
    sigmoid = torch.sigmoid(z)
    return grad * sigmoid * (1 + z * (1 - sigmoid))


def _sigmoid_backward(grad: Tensor, z: Tensor, _: Slope) -> Tensor:
    sigmoid = torch.sigmoid(z)
    return grad * sigmoid * (1 - sigmoid)


def _gelu(approximate: str) -> Activation:
    def backward(grad: Tensor, z: Tensor, _: Slope) -> Tensor:
        changed: Tensor = torch.ops.aten.gelu_backward.default(grad, z, approximate=approximate)
        return changed

    return Activation(lambda z, _: F.gelu(z, approximate=approximate), backward)


def _hardswish_backward(grad: Tensor, z: Tensor, _: Slope) -> Tensor:
    inner = torch.where(z < 3, z / 3 + 0.5, torch.ones_like(z))
    return grad * torch.where(z <= -3, torch.zeros_like(z), inner)


ACTIVATIONS: dict[str, Activation] = {
    "identity": Activation(lambda z, _: z, lambda grad, z, _: grad),
    "relu": Activation(lambda z, _: F.relu(z), lambda grad, z, _: grad * (z > 0)),
    "relu6": Activation(lambda z, _: F.relu6(z), lambda grad, z, _: grad * ((z > 0) & (z < 6))),
    "silu": Activation(lambda z, _: F.silu(z), _silu_backward),
    "leaky_relu": Activation(_prelu, _prelu_backward),
    "prelu": Activation(_prelu, _prelu_backward),
    "hardswish": Activation(lambda z, _: F.hardswish(z), _hardswish_backward),
    "sigmoid": Activation(lambda z, _: torch.sigmoid(z), _sigmoid_backward),
    "hardsigmoid": Activation(
        lambda z, _: F.hardsigmoid(z), lambda grad, z, _: grad * ((z > -3) & (z < 3)) / 6
    ),
    "gelu": _gelu("none"),
    "gelu_tanh": _gelu("tanh"),
}


def require_activation(name: str, slope: Slope, channels: int) -> None:
    """Raises ValueError unless `name` is known and `slope` [channels] or a number, as it needs."""
    if name not in ACTIVATIONS:
        raise ValueError(
            f"argument activation: {name!r} is not known; accepted: {', '.join(ACTIVATIONS)}"
        )
    if name == "leaky_relu" and not isinstance(slope, float | int):
        raise ValueError(f"argument slope: {slope!r} with leaky_relu; accepted: a number")
    if name == "prelu" and not (isinstance(slope, Tensor) and slope.shape == (channels,)):
        got = f"shape {tuple(slope.shape)}" if isinstance(slope, Tensor) else repr(slope)
        raise ValueError(f"argument slope: {got} with prelu; accepted: a tensor of [{channels}]")
