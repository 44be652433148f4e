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
    plans: Mapping[int, Plan],
    state: Mapping[str, Tensor],
    device: torch.device,
    allow: Collection[str],
) -> dict[int, Plan]:
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
    for size, (graph, segments) in plans.items():
        require_wired(graph)
        shape, own = graph.values[graph.input].shape, first.values[first.input].shape
        same = (size, *own[1:]) == shape and size > 0 and graph.spec == first.spec
        if not same or len(graph.outputs) != len(first.outputs):
            raise Unsound(f"the plan for a batch of {size} takes or returns something else")
        require_spec(graph.spec, len(graph.outputs))
        ShapeInference(graph, state, device, allow).require()
        tactics = tactics_on(device, graph.values[graph.input].dtype)
        checked[size] = graph, tuple(offered_segments(graph, segments, tactics))
    return checked
