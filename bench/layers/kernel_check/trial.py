"""Trial: a configuration of a kernel to try, and Place: where to try it."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor

from resfuse.kernels.gpu.common.arguments import channels_last
from resfuse.kernels.gpu.common.launch import Launch
from resfuse.kernels.ops.conv_problem import MATH_MODES

T = TypeVar("T")


@dataclass(frozen=True)
class Trial:
    """A configuration to try: its launch, the output (NaN before), and the expected values."""

    label: str
    math_mode: str
    config: Any  # of the kernel, a dataclass
    reduction: int  # products summed for one element
    launch: Launch
    outputs: tuple[Tensor, ...]
    expected: Callable[[], tuple[Tensor, ...]]  # fp64


@dataclass(frozen=True)
class Place:
    """The device, math mode and size of trials."""

    device: str  # "meta" to compile only
    math_mode: str
    small: bool

    def draw(self, *shape: int, fan_in: int = 1, seed: int = 0) -> Tensor:
        """Returns random numbers of variance 1 / fan_in, the same for the same shape and seed."""
        dtype = MATH_MODES[self.math_mode][0]
        if self.device == "meta":
            drawn = torch.empty(shape, dtype=dtype, device="meta")
        else:
            generator = torch.Generator(self.device).manual_seed(seed + sum(shape))
            drawn = torch.randn(shape, generator=generator, device=self.device) / fan_in**0.5
            drawn = drawn.to(dtype)
        return channels_last(drawn) if drawn.dim() == 4 else drawn

    def blank(self, *shape: int) -> Tensor:
        return torch.full_like(self.draw(*shape), float("nan"))

    def some(self, configs: Iterable[T]) -> Iterator[T]:
        return islice(configs, 1) if self.small else iter(configs)
