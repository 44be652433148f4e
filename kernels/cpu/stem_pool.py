"""StemPool: the 3x3 max-pool with stride 2 and padding 1 of a ResNet's stem as a native step, with
what a program of convolutions (conv_program.py) asks of a NativeConv.
"""

from collections.abc import Sequence

from resfuse.kernels.cpu.conv_candidates import NativeConfig
from resfuse.kernels.cpu.library import Storage, why_unavailable
from resfuse.kernels.cpu.program import Step, kind, lanes, storage_number
from resfuse.kernels.ops.conv_problem import ConvProblem, Geometry

_WINDOWS = Geometry(stride=(2, 2), padding=(1, 1))


class StemPool:
    """A max-pool of [N, C, H, W] to [N, C, P, Q], both channels_last; NaN stays NaN.

    Args:
        storage: of its values.
    """

    asked = None  # it runs on as many threads as the convolution before it

    def __init__(self, storage: Storage = "fp32") -> None:
        self.storage = self.makes = storage

    @staticmethod
    def supports(channels: int, storage: Storage = "fp32") -> bool:
        """Returns whether there is a native step for maps of so many channels here."""
        return why_unavailable(storage) is None and channels % lanes() == 0

    def problem(self, shape: Sequence[int], residual: bool) -> ConvProblem:
        """Returns the depthwise convolution with the same windows."""
        n, c, h, w = shape
        return ConvProblem(n, c, h, w, c, 3, 3, _WINDOWS._replace(groups=c))

    def step(
        self, shape: Sequence[int], residual: bool, config: NativeConfig | None = None
    ) -> tuple[Step, tuple[int, ...]]:
        """Returns the step for inputs of `shape`, without addresses, and the shape of its output;
        there is no choice of a configuration.
        """
        at = self.problem(shape, residual)
        (stride_h, stride_w), (pad_h, pad_w), (dilation_h, dilation_w), _ = at.geometry
        step = Step(
            kind=kind("max_pool"), N=at.n, C=at.c, K=at.k, H=at.h, W=at.w, P=at.p, Q=at.q,
            R=at.r, S=at.s, stride_h=stride_h, stride_w=stride_w, pad_h=pad_h, pad_w=pad_w,
            dilation_h=dilation_h, dilation_w=dilation_w, x_pitch=at.c, y_pitch=at.k,
            storage=storage_number(self.storage),
        )  # fmt: skip
        return step, (at.n, at.k, at.p, at.q)
