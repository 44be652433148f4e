"""NativeNorm: a batch norm in eval mode with what follows it, in float32 on the CPU by one native
step.

Scale and shift are computed anew in every call, in less than a microsecond, so nothing has to be
looked at for changes. torch takes two passes over the memory, and a call for each.
"""

import ctypes
import threading
from typing import Any

import torch
from torch import Tensor

from resfuse.kernels.cpu.cpus import threads
from resfuse.kernels.cpu.library import library, why_unavailable
from resfuse.kernels.cpu.packed_conv import empty_output
from resfuse.kernels.cpu.program import (
    ACTIVATIONS,
    Step,
    activation,
    kind,
    lanes,
    require_done,
    runner,
    storage_number,
)
from resfuse.kernels.ops.conv_problem import Epilogue


class NativeNorm:
    """act(x * scale + shift + residual): x [N, C, H, W] -> the same, both channels_last.

    Any number of threads may call it.

    Args:
        channels: C; `supports` says which.
        epilogue: residual and activation, without a slope.
    """

    def __init__(self, channels: int, epilogue: Epilogue) -> None:
        self._channels, self._epilogue = channels, epilogue
        self._here = threading.local()
        self._run = runner()
        self._fold = library().resfuse_scale_and_shift
        pointer = ctypes.c_void_p
        self._fold.restype = None
        self._fold.argtypes = (*[pointer] * 4, ctypes.c_double, ctypes.c_long, pointer, pointer)

    @staticmethod
    def supports(channels: int, activation: str) -> bool:
        """Returns whether there is a native step here: channels are whole vectors, since a pixel
        has no room behind them."""
        return (
            activation in ACTIVATIONS
            and activation not in ("leaky_relu", "prelu")
            and why_unavailable() is None
            and channels % lanes() == 0
        )

    def __call__(
        self,
        x: Tensor,
        residual: Tensor | None,
        statistics: tuple[Tensor, Tensor],
        affine: tuple[Tensor | None, Tensor | None],
        eps: float,
        count: int | None = None,
    ) -> Tensor:
        """Returns the result.

        Args:
            x: [N, C, H, W], float32 in the CPU's memory, dense and channels_last.
            residual: likewise, if the epilogue has one.
            statistics: mean and variance [C], float32 and contiguous.
            affine: weight and bias [C], likewise.
            eps: added to the variance.
            count: threads to run on; by default those of cpus.py.
        """
        step, _ = self._bound(x.shape)
        given = (*statistics, *affine)
        places = (None if each is None else each.data_ptr() for each in given)
        self._fold(*places, eps, self._channels, step.w, step.bias)
        y = empty_output(tuple(x.shape))
        step.x, step.y = x.data_ptr(), y.data_ptr()
        step.residual = 0 if residual is None else residual.data_ptr()
        require_done(self._run(step, 1, count or threads()))
        return y

    def _bound(self, shape: torch.Size) -> tuple[Step, Tensor]:
        """Returns this thread's step for inputs of a shape, and memory for scale and shift."""
        kept: tuple[torch.Size, Step, Tensor] | None = getattr(self._here, "bound", None)
        if kept is None or kept[0] != shape:
            folded = torch.empty(2, self._channels, dtype=torch.float32, device="cpu")
            kept = self._here.bound = shape, self._step(shape, folded), folded
        return kept[1:]

    def _step(self, shape: torch.Size, folded: Tensor) -> Step:
        n, c, h, w = shape
        where: dict[str, Any] = {"x_pitch": c, "y_pitch": c, "residual_pitch": c}
        return Step(
            kind=kind("affine"), N=n, P=h, Q=w, K=c,
            w=folded[0].data_ptr(), bias=folded[1].data_ptr(),
            activation=activation(self._epilogue.activation),
            residual_last=self._epilogue.residual_last,
            storage=storage_number("fp32"), **where,
        )  # fmt: skip
