"""Forwards of modules that have nothing to fuse themselves, but may stand between fused ones.

Such a module runs its own forward. That it is traced says that nothing but torch's code runs in it,
which tree_guards.py asks of everything that is called in a network.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor, nn

from resfuse.kernels.fusion.layers.conv_region import ConvRegion
from resfuse.kernels.fusion.planning.forward_variants import modules_called_in
from resfuse.kernels.fusion.planning.forwards import CalledModule, Forwards, Variant
from resfuse.kernels.fusion.planning.plan import Plan, plan_of
from resfuse.kernels.fusion.planning.tree_guards import KnownForward, is_torch_leaf
from resfuse.kernels.fusion.tracing.memory_formats import InputFormat
from resfuse.kernels.fusion.tracing.module_tracing import (
    Call,
    NotTraceable,
    calls,
    original_class,
    trace,
)
from resfuse.kernels.observation.observed import Observed


def known_forwards(model: nn.Module) -> dict[nn.Module, KnownForward]:
    """Returns what is known of the forwards of those modules of a model that have no plan; nothing
    where there are not several plans, between which they could stand."""
    found: dict[nn.Module, KnownForward] = {}
    if sum(plan_of(module) is not None for module in model.modules()) < 2:
        return found
    for module in model.modules():
        if plan_of(module) is None and not is_torch_leaf(module):
            known = _known_forward(module)
            if known is not None:
                found[module] = known
    return found


def pass_through_plan(model: nn.Module, unfused: dict[str, str]) -> Plan | None:
    """Returns the plan of a model without layers of its own that calls fused modules: to run its
    own forward, behind one check of all weights and guards. None for anything else.

    Args:
        model: the outermost module.
        unfused: the reasons why its own layers are left, which a copy needs.
    """
    fused = [child for child in model.modules() if plan_of(child) is not None]
    if len(fused) < 2 or plan_of(model) is not None:
        return None
    known = _known_forward(model)
    if known is None:
        return None
    forwards: dict[Call, Forwards] = {
        Call(arguments): PassThrough(model, called) for arguments, called in known.called.items()
    }
    return Plan(model, forwards, {}, [], unfused, observed=known.observed, children=known.sequences)


class PassThrough:
    """A module's own forward, as a plan runs it.

    Args:
        module: whose forward it is.
        called: the modules that it calls.
    """

    fast_path = None  # the modules that it calls have theirs

    def __init__(self, module: nn.Module, called: list[CalledModule]) -> None:
        self._own, self._called = original_class(module).forward, called

    def compile_variants(self) -> dict[str, Any]:
        return {}

    def called_modules(self) -> list[CalledModule]:
        return self._called

    def variant(
        self, input_format: InputFormat, flexible: bool, *, guarded: bool = False
    ) -> Variant:
        return Variant(input_format, self._own, None, None, False, [])

    def input_format_of(self, args: tuple[Any, ...]) -> InputFormat:
        return "any"

    def region_for(self, x: Tensor, input_format: InputFormat, flexible: bool) -> ConvRegion | None:
        return None

    def reset(self) -> None:
        pass


def _known_forward(module: nn.Module) -> KnownForward | None:
    if isinstance(module, torch.jit.ScriptModule):  # there is no Python to trace
        return None
    kind = original_class(module)
    if kind.forward is nn.Sequential.forward:
        children = [CalledModule(child, 1) for child in module.children()]
        return KnownForward(Observed(), {1: children}, [module])
    observed = Observed()
    called: dict[int, list[CalledModule]] = {}
    with _in_eval_mode(module), suppress(NotTraceable, ValueError):
        for call in calls(module):
            if call.arguments > 0:
                traced = trace(module, call)
                called[call.arguments] = modules_called_in(traced.graph, module, _is_no_step)
                observed.update(traced.observed)
    return KnownForward(observed, called, []) if called else None


def _is_no_step(node: fx.Node) -> bool:
    return False


@contextmanager
def _in_eval_mode(module: nn.Module) -> Iterator[None]:
    modes = {child: child.training for child in module.modules()}
    try:
        for child in modes:
            child.training = False
        with torch.no_grad():
            yield
    finally:
        for child, mode in modes.items():
            child.training = mode
