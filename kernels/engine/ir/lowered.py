"""Lowered: the form in which a tactic's nodes run, native steps in the arena or a call on
tensors."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from resfuse.kernels.cpu.program import Step

Values = dict[str, Tensor]


@dataclass(frozen=True)
class Native:
    """Native steps; the arena owns the memory that they point to."""

    steps: list[Step]


@dataclass(frozen=True)
class Call:
    """A function that reads its inputs among the values and adds its outputs to them."""

    run: Callable[[Values], None]


Lowered = Native | Call
