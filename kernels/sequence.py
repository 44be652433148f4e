"""A Sequential of fused blocks: what one block hands to the next is nobody else's, so the next may
add its residual in place. oneDNN then writes over what it reads, instead of fetching the lines of a
new tensor first.
"""

from itertools import pairwise
from typing import Any

from torch import nn

from resfuse.kernels.plan import NOT_RUN, Plan, plan_of
from resfuse.kernels.scope import Call, is_plain_sequence, original_class


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
    return Plan(module, {Call(1): _run}, {}, list(module._modules), {}, children=[module])


def _run(sequence: nn.Sequential, x: Any) -> Any:
    """Sequential.forward; the plan has seen to it that the children have no hooks."""
    owned = False
    for child in sequence._modules.values():
        assert child is not None
        plan = plan_of(child)
        result = NOT_RUN if plan is None or child.training else plan.run(child, (x,), {}, owned)
        if plan is None or result is NOT_RUN:
            x, owned = child(x), False
        else:
            x, owned = result, plan.returns_fresh
    return x
