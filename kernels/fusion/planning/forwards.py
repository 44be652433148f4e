"""What a plan asks of the forwards it may run: forward_variants.py has them."""

from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from resfuse.kernels.fusion.layers.conv_region import ConvRegion
from resfuse.kernels.fusion.layers.fast_path import FastPath, Forward
from resfuse.kernels.fusion.tracing.memory_formats import InputFormat


class Variant(NamedTuple):
    """A forward for inputs in one memory format, and what its caller must know of it."""

    input_format: InputFormat
    forward: Forward
    unchecked_on_cpu: Forward | None  # the same, without the steps' own checks
    unchecked_on_gpu: Forward | None  # the same, without the checks of the results' strides
    returns_flexible: bool  # its result is a step's, in NHWC whatever format eager gives it
    children: list[tuple[dict[str, nn.Module | None], str, nn.Module]]  # it was made for these
    region: ConvRegion | None = None  # all that `unchecked_on_cpu` does, if that is convolutions


class CalledModule(NamedTuple):
    """A module that a forward calls with so many tensors; None where it is called otherwise."""

    module: nn.Module
    tensors: int | None


class Forwards(Protocol):
    """What a plan asks of a forward that is called in one way."""

    @property
    def fast_path(self) -> FastPath | None: ...

    def variant(
        self, input_format: InputFormat, flexible: bool, *, guarded: bool = False
    ) -> Variant: ...

    def input_format_of(self, args: tuple[Any, ...]) -> InputFormat: ...

    def region_for(
        self, x: Tensor, input_format: InputFormat, flexible: bool
    ) -> ConvRegion | None: ...

    def reset(self) -> None: ...

    def compile_variants(self) -> dict[str, Any]: ...

    def called_modules(self) -> list[CalledModule]: ...
