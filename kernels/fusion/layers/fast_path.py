"""The fast path of a fused forward: the same graph without the checks that its layers make.

Each fused layer looks at what it is given before it computes: dtype, shape, device, strides, the
residual. All of that follows from the input of the forward, so an input that is like one which has
passed every check needs none of them. A fused ResNet-18 has 20 such layers.
"""

from collections.abc import Callable
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Forward = Callable[..., Any]
Signature = tuple[torch.Size, tuple[int, ...], torch.dtype, bool]


def signature_of(x: Tensor) -> Signature:
    """Returns what the checks of a forward depend on: shape, strides, dtype and autocast."""
    return x.shape, x.stride(), x.dtype, torch._C._is_any_autocast_enabled()


class Miss(Enum):
    """Why a fused layer has done something that a run without checks would not do."""

    REFUSED_INPUT = "the original layers had to compute, or to refuse, this input"
    NOT_FOLDED = "the layers could not be folded"
    NOT_PACKED = "torch's own operations ran on the folded weights"
    RESIDUAL_AFTER_ACTIVATION = "the residual was added by an operation of its own"
    RESIDUAL_EXPANDED = "the residual had another shape or memory format than the result"
    EAGER_STRIDES = "only the original layers give the result the strides that eager gives it"
    CONVERTED = "the result was copied into another memory format"


class Event(NamedTuple):
    """A miss, and the layer that reported it."""

    layer: str
    miss: Miss


class FastPath:
    """Decides for one rewritten forward, at each call, between its graph with checks and without.

    The guard is the signature of the input that was last run with all checks: shape, strides, dtype
    and whether autocast was on. A call whose input has that signature is a hit and runs without
    checks. Any other call runs with them, and sets the guard unless a layer reported a miss
    meanwhile.

    Any number of threads may call it. A miss that another thread's run reports leaves the guard
    unset, too: that costs one more checked run, and no wrong result.
    """

    def __init__(self) -> None:
        self._guards: dict[Forward, Signature] = {}  # by the graph without checks
        self.last_miss: Event | None = None

    def run(self, unchecked: Forward, checked: Forward, module: nn.Module, x: Tensor) -> Any:
        """The forward's result, without the layers' checks where the guard holds.

        Args:
            unchecked: the forward without checks.
            checked: the same forward with them.
            module: whose forward it is.
            x: its only argument.
        """
        signature = signature_of(x)
        if self._guards.get(unchecked) == signature:
            return unchecked(module, x)
        self._guards.clear()  # the layers are about to be bound to weights in this input's dtype
        before = self.last_miss
        result = checked(module, x)
        if self.last_miss is before and not signature[-1]:
            self._guards[unchecked] = signature
        return result

    def holds(self, unchecked: Forward, signature: Signature) -> bool:
        """Returns whether inputs of that signature run without checks."""
        return self._guards.get(unchecked) == signature

    def report(self, layer: str, miss: Miss) -> None:
        """Notes that a layer has had a miss: the run that it is part of sets no guard.

        Each event is an object of its own, and replaces the last one in a single step, so that no
        thread can hide another's.
        """
        if not torch.compiler.is_dynamo_compiling():  # a compiled graph has no fast path
            self.last_miss = Event(layer, miss)

    def reset(self) -> None:
        """Forgets the guard, as when weights have changed: the next call runs with all checks."""
        self._guards.clear()
