"""build_engine: compiles a whole network for its shapes and the device at hand.

The idea and the terms are TensorRT's. A network goes through these steps, each a function of the
results before it; only tuning measures:

capture     the model as a graph, a node for each operation (frontend/export.py)
passes      batch norms, activations and sums merged into convolutions (frontend/merge.py); values
            in bfloat16, where that is asked for (frontend/graph_precision.py)
candidates  every tactic, in every configuration, for every run of nodes (planning/candidates.py)
tune        the time of each candidate that gives the right answer (tuning/tuner.py)
plan        the cheapest cover of the nodes by candidates (planning/planner.py), with early stages
            in chunks of a few images where that is faster (planning/chunking.py)
place       an offset in one arena for each value (runtime/placement.py)
bind        native steps and torch calls on those addresses (runtime/executor.py)
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from resfuse.kernels.cpu.cpus import asking, require_threads
from resfuse.kernels.engine.cost.ceilings import Ceilings
from resfuse.kernels.engine.engine import Engine, OtherBatches, OtherShapes
from resfuse.kernels.engine.frontend.batching.any_batch import batch_of, require_paddable
from resfuse.kernels.engine.frontend.export import capture, is_in_training
from resfuse.kernels.engine.frontend.graph_precision import in_precision
from resfuse.kernels.engine.ir.derived_state import with_derived
from resfuse.kernels.engine.ir.graph import Graph, State
from resfuse.kernels.engine.ir.graph_state import state_names
from resfuse.kernels.engine.memory.buffers import WeightStore
from resfuse.kernels.engine.planning.candidates import find_candidates
from resfuse.kernels.engine.planning.chunking import chunk_stages, with_chunks
from resfuse.kernels.engine.planning.liveness import with_memory
from resfuse.kernels.engine.planning.planner import Plan, Segment, plan
from resfuse.kernels.engine.quantization.calibration_images import Images
from resfuse.kernels.engine.quantization.given_scales import with_given_scales
from resfuse.kernels.engine.quantization.pixels import Pixels, from_pixels
from resfuse.kernels.engine.quantization.quantization_recipe import (
    QuantizationRecipe,
    on_cpu,
    quantization_recipe,
)
from resfuse.kernels.engine.quantization.quantized_graph import quantized
from resfuse.kernels.engine.quantization.ranges import Ranges
from resfuse.kernels.engine.runtime.default_device import without_meta
from resfuse.kernels.engine.runtime.fallback import with_weights
from resfuse.kernels.engine.runtime.own_weights import copied_names, copies, require_usable
from resfuse.kernels.engine.shapes.bound_plan import bind
from resfuse.kernels.engine.shapes.shape_plans import ShapePlans
from resfuse.kernels.engine.tactics import TACTICS, tactics_on
from resfuse.kernels.engine.tuning.tuner import Tuner
from resfuse.kernels.ops.asked_precision import Precision
from resfuse.kernels.ops.quantization import STORED_ON
from resfuse.kernels.tuning_cache.timing_cache import TimingCache, known


@without_meta()
def build_engine(
    model: nn.Module,
    example: Tensor,
    *,
    batch_sizes: Sequence[int] | None = None,
    shapes: Sequence[Sequence[int]] | None = None,
    other_batches: OtherBatches = "error",
    other_shapes: OtherShapes = "error",
    max_shapes: int = 8,
    timings: Path | None = None,
    keep_weights: bool = True,
    cuda_graph: bool = True,
    tiling: bool | None = None,
    threads: int | None = None,
    precision: str | None = None,
    keep: Sequence[str] = (),
    calibration: Ranges | Images | None = None,
    max_error: float | None = None,
    pixels: Pixels | None = None,
) -> Engine:
    """Compiles a model in eval mode for the shape, dtype and device of `example`, or for several
    shapes that share their weights.

    Args:
        model: a module whose forward takes one tensor and whose control flow does not depend on
            its values.
        example: an input [N, C, H, W].
        batch_sizes: the batch sizes to build for, by default the example's.
        shapes: the input shapes to build for, instead of batch sizes of the example's images.
        other_batches: what to do with other batch sizes of images built for: raise ("error"); fill
            up to the next size built, if it is proved that images do not depend on each other
            ("pad"); or run a copy of the model ("eager").
        other_shapes: what to do with shapes for which there is no plan after that: raise ("error"),
            or build for the shape when it is first called ("build"), which takes as long as any
            build.
        max_shapes: the most shapes that calls may add; the one not used for longest makes room.
        timings: a folder for measured times, by default one in the user's cache.
        keep_weights: whether to store a copy of the weights, which `save` and `refresh` need.
            Otherwise the engine only has them in the tactics' layouts, and copies those that
            torch's operations read.
        cuda_graph: whether to record each batch size as a CUDA graph; ignored on a CPU.
        tiling: whether to run early stages a few images at a time where that is faster, so that
            values between layers stay in a cache (TensorRT's tiling optimization). To find out,
            whole stages are built and timed in four ways each: seconds on a CPU, where it is on by
            default, and an estimated 15 to 30 s for ResNet-50 at batch 256 on a GPU, where it is
            off by default, and the whole network is also tried as two halves of the batch on two
            streams.
        threads: the number of threads for native steps on a CPU; torch's own operations use
            torch's. By default as many as there are CPUs to use (affinity, cgroup quota), but no
            more than torch.get_num_threads() returns now and at each call.
        precision: what is computed inside, "fp32", "bf16" or "int8", by default the model's own.
            With
            "bf16" a float32 model still takes and returns float32; on a CPU its convolutions,
            linear layers and what follows them compute on values and weights in bfloat16, add up
            in float32, and round each result once. Batch norms are folded before weights are
            rounded; biases, slopes and norms stay float32. With "int8" convolutions, linear layers
            and what lies between them compute on 8-bit integers, whose scales come from
            `calibration`, on a CPU or on an NVIDIA GPU of compute capability 8.0 or newer; the
            engine takes no other weights later (`refresh`), and where an input is NaN its output is
            some number. A model that rounds to 8-bit integers itself, as
            `load_onnx` reads a quantised file, is computed in int8 on a CPU, by its own scales,
            unless a precision is asked for.
        keep: with "bf16" or "int8", patterns as fnmatch has them ("layer4.*") of names of modules
            or parameters, whose convolutions and linear layers are computed in float32.
        calibration: with "int8", images like those that the engine will see, or the ranges that
            `calibrate` has found for them. Images are on the CPU, where a copy of the model runs on
            them, wherever the model is.
        max_error: with "int8" and images, the largest relative error of the outputs that is
            accepted on them, as a share of their norm in float32. The layers that quantisation
            harms most are computed in float32 until it is met.
        pixels: how images in uint8 are normalised, Pixels(mean=(0.485, ...), std=(0.229, ...)): the
            engine then takes pixels, and answers what the model answers for (x / 255 - mean) / std.
            `example` and the images of `calibration` are uint8, too. CPU only.

    Raises:
        ValueError: the model is in training mode, cannot be captured or recorded as a CUDA graph,
            or has a weight that is not finite; a batch size, a shape, `max_shapes` or `threads` is
            below one; or the precision is unknown, or not for this model or device, or a pattern of
            `keep` matches no layer; or there is no calibration for "int8", or one of another model;
            or `pixels` does not fit the example.
    """
    require_threads(threads)
    usable = isinstance(example, Tensor) and example.layout == torch.strided
    if not usable or example.dim() < 2 or not example.shape[0]:
        raise ValueError("argument example: accepted: one dense tensor [N, C, H, W], not empty")
    if is_in_training(model):
        raise ValueError("argument model: it is in training mode; call model.eval() first")
    if other_batches not in ("error", "pad", "eager"):
        raise ValueError(f"argument other_batches: {other_batches!r}; accepted: error, pad, eager")
    if other_shapes not in ("error", "build"):
        raise ValueError(f"argument other_shapes: {other_shapes!r}; accepted: error, build")
    if type(max_shapes) is not int or max_shapes < 1:
        raise ValueError(f"argument max_shapes: {max_shapes!r}; accepted: 1 and more")
    wanted = Precision.asked(precision, keep, ("fp32", "bf16", "int8"))
    as_given = example
    if pixels is not None:
        if not isinstance(pixels, Pixels):
            raise ValueError(f"argument pixels: {type(pixels).__name__}; accepted: Pixels")
        pixels.require_fit(example)
        as_given, calibration = pixels.normalized(example), pixels.calibration(calibration)
    wanted.require_fit(model, as_given.dtype, example.device)
    if precision == "int8" and example.device.type == "cuda":
        refused = TACTICS["int8"].load().refusal(example.device, torch.float32)
        if refused is not None:
            raise ValueError(f"argument precision: 'int8' on {example.device}: {refused}")
    recipe = None
    if precision == "int8" or calibration is not None or max_error is not None:
        recipe = quantization_recipe(*on_cpu(model, as_given), wanted, calibration, max_error)
    planner = _Planner(
        TimingCache(example.device, timings), tiling, keep_weights, wanted, recipe, pixels
    )
    with asking(threads):
        state, plans = _planned(planner, model, _examples(example, batch_sizes, shapes))
        if other_batches == "pad":
            for image in plans.images:
                first = plans[plans.batch_sizes(image)[0], *image]
                given = _resized(as_given, first.shape)
                require_paddable(model, given, plans.graphs(image), state, planner.capture)
        own_model = None
        if other_batches == "eager" or other_shapes == "build":
            own_model = with_weights(model, state if keep_weights else {})
        return Engine(
            plans.values(),
            state,
            other_batches=other_batches,
            other_shapes=other_shapes,
            max_shapes=max_shapes,
            model=own_model,
            planner=planner if other_shapes == "build" else None,
            ceilings=_ceilings(example.device, plans.find().graph.dtype, planner.cache),
            keep_weights=keep_weights,
            cuda_graph=cuda_graph,
            threads=threads,
            recipe=recipe,
            pixels=pixels,
        )


def _ceilings(device: torch.device, dtype: torch.dtype, cache: TimingCache) -> Ceilings | None:
    """Returns the ceilings of a device; None for int8, in which torch multiplies no matrices at a
    speed that would tell anything (1 GFLOP/s on a Zen 3)."""
    return Ceilings(device, dtype, cache) if dtype.is_floating_point else None


@dataclass(frozen=True)
class _Planner:
    """Plans a model for the shape of an input; see engine.Planner."""

    cache: TimingCache
    tiling: bool | None
    keep_weights: bool
    precision: Precision
    recipe: QuantizationRecipe | None
    pixels: Pixels | None

    def capture(self, model: nn.Module, example: Tensor) -> tuple[Graph, dict[str, Tensor]]:
        """Returns the graph of a model in the precision asked for, and its state by name.

        Args:
            example: an input of the model, or pixels.
        """
        if self.pixels is None:
            return self._computed(model, example)
        if example.dtype == torch.uint8:
            example = self.pixels.normalized(example)
        graph, state = self._computed(model, example)
        graph, more = from_pixels(graph, self.pixels)
        return graph, state | more

    def _computed(self, model: nn.Module, example: Tensor) -> tuple[Graph, dict[str, Tensor]]:
        graph, state = capture(model, example)
        if self.recipe is None:
            if self.precision.name is None and example.device.type == "cpu":
                graph = with_given_scales(graph, state)
            return in_precision(graph, self.precision), state
        stored_as = STORED_ON[example.device.type]
        ranges, kept = self.recipe.ranges, self.recipe.kept
        graph, corrections = quantized(graph, state, ranges, kept, stored_as)
        return graph, state | corrections

    def __call__(
        self, model: nn.Module, example: Tensor, state: State
    ) -> tuple[Graph, tuple[Segment, ...], dict[str, Tensor]]:
        graph, captured = self.capture(model, example)
        new = {name: captured[name] for name in sorted(state_names(graph)) if name not in state}
        known = {**state, **copies(new, copied_names(graph, self.keep_weights))}
        require_usable([graph], known, graph.constants, "model")
        whole = with_derived(graph, known)
        segments = tuned_plan(graph, whole, example.device, self.cache, self.tiling).segments
        return graph, tuple(segments), known


def _planned(
    planner: _Planner, model: nn.Module, examples: Iterable[Tensor]
) -> tuple[dict[str, Tensor], ShapePlans]:
    """Returns a plan for the shape of each example, and the weights of all."""
    state: dict[str, Tensor] = {}
    plans, weight_store = [], WeightStore()
    for example in examples:
        graph, segments, state = planner(model, example, state)
        plans.append(bind(graph, segments, state, weight_store))
    return state, ShapePlans(plans)


def _examples(
    example: Tensor, batch_sizes: Sequence[int] | None, shapes: Sequence[Sequence[int]] | None
) -> list[Tensor]:
    """Returns an example for each shape to build for."""
    if shapes is None:
        if not isinstance(batch_sizes, Sequence | None):
            raise ValueError(
                f"argument batch_sizes: {type(batch_sizes).__name__}; accepted: a list of numbers"
            )
        sizes = sorted(set(batch_sizes or [example.shape[0]]))
        if sizes[0] < 1:
            raise ValueError(f"argument batch_sizes: {sizes[0]}; accepted: 1 and more")
        return [batch_of(example, size) for size in sizes]
    if batch_sizes is not None:
        raise ValueError("argument shapes: given beside batch_sizes; accepted: one of the two")
    if not isinstance(shapes, Sequence):
        raise ValueError(f"argument shapes: {type(shapes).__name__}; accepted: a list of shapes")
    asked = [tuple(shape) if isinstance(shape, Sequence) else (shape,) for shape in shapes]
    for shape in asked:
        if len(shape) != example.dim() or not all(type(n) is int and n > 0 for n in shape):
            raise ValueError(
                f"argument shapes: {shape}; accepted: {example.dim()} sizes of 1 and more each, as "
                "many as the example has"
            )
    if not asked:
        raise ValueError("argument shapes: there is none; accepted: one or more")
    return [_resized(example, shape) for shape in dict.fromkeys(asked)]


def _resized(example: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Returns an input of a shape, of the example's numbers and memory format."""
    if shape[1:] == example.shape[1:]:
        return batch_of(example, shape[0])
    count, flat = math.prod(shape), example.detach().reshape(-1)
    resized = flat.repeat(-(-count // len(flat)))[:count].view(shape)
    if example.is_contiguous() or example.dim() != 4:
        return resized
    return resized.contiguous(memory_format=torch.channels_last)


def tuned_plan(
    graph: Graph,
    state: State,
    device: torch.device,
    cache: TimingCache,
    tiling: bool | None = None,
) -> Plan:
    """Times the candidates of a graph on a device and returns the best plan.

    Args:
        tiling: see `build_engine`.
    """
    tactics = tactics_on(device, graph.given_dtype)
    groups = find_candidates(graph, tactics)
    tuner = Tuner(graph, state, device, tactics, cache, known(device))
    tiled = tiling if tiling is not None else device.type != "cuda"
    while True:
        timed = with_memory(graph, tactics, tuner.tune(groups))
        planned = plan(graph, timed)
        if tiled:
            stages = chunk_stages(graph, tactics, timed)
            times = tuner.tune_in_turns(stage.candidates for stage in stages)
            planned = with_chunks(planned, stages, with_memory(graph, tactics, times))
        if tuner.confirm(segment.candidate for segment in planned.segments):
            return planned
        # Otherwise plan again without the candidates that are barred now.
