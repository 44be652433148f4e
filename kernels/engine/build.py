"""build_engine: compiles a whole network for its shapes and the device at hand.

The idea and the terms are TensorRT's. A network goes through these steps, each a function of the
results before it; only tuning measures:

capture     the model as a graph, a node for each operation (frontend/export.py)
passes      batch norms, activations and sums merged into convolutions (frontend/merge.py)
candidates  every tactic, in every configuration, for every run of nodes (planning/candidates.py)
tune        the time of each candidate that gives the right answer (tuning/tuner.py)
plan        the cheapest cover of the nodes by candidates (planning/planner.py), with early stages
            in chunks of a few images where that is faster (planning/chunking.py)
place       an offset in one arena for each value (runtime/placement.py)
bind        native steps and torch calls on those addresses (runtime/executor.py)
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from resfuse.kernels.cpu.cpus import asking, require_threads
from resfuse.kernels.engine.bound_plan import BoundPlan, bind
from resfuse.kernels.engine.cost.ceilings import Ceilings
from resfuse.kernels.engine.engine import Engine, OtherBatches
from resfuse.kernels.engine.frontend.batching.any_batch import batch_of, require_paddable
from resfuse.kernels.engine.frontend.export import capture
from resfuse.kernels.engine.ir.graph import Graph, State, state_names
from resfuse.kernels.engine.memory.buffers import WeightStore
from resfuse.kernels.engine.planning.candidates import find_candidates
from resfuse.kernels.engine.planning.chunking import chunk_stages, with_chunks
from resfuse.kernels.engine.planning.liveness import with_memory
from resfuse.kernels.engine.planning.planner import Plan, plan
from resfuse.kernels.engine.runtime.default_device import without_meta
from resfuse.kernels.engine.runtime.fallback import with_weights
from resfuse.kernels.engine.runtime.own_weights import copied_names, copies, require_usable
from resfuse.kernels.engine.tactics import tactics_on
from resfuse.kernels.engine.tuning.tuner import Tuner
from resfuse.kernels.tuning_cache.timing_cache import TimingCache, known


@without_meta()
def build_engine(
    model: nn.Module,
    example: Tensor,
    *,
    batch_sizes: Sequence[int] | None = None,
    other_batches: OtherBatches = "error",
    timings: Path | None = None,
    keep_weights: bool = True,
    cuda_graph: bool = True,
    tiling: bool | None = None,
    threads: int | None = None,
) -> Engine:
    """Compiles a model in eval mode for the shape, dtype and device of `example`.

    Args:
        model: a module whose forward takes one tensor and whose control flow does not depend on
            its values.
        example: an input [N, C, H, W].
        batch_sizes: the batch sizes to build for, by default the example's.
        other_batches: what to do with other batch sizes: raise ("error"); fill up to the next size
            built, if it is proved that images do not depend on each other ("pad"); or run a copy of
            the model ("eager").
        timings: a folder for measured times, by default one in the user's cache.
        keep_weights: whether to store a copy of the weights, which `save` and `refresh` need.
            Otherwise the engine only has them in the tactics' layouts, and copies those that
            torch's operations read.
        cuda_graph: whether to record each batch size as a CUDA graph; ignored on a CPU.
        tiling: whether to run early stages a few images at a time where that is faster, so that
            values between layers stay in a cache (TensorRT's tiling optimization). To find out,
            whole stages are built and timed in four ways each: seconds on a CPU, where it is on by
            default, and an estimated 10 to 25 s for ResNet-50 at batch 256 on a GPU, where it is
            off by default.
        threads: the number of threads for native steps on a CPU; torch's own operations use
            torch's. By default as many as there are CPUs to use (affinity, cgroup quota), but no
            more than torch.get_num_threads() returns now and at each call.

    Raises:
        ValueError: the model is in training mode, cannot be captured or recorded as a CUDA graph,
            or has a weight that is not finite; or a batch size or `threads` is below one.
    """
    require_threads(threads)
    usable = isinstance(example, Tensor) and example.layout == torch.strided
    if not usable or example.dim() < 2 or not example.shape[0]:
        raise ValueError("argument example: accepted: one dense tensor [N, C, H, W], not empty")
    if any(module.training for module in model.modules()):
        raise ValueError("argument model: it is in training mode; call model.eval() first")
    sizes = sorted(set(batch_sizes or [example.shape[0]]))
    if sizes[0] < 1:
        raise ValueError(f"argument batch_sizes: {sizes[0]}; accepted: 1 and more")
    if other_batches not in ("error", "pad", "eager"):
        raise ValueError(f"argument other_batches: {other_batches!r}; accepted: error, pad, eager")
    with asking(threads):
        return _built(
            model,
            example,
            sizes,
            other_batches=other_batches,
            timings=timings,
            keep_weights=keep_weights,
            cuda_graph=cuda_graph,
            tiling=tiling,
            threads=threads,
        )


def _built(
    model: nn.Module,
    example: Tensor,
    sizes: Sequence[int],
    *,
    other_batches: OtherBatches,
    timings: Path | None,
    keep_weights: bool,
    cuda_graph: bool,
    tiling: bool | None,
    threads: int | None,
) -> Engine:
    cache = TimingCache(example.device, timings)
    built: dict[int, BoundPlan] = {}
    state: dict[str, Tensor] = {}
    weight_store = WeightStore()
    for size in sizes:
        graph, captured = capture(model, batch_of(example, size))
        new = {name: captured[name] for name in sorted(state_names(graph)) if name not in state}
        state |= copies(new, copied_names(graph, keep_weights))
        require_usable([graph], state, graph.constants, "model")
        segments = tuned_plan(graph, state, example.device, cache, tiling).segments
        built[size] = bind(graph, segments, state, weight_store)
    if other_batches == "pad":
        require_paddable(model, example, {size: b.graph for size, b in built.items()}, state)
    eager = other_batches == "eager"
    return Engine(
        built,
        state,
        other_batches=other_batches,
        model=with_weights(model, state if keep_weights else {}) if eager else None,
        ceilings=Ceilings(example.device, example.dtype, cache),
        keep_weights=keep_weights,
        cuda_graph=cuda_graph,
        threads=threads,
    )


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
    tactics = tactics_on(device, graph.values[graph.input].dtype)
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
