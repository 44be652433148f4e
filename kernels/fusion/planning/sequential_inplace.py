"""The plan of a Sequential with fused blocks in it."""

from itertools import pairwise

from torch import nn

from resfuse.kernels.fusion.planning.forwards import Forwards
from resfuse.kernels.fusion.planning.plan import Plan, plan_of
from resfuse.kernels.fusion.planning.sequence_forwards import SequenceForwards
from resfuse.kernels.fusion.tracing.module_tracing import Call, is_plain_sequence, original_class


def sequence_plan(module: nn.Module) -> Plan | None:
    """The plan of a Sequential with two fused blocks in a row; None for anything else."""
    if (
        not isinstance(module, nn.Sequential)
        or original_class(module).forward is not nn.Sequential.forward
        or is_plain_sequence(module)
    ):
        return None
    if any(type(child).__call__ is not nn.Module.__call__ for child in module):
        return None
    plans = [plan_of(child) for child in module]
    if not any(a is not None and b is not None for a, b in pairwise(plans)):
        return None
    forwards: dict[Call, Forwards] = {Call(1): SequenceForwards(module)}
    return Plan(module, forwards, {}, list(module._modules), {}, children=[module])
