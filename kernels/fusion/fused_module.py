"""A module that has been fused: the same module object, of a class that runs a rewritten forward
where that computes the same, and the original one everywhere else.

Like torch.nn.utils.parametrize, this gives the instance a subclass of its own class: parameters,
buffers, submodules, hooks and isinstance stay as they were, and taking the class back undoes it.
"""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import copy, deepcopy
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from resfuse.kernels.fusion.layers.fast_path import Forward
from resfuse.kernels.fusion.layers.fold_cache import Asked, require_weights
from resfuse.kernels.fusion.planning.known_forwards import known_forwards, pass_through_plan
from resfuse.kernels.fusion.planning.plan import NOT_RUN, PLAN, STEPS, Plan
from resfuse.kernels.fusion.planning.plan_builder import make_plan
from resfuse.kernels.fusion.planning.sequential_inplace import sequence_plan
from resfuse.kernels.fusion.tracing.module_tracing import ORIGINAL, original_class
from resfuse.kernels.fusion.training.training_plan import (
    TRAINING_PLAN,
    TRAINING_STEPS,
    TrainingPlan,
)
from resfuse.kernels.fusion.training.training_plan_builder import make_training_plan

_PLAN_STATE = "_resfuse_plan_state"
# Reasons by layer, in eval mode and in training mode; whether the weights are frozen; and what
# layers were asked to compute in.
PlanState = tuple[dict[str, str], dict[str, str] | None, bool, dict[str, Asked]]


class Steps:
    """A module's steps as attributes: its new forward calls `self._resfuse_steps.conv1(x)`."""

    def __init__(self, steps: Mapping[str, Any]) -> None:
        vars(self).update(steps)


class FusedModule(nn.Module):
    """Mixed into the class of a module while it is fused."""

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        plan = vars(self)[PLAN]
        plan.suspect()
        if not mode:
            plan.fold_ahead()
        elif TRAINING_PLAN in vars(self):
            plan.forget_folded()
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        require_weights(vars(self)[PLAN].has_discarded())
        with torch.inference_mode(False):  # nothing would count the writes to inference tensors
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        vars(self)[PLAN].suspect()
        self._resfuse_fold_ahead()
        return self

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        require_weights(vars(self)[PLAN].has_discarded())
        return super().load_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        vars(self)[PLAN].suspect()

    def _resfuse_fold_ahead(self) -> None:
        """Folds the weights, unless they are about to be trained."""
        if not (self.training and TRAINING_PLAN in vars(self)):
            vars(self)[PLAN].fold_ahead()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Returns a pickle of the layers, from which the plan is made again."""
        require_weights(vars(self)[PLAN].has_discarded())
        state = {k: v for k, v in vars(self).items() if k not in _OURS}
        return _empty, (original_class(self), self._resfuse_plan_state()), state

    def _resfuse_plan_state(self) -> PlanState:
        """Returns the reasons why layers are not fused, in both modes, whether the weights are
        frozen, and what layers were asked to compute in. A copy of a part needs them, since it
        cannot see the whole model."""
        training = vars(self).get(TRAINING_PLAN)
        plan = vars(self)[PLAN]
        asked = {layer.name: layer.fold.asked for layer in plan.layers}
        return plan.unfused, None if training is None else training.unfused, plan.frozen, asked

    def __setstate__(self, state: dict[str, Any]) -> None:
        plan_state = vars(self).pop(_PLAN_STATE)
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        _attach_anew(self, plan_state)

    def __prepare_scriptable__(self) -> Any:
        raise RuntimeError(
            "a fused module cannot be scripted: call torch.jit.script on unfuse(model), or on what "
            "was fused"
        )


class FusedGraphModule(FusedModule):
    """Mixed into the class of a GraphModule while it is fused.

    A GraphModule has a class to itself, which `recompile` gives another forward. It also has ways
    of its own to be copied and pickled, which see it as it was before it was fused.
    """

    @contextmanager
    def _resfuse_as_it_was(self) -> Iterator[None]:
        require_weights(vars(self)[PLAN].has_discarded())
        kind, ours = type(self), {k: v for k, v in vars(self).items() if k in _OURS}
        detach(self)
        try:
            yield
        finally:
            self.__class__ = kind
            vars(self).update(ours)

    def recompile(self) -> Any:
        """Compiles the changed graph, and makes a new plan from it."""
        with self._resfuse_as_it_was():
            code = self.recompile()
        plan_state = self._resfuse_plan_state()
        detach(self)
        _attach_anew(self, plan_state)
        return code

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        with self._resfuse_as_it_was():
            twin = deepcopy(self, memo)
        twin.training = self.training
        return _attach_anew(twin, self._resfuse_plan_state())

    def __copy__(self) -> Any:
        with self._resfuse_as_it_was():
            twin = copy(self)
        twin.training = self.training
        return _attach_anew(twin, self._resfuse_plan_state())

    def __reduce_ex__(self, protocol: Any) -> Any:
        with self._resfuse_as_it_was():
            reduced = self.__reduce__()
        assert isinstance(reduced, tuple)
        return _made_anew, (*reduced[:2], self.training, self._resfuse_plan_state())


def _made_anew(make: Any, arguments: Any, training: bool, plan_state: PlanState) -> nn.Module:
    """Returns a fused GraphModule from the contents of a pickle."""
    module = make(*arguments)
    module.training = training
    return _attach_anew(module, plan_state)


def _attach_anew(module: nn.Module, plan_state: PlanState) -> nn.Module:
    """Makes a module's plans again and attaches them."""
    why_skipped, left_in_training, frozen, asked = plan_state
    module.__class__ = original_class(module)
    plan = (
        make_plan(module, _reasons(module, why_skipped).get).plan
        or sequence_plan(module)
        or pass_through_plan(module, why_skipped)
    )
    if left_in_training is not None:
        training = make_training_plan(module, _reasons(module, left_in_training).get)
        attach(module, plan or empty_plan(module), training)
    elif plan is not None:
        attach(module, plan)
    if plan is not None:
        plan.frozen = frozen
        for layer in plan.layers:
            layer.ask_for(asked.get(layer.name, "own"))
        plan.take_over_submodules(module, known_forwards(module))
    return module


