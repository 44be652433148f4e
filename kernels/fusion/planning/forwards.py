"""What a plan asks of the forwards it may run: forward_variants.py has them."""

from typing import Any, NamedTuple, Protocol

from torch import nn

from resfuse.kernels.fusion.layers.fast_path import FastPath, Forward
from resfuse.kernels.fusion.tracing.memory_formats import World


class Variant(NamedTuple):
    """A forward for one world, and what it holds of that its caller must know."""

    world: World
    forward: Forward
    unchecked_on_cpu: Forward | None  # the same, without the steps' own checks
    unchecked_on_gpu: Forward | None  # the same, without the checks of the results' strides
    returns_loose: bool  # what a step has made, in NHWC whatever eager's is
    children: list[tuple[dict[str, nn.Module | None], str, nn.Module]]  # where found, and which


class Forwards(Protocol):
    """What a plan asks of a forward that is called in one way."""

    @property
    def fast_path(self) -> FastPath | None: ...

    def variant(self, world: World, lenient: bool, *, guarded: bool = False) -> Variant: ...

    def world_of(self, args: tuple[Any, ...]) -> World: ...

    def lay_out(self) -> dict[str, Any]: ...

    def called_modules(self) -> list[nn.Module]: ...
