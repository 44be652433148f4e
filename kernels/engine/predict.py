"""plan_for: predicts from a GPU's data sheet what build_engine would plan on it."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from resfuse.kernels.engine.cost.gpus import Gpu, gpu_named
from resfuse.kernels.engine.cost.roofline_cost import RooflineCost
from resfuse.kernels.engine.frontend.export import capture, is_in_training
from resfuse.kernels.engine.ir.graph import Graph
from resfuse.kernels.engine.plan_table import table
from resfuse.kernels.engine.planning.candidates import find_candidates
from resfuse.kernels.engine.planning.planner import Segment, TimedCandidate, plan
from resfuse.kernels.engine.quantization.quantized_graph import unseen_int8
from resfuse.kernels.engine.tactics import TACTICS, TacticModule, tactics_for
from resfuse.kernels.ops.conv_problem import math_mode_of
from resfuse.kernels.ops.quantization import QUANTIZED_DTYPES


@dataclass(frozen=True)
class Prediction:
    """A plan with predicted times; nothing has been run."""

    gpu: Gpu
    graph: Graph
    segments: tuple[Segment, ...]

    @property
    def ms(self) -> float:
        """Returns the predicted ms of the whole network."""
        return sum(segment.ms for segment in self.segments)

    def explain(self) -> str:
        """Returns a table of the segments like Engine.explain's, with predicted times."""
        dtype = self.graph.values[self.graph.input].dtype
        mode = "int8" if self.graph.dtype in QUANTIZED_DTYPES else math_mode_of(dtype)
        source = (
            f"Times are predicted by the roofline, not measured: {self.gpu.name}'s data sheet, "
            f"{self.gpu.tflops[mode]:g} TFLOP/s in {mode} and {self.gpu.tb_per_s:g} TB/s, as if "
            "every kernel reached them."
        )
        return table(self.graph, self.segments, None, source)


def plan_for(
    model: nn.Module,
    example: Tensor,
    gpu: str = "h200",
    *,
    tactics: Collection[str] | None = None,
    precision: str | None = None,
) -> Prediction:
    """Plans a model in eval mode for a GPU from GPUS, at the shape and dtype of `example`.

    No candidate is left out as wrong, since kernels can only be checked where they run.

    Args:
        model: a module on any device, meta included; its weights are not read.
        example: an input [N, C, H, W] on any device.
        gpu: a name in GPUS.
        tactics: names in TACTICS of tactics for GPUs, by default all of them.
        precision: "int8" for a float32 model's plan in int8, which needs no calibration: times do
            not depend on ranges. By default the model's own.

    Raises:
        ValueError: the GPU, a tactic or the precision is unknown, the model cannot be captured or
            is in training mode, or none of `tactics` computes some node.
    """
    device = gpu_named(gpu)
    if is_in_training(model):
        raise ValueError("argument model: it is in training mode; call model.eval() first")
    if precision not in (None, "int8"):
        raise ValueError(f"argument precision: {precision!r}; accepted: int8")
    graph, state = capture(model, example)
    if precision == "int8":
        graph = unseen_int8(graph, state)[0]
    offered = _offered(tactics)
    timed = predicted(graph, offered, RooflineCost(graph, device))
    return Prediction(device, graph, plan(graph, timed).segments)


def predicted(
    graph: Graph, tactics: Mapping[str, TacticModule], cost: RooflineCost
) -> list[TimedCandidate]:
    """Returns all candidates for a graph, each with its predicted time."""
    every = (candidate for group in find_candidates(graph, tactics) for candidate in group)
    return [TimedCandidate(candidate, cost(candidate)) for candidate in every]


def _offered(names: Collection[str] | None) -> dict[str, TacticModule]:
    known = {
        name: module
        for name, module in tactics_for("cuda").items()
        if TACTICS[name].devices is not None or name == "eager"
    }
    if names is None:
        return known
    for name in names:
        if name not in known:
            raise ValueError(
                f"argument tactics: {name!r} is not known; accepted: {', '.join(known)}"
            )
    return {name: module for name, module in known.items() if name in names}