def _reasons(module: nn.Module, by_name: dict[str, str]) -> dict[nn.Module, str]:
    named = dict(module.named_modules())
    return {named[name]: reason for name, reason in by_name.items() if name in named}


def attach(module: nn.Module, plan: Plan, training: TrainingPlan | None = None) -> None:
    """Gives a module a plan, and one for training mode."""
    vars(module)[PLAN] = plan
    vars(module)[STEPS] = Steps(plan.steps | plan.calls)
    if training is not None:
        vars(module)[TRAINING_PLAN] = training
        vars(module)[TRAINING_STEPS] = Steps(training.steps)
    if original_class(module) is type(module):
        module.__class__ = _fused_class(type(module))
    assert isinstance(module, FusedModule)
    module._resfuse_fold_ahead()


def detach(module: nn.Module) -> None:
    module.__class__ = original_class(module)
    for name in _OURS:
        vars(module).pop(name, None)


def empty_plan(module: nn.Module) -> Plan:
    """Returns a plan without forwards, for a module that is fused in training mode only."""
    return Plan(module, {}, {}, [], {})


_OURS = (PLAN, STEPS, TRAINING_PLAN, TRAINING_STEPS)


_classes: dict[type[nn.Module], type[nn.Module]] = {}


def _fused_class(kind: type[nn.Module]) -> type[nn.Module]:
    if kind not in _classes:
        name = kind.__name__ if kind.__name__.startswith("Fused") else f"Fused{kind.__name__}"
        body = {"__module__": kind.__module__, "forward": _forward_in(kind), ORIGINAL: kind}
        if issubclass(kind, GraphModule):  # its class is its own, and goes with it
            return type(name, (FusedGraphModule, kind), body)
        _classes[kind] = type(name, (FusedModule, kind), body)
    return _classes[kind]


def _forward_in(kind: type[nn.Module]) -> Forward:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not self.training:
            result = vars(self)[PLAN].run(self, args, kwargs)
            if result is not NOT_RUN:
                return result
        elif (training := vars(self).get(TRAINING_PLAN)) is not None:
            result = training.run(self, args, kwargs)
            if result is not NOT_RUN:
                return result
        require_weights(vars(self)[PLAN].has_discarded())
        return kind.forward(self, *args, **kwargs)

    # torch.fx and exporters match arguments by the signature of what is wrapped.
    forward.__wrapped__ = kind.forward  # type: ignore[attr-defined]
    forward.__signature__ = inspect.signature(kind.forward)  # type: ignore[attr-defined]
    return forward


def _empty(kind: type[nn.Module], plan_state: PlanState) -> nn.Module:
    fused = _fused_class(kind)
    module = fused.__new__(fused)
    vars(module)[_PLAN_STATE] = plan_state
    return module
