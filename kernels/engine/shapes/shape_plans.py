"""ShapePlans: the plans of an engine by the shape of their input."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch

from resfuse.kernels.engine.frontend.batching.image_dimension import Images
from resfuse.kernels.engine.frontend.batching.image_independence import images_at_all_sizes
from resfuse.kernels.engine.ir.graph import Graph, State, Value
from resfuse.kernels.engine.ir.graph_state import state_names
from resfuse.kernels.engine.memory.buffers import WeightStore
from resfuse.kernels.engine.shapes.bound_plan import BoundPlan, bind

Shape = tuple[int, ...]


class ShapePlans(Mapping[Shape, BoundPlan]):
    """Plans of the same weights: images in ascending order of their shapes, and of an image its
    batch sizes. It does not change, so threads may read it while an engine gets another."""

    def __init__(self, plans: Iterable[BoundPlan]) -> None:
        by_shape = {plan.shape: plan for plan in plans}
        self._plans = dict(sorted(by_shape.items(), key=lambda item: (item[0][1:], item[0][0])))

    def __getitem__(self, shape: Shape) -> BoundPlan:
        return self._plans[shape]

    def __iter__(self) -> Iterator[Shape]:
        return iter(self._plans)

    def __len__(self) -> int:
        return len(self._plans)

    @property
    def input(self) -> Value:
        """Returns the input of the first plan, of the dtype and the dimensions of all."""
        graph = next(iter(self.values())).graph
        return graph.values[graph.input]

    def device(self, state: State) -> torch.device:
        """Returns the device of the model's weights; without any, that of the constants."""
        constants = self.constants()
        weights = [*(t for n, t in state.items() if n not in constants), *state.values()]
        known = next(iter(self.values())).graph.device
        return next((tensor.device for tensor in weights), known or torch.device("cpu"))

    @property
    def images(self) -> tuple[Shape, ...]:
        """Returns the shapes without the batch."""
        return tuple(dict.fromkeys(shape[1:] for shape in self))

    def batch_sizes(self, image: Shape | None = None) -> tuple[int, ...]:
        """Returns the batch sizes for images of a shape, or of any, in ascending order."""
        return tuple(sorted({shape[0] for shape in self if image in (None, shape[1:])}))

    def graphs(self, image: Shape) -> dict[int, Graph]:
        """Returns the graphs for images of a shape by batch size."""
        return {size: self[size, *image].graph for size in self.batch_sizes(image)}

    def images_of_outputs(self, state: State) -> dict[Shape, tuple[Images, ...] | None]:
        """Returns where the images are in the outputs, for each shape of an image.

        Raises:
            ValueError: as `images_at_all_sizes`.
        """
        return {image: images_at_all_sizes(self.graphs(image), state) for image in self.images}

    def constants(self) -> set[str]:
        """Returns the names of the weights that are not in the model's state_dict."""
        return {name for plan in self.values() for name in plan.graph.constants}

    def state_names(self) -> set[str]:
        """Returns the names of the weights that some plan needs."""
        return {name for plan in self.values() for name in state_names(plan.graph)}

    def with_weights(self, state: State) -> "ShapePlans":
        """Returns the plans bound to other weights and arenas of their own."""
        weight_store = WeightStore()
        return ShapePlans(
            bind(plan.graph, plan.segments, state, weight_store) for plan in self.values()
        )

    def find(self, batch_size: int | None = None, shape: Sequence[int] | None = None) -> BoundPlan:
        """Returns the plan for a shape, or the one for the largest images of a batch size, or for
        the largest input of all.

        Raises:
            ValueError: there is none.
        """
        if shape is not None:
            if tuple(shape) not in self:
                built = ", ".join(map(written, self))
                raise ValueError(
                    f"argument shape: {tuple(shape)}; this engine was built for {built}"
                )
            return self[tuple(shape)]
        sizes = self.batch_sizes()
        if batch_size is not None and batch_size not in sizes:
            raise ValueError(
                f"argument batch_size: {batch_size}; this engine was built for "
                f"{', '.join(map(str, sizes))}"
            )
        found = [shape for shape in self if batch_size in (None, shape[0])]
        return self[max(found, key=math.prod)]


def written(shape: Shape) -> str:
    """Returns a shape such as `1x3x224x224`."""
    return "x".join(map(str, shape))
