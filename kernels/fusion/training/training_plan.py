"""A module's forward for training mode, and when it may run in the original's place."""

from typing import Any

import torch
from torch import nn

from resfuse.kernels.fusion.layers.fast_path import Forward
from resfuse.kernels.fusion.planning.call_checks import are_plain, is_watched
from resfuse.kernels.fusion.planning.plan import NOT_RUN, watch
from resfuse.kernels.fusion.tracing.guards import Guards
from resfuse.kernels.fusion.tracing.module_tracing import Call
from resfuse.kernels.fusion.training.training_layers import AnyTrainingStep
from resfuse.kernels.observation.observed import Observed

TRAINING_PLAN = "_resfuse_training_plan"  # the attribute of a module that holds its plan
TRAINING_STEPS = "_resfuse_training_steps"


class TrainingPlan:
    """How a module's forward runs in training mode, by the number of its arguments."""

    def __init__(
        self,
        module: nn.Module,
        forwards: dict[Call, Forward],
        steps: dict[str, AnyTrainingStep],
        guarded: list[str],
        unfused: dict[str, str],
        observed: Observed | None = None,
    ) -> None:
        self.forwards, self.steps, self.unfused = forwards, steps, unfused
        locations = [watch(module, name) for name in guarded]
        layers = [layer for *_, layer in locations]
        self._guards = Guards(observed or Observed(), layers, locations=locations, module=module)

    def run(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs the rewritten forward if it computes what the original would; else returns NOT_RUN.

        Compilers and exporters are shown the layers, which inductor fuses itself.
        """
        call = Call(len(args))
        if kwargs or call not in self.forwards or torch.compiler.is_compiling():
            return NOT_RUN
        if is_watched() or not are_plain(args) or not self._guards.hold():
            return NOT_RUN
        return self.forwards[call](module, *args)


def training_plan_of(module: nn.Module) -> TrainingPlan | None:
    return vars(module).get(TRAINING_PLAN)
