"""Fused layers that are made of two others: a stem with its max-pool, and a convolution with the
projection of its shortcut. On a GPU each of them is one kernel, on a CPU two calls.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from resfuse.kernels.cpu.packed_conv import NativeConv
from resfuse.kernels.cpu.stem_pool import StemPool
from resfuse.kernels.fusion.layers.fast_path import Miss
from resfuse.kernels.fusion.layers.fold_cache import Folded, Packed
from resfuse.kernels.fusion.layers.fused_layers import ConvStep
from resfuse.kernels.fusion.layers.launch_signature import is_unseen, signature_of
from resfuse.kernels.fusion.layers.layer_calls import autocast, is_on_gpu
from resfuse.kernels.fusion.layers.norm_step import NormStep
from resfuse.kernels.fusion.tracing.memory_formats import is_ambiguous, laid_out
from resfuse.kernels.gpu.common.arguments import channels_last
from resfuse.kernels.ops.conv_problem import Epilogue


class PoolStep:
    """A stem's max-pool as a step of its own, for a region (conv_region.py)."""

    overwrite = False

    def __init__(self, conv: ConvStep, pool: Callable[[Tensor], Tensor]) -> None:
        self.unchecked, self._conv = pool, conv
        # What the convolution was bound to, and the step for it; replaced at once.
        self._made: tuple[Packed | None, StemPool | None] = (None, None)

    @property
    def bound(self) -> StemPool | None:
        """The native step that pools what the convolution's one makes, if there is one."""
        conv, (made_for, pool) = self._conv.bound, self._made
        if conv is not made_for:
            pool, channels = None, self._conv.conv.out_channels
            if isinstance(conv, NativeConv) and StemPool.supports(channels, conv.storage):
                pool = StemPool(conv.storage)
            self._made = conv, pool
        return pool


class StemStep:
    """max_pool(relu(bn(conv(x)))): one kernel on a GPU, two calls on a CPU."""

    def __init__(self, conv: ConvStep, pool: Callable[[Tensor], Tensor]) -> None:
        self.conv, self.pool = conv, pool
        self.name, self.chain = conv.name, f"{conv.chain} + max_pool"
        self._id = object()

    def unchecked(self, x: Tensor) -> Tensor:
        """Runs on a CPU without the checks."""
        return self.pool(self.conv.unchecked(x))

    def with_eager_strides(self, x: Tensor) -> Tensor:
        """Returns the result with the strides that eager's layers would have given it."""
        if not is_on_gpu(x) or not self.conv.makes_channels_last(autocast(x)):
            return self.pool(self.conv.with_eager_strides(x))
        made = self(x)
        if is_ambiguous(made.shape):
            return self.pool(self.conv.with_eager_strides(x))
        y = laid_out(made, True)
        if y is not made:
            self.conv.missed(Miss.CONVERTED)
        return y

    def __call__(self, x: Tensor) -> Tensor:
        if not is_on_gpu(x) or not self.conv.takes(autocast(x)):
            return self.pool(self.conv(x))
        from resfuse.kernels.fusion.layers.prepared_launch import launched
        from resfuse.kernels.gpu.stem.stem import launch_of, stem

        x = autocast(x)
        folded = self.conv.folded(x.dtype)
        if folded is None or not folded.finite:
            return self.pool(self.conv(x))
        folded = self.conv.folded_for_gpu(x.dtype)
        if not is_unseen(x, None):
            return stem(x, folded.dense(), folded.bias)
        x = channels_last(x)
        key = (self._id, *signature_of(x, None))
        return launched(
            folded.launches, key, x, None, lambda: launch_of(x, folded.dense(), folded.bias)
        )


class ProjectionStep:
    """act(bn(conv(x)) + bn(projection(shortcut))): on a GPU the projection is more of K."""

    def __init__(self, conv: ConvStep, projection: ConvStep) -> None:
        self.conv, self.projection = conv, projection
        self.name, self.chain = conv.name, f"{conv.chain}, projection inside"
        self._id = object()
        self._epilogue = Epilogue(conv.activation)  # the sum is the kernel's own
        conv.overwrite = True

    def unchecked(self, x: Tensor, shortcut: Tensor) -> Tensor:
        """Runs on a CPU without the checks."""
        return self.conv.unchecked(x, self.projection.unchecked(shortcut))

    def with_eager_strides(self, x: Tensor, shortcut: Tensor) -> Tensor:
        """Returns the result with the strides that eager's layers would have given it."""
        read = (self.conv, autocast(x)), (self.projection, autocast(shortcut))
        if not is_on_gpu(x) or not all(step.makes_channels_last(seen) for step, seen in read):
            return self.conv.with_eager_strides(x, self.projection.with_eager_strides(shortcut))
        made = self(x, shortcut)
        y = laid_out(made, True)
        if y is not made:
            self.conv.missed(Miss.CONVERTED)
        return y

    def __call__(self, x: Tensor, shortcut: Tensor) -> Tensor:
        both = self.conv.takes(autocast(x)) and self.projection.takes(autocast(shortcut))
        if not is_on_gpu(x) or not both:
            return self.conv(x, self.projection(shortcut))
        from resfuse.kernels.fusion.layers.prepared_launch import launched
        from resfuse.kernels.gpu.conv1x1.conv1x1 import Shortcut, checked, launch_with_shortcut

        x, shortcut = autocast(x), autocast(shortcut)
        folded = self.conv.folded(x.dtype), self.projection.folded(shortcut.dtype)
        if any(one is None or not one.finite for one in folded):
            return self.conv(x, self.projection(shortcut))
        main = self.conv.folded_for_gpu(x.dtype)
        side = self.projection.folded_for_gpu(shortcut.dtype)
        stride, epilogue = self.projection.geometry.stride, self._epilogue
        if not is_unseen(x, shortcut):
            folds, bias = Shortcut(shortcut, side.dense(), stride), main.bias + side.bias
            return checked(x, main.dense(), bias, None, main.slope, (1, 1), epilogue, folds)
        x, shortcut = channels_last(x), channels_last(shortcut)
        return launched(
            self._launches(main, side),
            signature_of(x, shortcut),
            x,
            shortcut,
            lambda: launch_with_shortcut(
                x,
                main.dense(),
                main.bias + side.bias,
                main.slope,
                epilogue,
                Shortcut(shortcut, side.dense(), stride),
            ),
        )

    def _launches(self, main: Folded, side: Folded) -> dict[Any, Any]:
        """Returns the launches prepared with both folded weights, kept as long as either."""
        made: tuple[Folded, dict[Any, Any]] | None = main.launches.get(self._id)
        if made is None or made[0] is not side:
            made = main.launches[self._id] = (side, {})
        return made[1]


FusedStep = ConvStep | NormStep | StemStep | ProjectionStep


def convolutions(step: FusedStep) -> list[ConvStep]:
    """Returns the convolutions that a step computes."""
    if isinstance(step, ConvStep):
        return [step]
    if isinstance(step, ProjectionStep):
        return [step.conv, step.projection]
    return [step.conv] if isinstance(step, StemStep) else []
