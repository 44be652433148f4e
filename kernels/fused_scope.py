"""A scope that has been fused: the same module object, of a class that runs a rewritten forward
where that computes the same, and the original one everywhere else.

Like torch.nn.utils.parametrize, this gives the instance a subclass of its own class: parameters,
buffers, submodules, hooks and isinstance stay as they were, and taking the class back undoes it.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from resfuse.kernels.draft import make_plan
from resfuse.kernels.folded import require_weights
from resfuse.kernels.plan import NOT_RUN, PLAN, Forward, Plan
from resfuse.kernels.rewrite import STEPS
from resfuse.kernels.scope import ORIGINAL, original_class
from resfuse.kernels.sequence import sequence_plan
from resfuse.kernels.training.draft import make_training_plan
from resfuse.kernels.training.plan import TRAINING_PLAN, TRAINING_STEPS, TrainingPlan

_LEFT = "_resfuse_left"


class Steps:
    """A scope's steps as attributes: the generated forward calls `self._resfuse_steps.conv1(x)`."""

    def __init__(self, steps: Mapping[str, Any]) -> None:
        vars(self).update(steps)


class FusedScope(nn.Module):
    """Mixed into the class of a scope while it is fused."""

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
            super()._apply(fn, recurse)
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
        """Folds, unless the weights are about to be trained: a copy of them would be no use."""
        if not (self.training and TRAINING_PLAN in vars(self)):
            vars(self)[PLAN].fold_ahead()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles hold the layers; a plan is made again from them."""
        require_weights(vars(self)[PLAN].has_discarded())
        state = {k: v for k, v in vars(self).items() if k not in _OURS}
        training = vars(self).get(TRAINING_PLAN)
        plan = vars(self)[PLAN]
        left = plan.left, None if training is None else training.left, plan.frozen
        return _empty, (original_class(self), left), state

    def __setstate__(self, state: dict[str, Any]) -> None:
        left, left_in_training, frozen = vars(self).pop(_LEFT)
        super().__setstate__(state)
        self.__class__ = original_class(self)  # type: ignore[assignment]
        plan = make_plan(self, _reasons(self, left).get).plan or sequence_plan(self)
        if left_in_training is not None:
            training = make_training_plan(self, _reasons(self, left_in_training).get)
            attach(self, plan or empty_plan(self), training)
        elif plan is not None:
            attach(self, plan)
        if plan is not None:
            plan.frozen = frozen
            plan.adopt(self)


def _reasons(scope: nn.Module, left: dict[str, str]) -> dict[nn.Module, str]:
    return {scope.get_submodule(name): reason for name, reason in left.items()}


def attach(scope: nn.Module, plan: Plan, training: TrainingPlan | None = None) -> None:
    """Gives a scope a plan, and one for training mode."""
    vars(scope)[PLAN] = plan
    vars(scope)[STEPS] = Steps(plan.steps | plan.calls)
    if training is not None:
        vars(scope)[TRAINING_PLAN] = training
        vars(scope)[TRAINING_STEPS] = Steps(training.steps)
    if original_class(scope) is type(scope):
        scope.__class__ = _fused_class(type(scope))
    scope._resfuse_fold_ahead()  # type: ignore[operator]


def detach(scope: nn.Module) -> None:
    scope.__class__ = original_class(scope)
    for name in _OURS:
        vars(scope).pop(name, None)


def empty_plan(scope: nn.Module) -> Plan:
    """The plan of a scope that is fused in training mode only."""
    return Plan(scope, {}, {}, [], {})


_OURS = (PLAN, STEPS, TRAINING_PLAN, TRAINING_STEPS)


_classes: dict[type[nn.Module], type[nn.Module]] = {}


def _fused_class(kind: type[nn.Module]) -> type[nn.Module]:
    if kind not in _classes:
        name = kind.__name__ if kind.__name__.startswith("Fused") else f"Fused{kind.__name__}"
        body = {"__module__": kind.__module__, "forward": _forward_in(kind), ORIGINAL: kind}
        _classes[kind] = type(name, (FusedScope, kind), body)
    return _classes[kind]


def _forward_in(kind: type[nn.Module]) -> Forward:
    original = kind.forward

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
        return original(self, *args, **kwargs)

    # Exporters match arguments with dynamic shapes by the signature.
    forward.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    return forward


def _empty(
    kind: type[nn.Module], left: tuple[dict[str, str], dict[str, str] | None, bool]
) -> nn.Module:
    fused = _fused_class(kind)
    scope = fused.__new__(fused)
    vars(scope)[_LEFT] = left
    return scope
