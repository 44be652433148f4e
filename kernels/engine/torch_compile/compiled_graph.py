"""CompiledGraph: what torch.compile calls in place of a graph that an engine has been built for."""

import threading
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor, nn

from resfuse.kernels.cpu.weight_origin import Origin, why_not_followed
from resfuse.kernels.engine.engine import Engine
from resfuse.kernels.engine.runtime.symbolic import is_traced, is_wrapper
from resfuse.kernels.engine.torch_compile.dynamo_graph import Arguments, output_orders
from resfuse.kernels.observation.optimizer_steps import notify_of_steps


class CompiledGraph:
    """Runs a graph by its engine, which gets the weights anew when they have changed.

    Dynamo hands over the weights at every call. An engine has copies of them, so each call looks
    for changes: as `fuse` does, by identities, addresses, versions and, on a CPU, samples of the
    bytes (cpu/weight_origin.py). Calls for which an engine has no answer, those that record
    gradients among them, run the graph as it is.
    """

    def __init__(
        self, gm: fx.GraphModule, arguments: Arguments, engine: Engine, origin: Origin
    ) -> None:
        """
        Args:
            origin: of the weights, from before the engine was built.
        """
        self.engine = engine
        self._gm, self._x = gm, arguments.x
        self._names, self._places = list(arguments.weights), list(arguments.weights.values())
        self._orders = output_orders(gm)
        self._origin, self._stepped = origin, False
        self._current = True  # whether the engine has the weights of `_origin`
        self._lock = threading.Lock()
        notify_of_steps(self)

    def __call__(self, *args: Any) -> Sequence[Any]:
        x = args[self._x]
        if is_traced() or is_wrapper(x) or type(x) not in (Tensor, nn.Parameter):
            return self._as_it_is(args)
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            self._warn("gradients are recorded")
            return self._as_it_is(args)
        if not self._has([args[place] for place in self._places]):
            return self._as_it_is(args)
        outputs = self.engine(x)
        return [_in_order(y, order) for y, order in zip(outputs, self._orders, strict=True)]

    def forget_parameters(self, parameter_ids: set[int]) -> None:
        """Notes that an optimizer has written to these parameters, perhaps uncounted."""
        if not parameter_ids.isdisjoint(self._origin.stamp[0]):
            self._stepped = True

    def _has(self, weights: list[Tensor]) -> bool:
        """Returns whether the engine has these weights, after giving them to it if they are new."""
        with self._lock:
            if (
                not self._stepped
                and self._origin.is_where_it_was(weights)
                and self._origin.seems_unchanged()
            ):
                return self._current
            self._current = False  # until it has them
            named = dict(zip(self._names, weights, strict=True))
            if (reason := why_not_followed([(named, name) for name in named])) is not None:
                self._warn(reason)
                return False
            self._stepped = False
            self._origin = Origin(weights)  # before they are read: a write in between is seen
            try:
                self.engine.refresh(named)
            except ValueError as error:
                self._warn(str(error).removeprefix("argument state_dict: "))
                return False
            self._current = True
            return True

    def _as_it_is(self, args: Sequence[Any]) -> Sequence[Any]:
        found: Sequence[Any] = self._gm(*args)
        return found

    def _warn(self, reason: str) -> None:
        warnings.warn(
            f"resfuse: a compiled graph runs operation by operation, by torch: {reason}",
            stacklevel=3,
        )


def _in_order(y: Tensor, order: tuple[int, ...] | None) -> Tensor:
    """Returns a tensor with its dimensions in an order in memory."""
    strides = y.stride()
    if order is None or order == tuple(sorted(range(y.dim()), key=lambda dim: -strides[dim])):
        return y
    ordered = torch.empty_permuted(y.shape, order, dtype=y.dtype, device=y.device)
    return ordered.copy_(y)
