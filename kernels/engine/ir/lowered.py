"""What a tactic makes of its nodes: native steps on the arena, or a call on tensors."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from resfuse.kernels.cpu.program import Step

Values = dict[str, Tensor]


@dataclass(frozen=True)
class Native:
    """Steps; the room holds what they point to."""

    steps: list[Step]


@dataclass(frozen=True)
class Call:
    """Reads its inputs among the values and adds its outputs to them."""

    run: Callable[[Values], None]


Work = Native | Call
