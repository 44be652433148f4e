"""Plans a model for the shape of an input that an engine has no plan for yet."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor, nn

from resfuse.kernels.engine.frontend.batching.any_batch import require_paddable
from resfuse.kernels.engine.frontend.batching.image_dimension import Images
from resfuse.kernels.engine.frontend.batching.image_independence import images_at_all_sizes
from resfuse.kernels.engine.ir.graph import Graph
from resfuse.kernels.engine.planning.planner import Segment
from resfuse.kernels.engine.quantization.pixels import Pixels
from resfuse.kernels.engine.shapes.bound_plan import BoundPlan, bind
from resfuse.kernels.engine.shapes.shape_plans import ShapePlans


class Planner(Protocol):
    """Plans a model for the shape of an input."""

    def __call__(
        self, model: nn.Module, example: Tensor, state: Mapping[str, Tensor]
    ) -> tuple[Graph, Sequence[Segment], dict[str, Tensor]]:
        """Returns a graph and its segments, and the weights with its constants."""
        ...

    def capture(self, model: nn.Module, example: Tensor) -> tuple[Graph, dict[str, Tensor]]:
        """Returns the graph alone, and its weights."""
        ...


class NewShape(NamedTuple):
    """A plan for one more shape.

    Attributes:
        images: where the images are in its outputs, if batches are to be filled up.
        state: the weights with the plan's constants.
    """

    plan: BoundPlan
    images: tuple[Images, ...] | None
    state: dict[str, Tensor]


def plan_new_shape(
    planner: Planner,
    model: nn.Module,
    x: Tensor,
    state: Mapping[str, Tensor],
    plans: ShapePlans,
    *,
    pad: bool,
    pixels: Pixels | None,
) -> NewShape:
    """Plans a model for the shape of an input, around the weights that other plans have.

    Args:
        state: the weights of `plans`, with their constants.
        pad: whether smaller batches are to be filled up to this one.
        pixels: what makes `model`'s input of `x`, where that is pixels.

    Raises:
        ValueError: there can be no plan for the shape, or none for batches that are filled up.
    """
    graph, segments, known = planner(model, x.detach().clone(), state)
    images = None
    if pad:
        graphs = {**plans.graphs(tuple(x.shape[1:])), x.shape[0]: graph}
        example = x.detach().clone()
        if pixels is not None:
            example = pixels.normalized(example)
        require_paddable(model, example, graphs, known, planner.capture)
        images = images_at_all_sizes(graphs, known)
    plan = bind(graph, segments, known, plans.find().executor.weight_store)
    return NewShape(plan, images, known)
