"""Checks that a plan read from a file is one that build_engine could have made. Whatever follows
from the graph is inferred again and must equal what the file says; offsets and lifetimes of values
are never read from a file.
"""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from resfuse.kernels.engine.ir.graph import Graph
from resfuse.kernels.engine.planning.planner import Segment
from resfuse.kernels.engine.saving.graph_structure import Unsound, require_spec, require_wired
from resfuse.kernels.engine.saving.offered_candidates import offered_segments
from resfuse.kernels.engine.saving.shape_inference import ShapeInference
from resfuse.kernels.engine.tactics import tactics_on

Plan = tuple[Graph, tuple[Segment, ...]]


def checked_plans(
    plans: Mapping[tuple[int, ...], Plan],
    state: Mapping[str, Tensor],
    device: torch.device,
    allow: Collection[str],
) -> dict[tuple[int, ...], Plan]:
    """Returns the plans, with the equal candidates that this version's tactics offer.

    Args:
        allow: names of operations to accept besides those known to only compute.

    Raises:
        Unsound: build_engine would not make such a plan.
    """
    if not plans:
        raise Unsound("there is none")
    first = next(iter(plans.values()))[0]
    checked = {}
    for shape, (graph, segments) in plans.items():
        require_wired(graph)
        value, other = graph.values[graph.input], first.values[first.input]
        alike = (value.dtype, value.quantization) == (other.dtype, other.quantization)
        same = alike and len(shape) == len(other.shape) and min(shape) > 0
        if shape != value.shape or not same:
            raise Unsound(f"the plan for {'x'.join(map(str, shape))} takes something else")
        require_spec(graph.spec, len(graph.outputs))
        ShapeInference(graph, state, device, allow).require()
        tactics = tactics_on(device, graph.given_dtype)
        checked[shape] = graph, tuple(offered_segments(graph, segments, tactics))
    return checked
