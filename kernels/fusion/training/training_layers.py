"""Training steps: what runs instead of a chain of layers in training mode. Each stands for
act(bn(conv(x)) + residual), with gradients, and does to the running statistics what torch's layers
do; a norm that was put into eval mode by itself ("frozen") is an affine map.

On a GPU a step launches our kernels. Elsewhere (unless training_mode.py is told otherwise), and for
whatever those do not take, it calls the layers, with the sum and a ReLU in place: torch's own
numbers and errors, in no more memory.
"""

from copy import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from resfuse.kernels.fusion.layers.layer_calls import autocast
from resfuse.kernels.fusion.matching.layer_kinds import FROZEN_NORMS, channels_of, geometry_of
from resfuse.kernels.fusion.matching.match import Chain
from resfuse.kernels.fusion.training.training_mode import runs_operations
from resfuse.kernels.gpu.batch_norm.max_pool_relu import max_pool_relu
from resfuse.kernels.ops.activation import ACTIVATIONS


class TrainingStep:
    """act(bn(conv(x)) + residual) or act(bn(conv(x))) + residual; conv may be somewhere else."""

    def __init__(self, chain: Chain) -> None:
        assert chain.norm is not None
        self.name, self.chain = chain.name, chain.summary()
        self.conv, self.norm, self.act = chain.conv, chain.norm, chain.act
        self.activation, self.residual = chain.activation, chain.residual
        self.keeps_dtype = chain.keeps_dtype
        self.before: TrainingStep | None = None  # computed by this one, too
        self.geometry = None if chain.conv is None else geometry_of(chain.conv)
        self.norm_activates = chain.norm_activates

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if not runs_operations(x) or not self.takes(x):
            return self.by_layers(x, residual)
        return self._after_convolution(*self.convolved(x), residual)

    def by_layers(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """Calls the layers themselves; no other code holds the values between them."""
        if self.before is not None:
            x = self.before(x)
        return self._finish(self.norm(x if self.conv is None else self.conv(x)), residual)

    def takes(self, x: Tensor) -> bool:
        """Returns whether the layers' own checks would pass: where not, they raise their own
        errors."""
        if self.before is not None and not self.before.takes(x):
            return False
        first = self.before is None
        channels = channels_of(self.norm) if self.conv is None else self.conv.in_channels
        weight = None if self.conv is None else self.conv.weight
        return (
            x.dim() == 4
            and (not first or x.size(1) == channels)
            and (x.numel() > 0 or self._takes_nothing())
            and x.dtype in (torch.float32, torch.float16, torch.bfloat16)
            and (
                weight is None
                or (weight.device == x.device and autocast(weight).dtype == autocast(x).dtype)
            )
        )

    def _takes_nothing(self) -> bool:
        """Returns whether an empty batch may stay on the kernels: of a norm over processes it must,
        since the others' wait for this one's and not for what torch's layer would tell them."""
        return group_of(self.norm) is not None or not uses_batch(self.norm)

    def take_in(self, before: "TrainingStep") -> None:
        """Fuses the step before this one into it, which is the only reader of that step's
        result."""
        self.before = before
        self.chain = f"{before.chain} -> {self.chain}"

    def takes_in(self, before: "TrainingStep") -> bool:
        """Returns whether one kernel can normalise for, and compute, this step's convolution."""
        conv, window = self.conv, self.geometry
        return (
            conv is not None
            and window is not None
            and conv.kernel_size == window.stride == (1, 1)
            and (window.padding, window.groups, conv.bias) == ((0, 0), 1, None)
            and before.activation in ("relu", "identity")
            and before.residual == "none"
            # which may take what the other may not: see takes
            and averages_over(before.norm) == averages_over(self.norm)
        )

    def convolved(self, x: Tensor) -> tuple[Tensor, Any]:
        """Returns conv(x), and its statistics if one kernel computed both."""
        if self.before is None:
            return self._convolved(x)
        before = self.before
        x, partials = before.convolved(x)
        assert self.conv is not None
        filters = autocast(self.conv.weight)
        if x.dtype != filters.dtype or not _has_tensor_cores(x):
            return self._convolved(before._after_convolution(x, partials, None))
        from resfuse.kernels.gpu.batch_norm.bn_conv1x1 import bn_conv1x1

        norm = norm_of(before.norm)
        return bn_conv1x1(x, norm, filters, activation=before.activation, partials=partials)

    def _convolved(self, x: Tensor) -> tuple[Tensor, Any]:
        """Without tensor cores, with one channel a group, or where no statistics are needed,
        cuDNN's convolution does its part, and the norm reads its output once more."""
        if self.conv is None:
            return x, None
        depthwise = self.conv.groups == self.conv.in_channels > 1
        if depthwise or not uses_batch(self.norm) or not _has_tensor_cores(autocast(x)):
            return self.conv(x), None
        from resfuse.kernels.gpu.batch_norm.conv_statistics import conv_statistics

        assert self.geometry is not None
        bias = None if self.conv.bias is None else autocast(self.conv.bias)
        window = self.geometry
        return conv_statistics(
            autocast(x), autocast(self.conv.weight), bias, stride=window.stride,
            padding=window.padding, dilation=window.dilation, groups=window.groups,
        )  # fmt: skip

    def _after_convolution(self, x: Tensor, partials: Any, residual: Tensor | None) -> Tensor:
        """Applies norm, residual and activation to the result of the convolution."""
        adds = residual is not None and self.residual == "before"
        if adds and not _joins(residual, x):
            return self._finish(self._normed(x, partials), residual)
        from resfuse.kernels.gpu.batch_norm.bn_add_relu import bn_add_relu

        relu = self.activation == "relu"
        y = bn_add_relu(
            x, norm_of(self.norm), residual if adds else None,
            activation="relu" if relu else "identity", partials=partials,
        )  # fmt: skip
        if not relu:
            y = self._activate(y)
        return y + residual if residual is not None and self.residual == "after" else y

    def _normed(self, x: Tensor, partials: Any) -> Tensor:
        from resfuse.kernels.gpu.batch_norm.bn_add_relu import bn_add_relu

        y = bn_add_relu(x, norm_of(self.norm), activation="identity", partials=partials)
        return self._activate(y) if self.norm_activates else y

    def _activate(self, y: Tensor) -> Tensor:
        if self.activation == "identity":
            return y
        if self.activation == "relu":
            return torch.relu_(y)
        if self.act is not None:
            activated: Tensor = self.act(y)
            return activated
        return ACTIVATIONS[self.activation].forward(y, None)

    def _finish(self, y: Tensor, residual: Tensor | None) -> Tensor:
        """Adds the residual and activates in place: no other code holds the norm's result."""
        if residual is not None and self.residual == "before":
            y = add(y, residual, self.keeps_dtype)
        if not self.norm_activates:
            y = self._activate(y)
        return y + residual if residual is not None and self.residual == "after" else y


class JoinStep:
    """act(bn(conv(x)) + bn2(conv2(x2))): a block's end and its projection, one kernel on a GPU."""

    def __init__(self, main: TrainingStep, projection: TrainingStep) -> None:
        self.main, self.projection = main, projection
        self.name, self.chain = main.name, f"{main.chain}, projection's norm inside"

    def __call__(self, x: Tensor, x2: Tensor) -> Tensor:
        main, projection = self.main, self.projection
        ready = main.activation in ("relu", "identity") and main.takes(x) and projection.takes(x2)
        if not runs_operations(x) or not ready:
            return main(x, projection(x2))
        from resfuse.kernels.gpu.batch_norm.bn_add_relu import bn_add_relu

        x, partials = main.convolved(x)
        x2, partials2 = projection.convolved(x2)
        if not _joins(x2, x):
            side = projection._normed(x2, partials2)
            return main._finish(main._normed(x, partials), side)
        return bn_add_relu(
            x, norm_of(main.norm), shortcut=(x2, norm_of(projection.norm)),
            activation=main.activation, partials=partials, shortcut_partials=partials2,
        )  # fmt: skip


class PooledStep:
    """max_pool(relu(bn(conv(x)) + residual)), of a stem mostly, with the ReLU behind the pool."""

    def __init__(self, step: TrainingStep, pool: nn.MaxPool2d) -> None:
        self.name, self.chain = step.name, f"{step.chain} + max_pool"
        self.main, self.pool = copy(step), pool
        self.main.activation, self.main.act = "identity", None

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return max_pool_relu(self.main(x, residual), self.pool)


AnyTrainingStep = TrainingStep | JoinStep | PooledStep


def steps_of(step: AnyTrainingStep) -> list[TrainingStep]:
    """Returns one step for every batch norm that `step` computes."""
    if isinstance(step, JoinStep):
        return [*steps_of(step.main), *steps_of(step.projection)]
    if isinstance(step, PooledStep):
        return steps_of(step.main)
    return [step] if step.before is None else [*steps_of(step.before), step]


def _has_tensor_cores(x: Tensor) -> bool:
    """Returns whether Triton's matrix products are fast on the device; the interpreter's never
    are."""
    from resfuse.kernels.ops.conv_problem import math_mode_of

    return not x.is_cuda or math_mode_of(x.dtype) != "ieee"


def add(y: Tensor, residual: Tensor, keeps_dtype: bool = False) -> Tensor:
    """Returns y + residual, written over y if the sum has its dtype and shape."""
    fits = residual.dtype == y.dtype or keeps_dtype
    if fits and torch.broadcast_shapes(y.shape, residual.shape) == y.shape:
        return y.add_(residual)
    return y + residual


def uses_batch(norm: nn.Module) -> bool:
    """Returns whether a norm now takes its statistics from the batch."""
    if type(norm).__name__ in FROZEN_NORMS:
        return False
    return norm.training or (norm.running_mean is None and norm.running_var is None)


def group_of(norm: nn.Module) -> str | None:
    """Returns the name of the process group whose batches a norm averages now, as torch decides it
    (torch.nn.SyncBatchNorm.forward); None where that is this process alone."""
    if not isinstance(norm, nn.SyncBatchNorm) or not norm.training:
        return None
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group: Any = norm.process_group or dist.group.WORLD
    return group.group_name if dist.get_world_size(group) > 1 else None


def averages_over(norm: nn.Module) -> Any:
    """Returns a value that is equal for two norms that average over the same processes in every
    mode."""
    return isinstance(norm, nn.SyncBatchNorm), getattr(norm, "process_group", None)


def norm_of(norm: nn.Module) -> Any:
    """Returns a batch norm as `bn_add_relu` takes it, having counted the batch as torch's layer
    does (torch.nn.modules.batchnorm._BatchNorm.forward)."""
    from resfuse.kernels.gpu.batch_norm.bn_add_relu import Norm

    layer: Any = norm
    frozen = type(norm).__name__ in FROZEN_NORMS
    momentum = 0.0 if frozen or layer.momentum is None else float(layer.momentum)
    tracks = not frozen and layer.training and layer.track_running_stats
    if tracks and layer.num_batches_tracked is not None:
        layer.num_batches_tracked.add_(1)
        if layer.momentum is None:
            momentum = 1.0 / float(layer.num_batches_tracked)
    batch = uses_batch(norm)
    mean, var = (layer.running_mean, layer.running_var) if tracks or not batch else (None, None)
    return Norm(
        layer.weight, layer.bias, mean, var, batch, momentum, float(layer.eps), group_of(norm)
    )


def _joins(residual: Tensor | None, y: Tensor) -> bool:
    return residual is not None and residual.shape == y.shape and residual.dtype == y.dtype
