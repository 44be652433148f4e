"""Conversion: values between float32 and bfloat16 as a native step, with what a program of
convolutions (conv_program.py) asks of a NativeConv.
"""

from collections.abc import Sequence

from resfuse.kernels.cpu.conv_candidates import NativeConfig
from resfuse.kernels.cpu.library import Storage
from resfuse.kernels.cpu.program import Step, kind, storage_number
from resfuse.kernels.ops.conv_problem import ConvProblem, Geometry


class Conversion:
    """A conversion of [N, C, H, W], channels_last, to another storage; rounded to nearest even.

    Args:
        to: the storage of the result; the other one is that of the input.
    """

    asked = None  # it runs on as many threads as the convolutions around it
    storage: Storage = "bf16"  # the library that has the step

    def __init__(self, to: Storage) -> None:
        self.makes = to

    def problem(self, shape: Sequence[int], residual: bool) -> ConvProblem:
        """Returns the depthwise convolution of the same shapes."""
        n, c, h, w = shape
        return ConvProblem(n, c, h, w, c, 1, 1, Geometry(groups=c))

    def step(
        self, shape: Sequence[int], residual: bool, config: NativeConfig | None = None
    ) -> tuple[Step, tuple[int, ...]]:
        """Returns the step for inputs of `shape`, without addresses, and the shape of its output;
        there is no choice of a configuration.
        """
        n, c, h, w = shape
        step = Step(
            kind=kind(f"to_{self.makes}"), N=n, P=h, Q=w, C=c, K=c, x_pitch=c, y_pitch=c,
            storage=storage_number(self.storage),
        )  # fmt: skip
        return step, (n, c, h, w)
