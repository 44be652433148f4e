"""Engine: a compiled network to call, explain, refresh and save, made by `build_engine` (build.py)
or `load_engine` (load.py).
"""

import contextlib
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, Protocol

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from resfuse.kernels.cpu.cpus import asking
from resfuse.kernels.engine.bound_plan import BoundPlan, bind
from resfuse.kernels.engine.cost.ceilings import Ceilings
from resfuse.kernels.engine.engine_memory import Memory
from resfuse.kernels.engine.frontend.batching.any_batch import require_paddable
from resfuse.kernels.engine.frontend.batching.image_independence import images_at_all_sizes
from resfuse.kernels.engine.frontend.layout_questions import require_layout
from resfuse.kernels.engine.ir.derived_state import with_derived
from resfuse.kernels.engine.ir.graph import Graph
from resfuse.kernels.engine.memory.buffers import WeightStore
from resfuse.kernels.engine.memory.storage_bytes import storages
from resfuse.kernels.engine.plan_table import table
from resfuse.kernels.engine.planning.planner import Segment
from resfuse.kernels.engine.quantization.pixels import Pixels
from resfuse.kernels.engine.quantization.quantization_recipe import QuantizationRecipe
from resfuse.kernels.engine.quantization.quantization_table import quantization_table
from resfuse.kernels.engine.runtime.cuda_graph import Recorded, Turns
from resfuse.kernels.engine.runtime.default_device import without_meta
from resfuse.kernels.engine.runtime.fallback import tensors_of, with_weights
from resfuse.kernels.engine.runtime.forks import forks, watch
from resfuse.kernels.engine.runtime.input_check import require_input
from resfuse.kernels.engine.runtime.own_weights import refreshed, require_usable
from resfuse.kernels.engine.saving.engine_file import save
from resfuse.kernels.engine.shape_plans import Shape, ShapePlans, written

OtherBatches = Literal["error", "pad", "eager"]
OtherShapes = Literal["error", "build"]


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


class Engine:
    """A compiled network, made by `build_engine` or `load_engine`.

    An engine owns its weights, so the model may go on training; plans for several shapes share
    them. Calls from several threads take turns, and build a shape that they find missing beside the
    others' calls; different engines run at the same time. In a forked process an engine on a CPU
    runs on one thread, since OpenMP's other threads are not forked.

    A call copies the input into the engine's memory and the outputs out of it. On a GPU it runs on
    the caller's stream, after the engine's previous call on any stream, as one CUDA graph unless
    the engine was built without; a call cannot be captured in another CUDA graph.
    """

    def __init__(
        self,
        plans: Iterable[BoundPlan],
        state: Mapping[str, Tensor],
        *,
        other_batches: OtherBatches = "error",
        other_shapes: OtherShapes = "error",
        max_shapes: int = 8,
        model: nn.Module | None = None,
        planner: Planner | None = None,
        ceilings: Ceilings | None = None,
        keep_weights: bool = True,
        cuda_graph: bool = True,
        threads: int | None = None,
        recipe: QuantizationRecipe | None = None,
        pixels: Pixels | None = None,
    ) -> None:
        """
        Args:
            plans: one a shape, of the same weights.
            model: a copy of the engine's own, for batches and shapes without a plan.
            planner: plans `model` for other shapes, if such are to be built.
            recipe: how the plans' graphs were quantised, where they were here.
            pixels: what makes `model`'s input of the engine's, where that is pixels.
        """
        self.threads, self._recipe, self._pixels = threads, recipe, pixels
        self._built = ShapePlans(plans)
        self._added: dict[Shape, None] = {}  # shapes built by calls, the one used last at the end
        self._constants = self._built.constants()
        weights = [*(t for n, t in state.items() if n not in self._constants), *state.values()]
        first = next(iter(self._built.values())).graph
        self._input = first.values[first.input]
        devices = [*(tensor.device for tensor in weights), first.device, torch.device("cpu")]
        self._device = next(device for device in devices if device is not None)
        self._state = dict(state) if keep_weights else None
        self.other_batches, self.other_shapes = other_batches, other_shapes
        self.max_shapes = max_shapes
        self._images = {
            image: images_at_all_sizes(self._built.graphs(image), state)
            for image in self._built.images
            if other_batches == "pad"
        }
        self._model, self._planner = model, planner
        self._ceilings = ceilings
        watch()
        self._new_locks()
        on_gpu = self._device.type == "cuda"
        self._turns = Turns(self._device) if on_gpu else contextlib.nullcontext()
        self.cuda_graph = cuda_graph and on_gpu
        self._recorded = self._record(self._built)
        if isinstance(self._turns, Turns):
            self._turns.finish()  # weights are laid out before a call on any stream

    def __repr__(self) -> str:
        """Returns one line with the engine's input, batch sizes or shapes, segments and time."""
        dtype = str(self._input.dtype).removeprefix("torch.")
        if self._input.quantization is not None:
            dtype += f" pixels, computed in {self.precision},"
        elif self._input.dtype == torch.float32 and self.precision != "fp32":
            dtype += f", computed in {self.precision},"
        largest = self._built.find()
        ms = sum(segment.ms for segment in largest.segments)
        took = f"{len(largest.segments)} segments, {ms:.3f} ms one by one at"
        if len(self._built.images) > 1:
            shapes = ", ".join(map(written, self._built))
            return (
                f"Engine({dtype} on {self._device.type}, shapes {shapes}; {took} "
                f"{written(largest.shape)})"
            )
        sizes = ", ".join(map(str, self.batch_sizes))
        return (
            f"Engine(N x {written(self._input.shape[1:])} {dtype} on {self._device.type}, "
            f"batch sizes {sizes}; {took} batch {largest.shape[0]})"
        )

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """Returns the batch sizes that there are plans for, in ascending order."""
        return self._built.batch_sizes()

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """Returns the input shapes that there are plans for: images in ascending order, and their
        batch sizes."""
        return tuple(self._built)

    @property
    def precision(self) -> str:
        """Returns what most is computed in: "fp32", "bf16", "fp16" or "int8"."""
        names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.uint8: "int8"}
        return names.get(self._built.find().graph.dtype, "fp32")

    def quantization(self) -> str:
        """Returns a table of an engine in int8, a line for each convolution and linear layer: its
        precision, the scale and zero point of what it reads and stores, the share of its output
        that the range clips, the signal-to-noise ratio of quantising it alone, and why it is kept
        in float32 if it is. The two measured columns are empty where there were no images: after
        `load_engine`, and where `calibration` was ranges.

        Raises:
            ValueError: the engine does not compute in int8.
        """
        if self.precision != "int8":
            raise ValueError(f"this engine computes in {self.precision}; accepted: one in int8")
        errors, asked = (self._recipe.errors, self._recipe.asked) if self._recipe else ({}, ())
        return quantization_table(self._built.find().graph, errors, asked)

    @property
    def graphs(self) -> tuple[Graph, ...]:
        """Returns what the plans compute, in the order of `shapes`."""
        return tuple(plan.graph for plan in self._built.values())

    def __call__(self, x: Tensor) -> Any:
        """Returns the model's result in new tensors of the input's memory format.

        Raises:
            ValueError: the input has another shape, dtype or device than the engine was built for,
                or other strides where the model asks for strides; or there can be no plan for a
                shape that was to be built.
        """
        planner, model, plans = self._planner, self._model, self._built
        lost = model is None and (self.other_batches == "eager" or self.other_shapes == "build")
        without = ", and was loaded without its model" * lost
        require_input(x, self._input, self._device, None if planner else plans.images, without)
        shape, count = tuple(x.shape), x.shape[0]
        if shape in plans:
            require_layout(x, plans[shape].graph.layout)
            return self._run(shape, x)
        sizes = plans.batch_sizes(shape[1:])
        larger = [size for size in sizes if size > count]
        if self._images.get(shape[1:]) and larger and count:
            filled = larger[0], *shape[1:]
            require_layout(x, plans[filled].graph.layout)
            padded = x.new_zeros(filled)
            if _is_channels_last(x):
                padded = padded.contiguous(memory_format=torch.channels_last)
            padded[:count] = x
            return self._run(filled, padded, count)
        if sizes and self.other_batches == "eager" and model is not None:
            with torch.no_grad():
                return model(x if self._pixels is None else self._pixels.normalized(x))
        if planner is not None and model is not None and x.numel():
            self._build(planner, model, x)
            return self(x)
        if not sizes:
            raise ValueError(f"argument x: shape {shape}; accepted: inputs that are not empty")
        raise ValueError(
            f"argument x: a batch of {count}; this engine was built for "
            f"{', '.join(map(str, sizes))} and other_batches={self.other_batches!r}{without}"
        )

    def _record(self, plans: Mapping[Shape, BoundPlan]) -> dict[Shape, Recorded]:
        if not self.cuda_graph:
            return {}
        executors = {shape: plan.executor for shape, plan in plans.items()}
        return dict.fromkeys(plans, Recorded(executors, self._device))

    def _run(self, shape: Shape, x: Tensor, count: int | None = None) -> Any:
        """Runs a batch of a shape that there is a plan for, and returns the outputs for the first
        `count` images, by default for all."""
        if x.requires_grad:  # an output may be the input
            x = x.detach()
        in_format = torch.channels_last if _is_channels_last(x) else torch.contiguous_format
        if forks() != self._forks:
            self._settle_after_fork()
        with self._lock, self._turns:
            plan = self._built.get(shape)
            if plan is not None:
                if shape in self._added:
                    self._added[shape] = self._added.pop(shape)
                with torch.inference_mode():
                    run = self._recorded.get(shape)
                    results = run(shape, x) if run else plan.executor(x)
                images = self._images.get(shape[1:])
                if count is not None and images:
                    pairs = zip(results, images, strict=True)
                    results = [y.narrow(at.dim, 0, count * at.each) for y, at in pairs]
                # outside of inference mode: autograd may save these
                outputs = [
                    y.clone(memory_format=in_format if y.dim() == 4 else torch.contiguous_format)
                    for y in results
                ]
                return pytree.tree_unflatten(outputs, plan.spec)
        return self(x if count is None else x[:count])  # another thread has just dropped the plan

    @without_meta()
    def _build(self, planner: Planner, model: nn.Module, x: Tensor) -> None:
        """Adds a plan for the shape of `x`. Of those that calls have added, the one not used for
        longest makes room."""
        shape = tuple(x.shape)
        no_autocast = torch.autocast(x.device.type, enabled=False)
        with self._no_builds(), asking(self.threads), torch.inference_mode(False), no_autocast:
            if shape in self._built:  # by another thread
                return
            images = None
            try:
                graph, segments, state = planner(model, x.detach().clone(), self._state or {})
                if self.other_batches == "pad":
                    graphs = {**self._built.graphs(shape[1:]), shape[0]: graph}
                    example = x.detach().clone()
                    if self._pixels is not None:
                        example = self._pixels.normalized(example)
                    require_paddable(model, example, graphs, state, planner.capture)
                    images = images_at_all_sizes(graphs, state)
                plan = bind(graph, segments, state, self._built.find().executor.weight_store)
                recorded = self._record({shape: plan})
            except ValueError as error:
                raise ValueError(
                    f"argument x: there can be no plan for shape {shape}: {error}"
                ) from error
            with self._lock:
                room = self.max_shapes - 1
                dropped = list(self._added)[: max(0, len(self._added) - room)]
                if isinstance(self._turns, Turns):
                    self._turns.finish()  # another stream may still replay a graph to be dropped
                kept = [p for s, p in self._built.items() if s not in dropped]
                self._built = ShapePlans([*kept, plan])
                self._added = dict.fromkeys([s for s in self._added if s not in dropped] + [shape])
                self._recorded = {s: r for s, r in self._recorded.items() if s not in dropped}
                self._recorded |= recorded
                self._images[shape[1:]] = images
                self._constants = self._built.constants()
                if self._state is not None:
                    needed = self._built.state_names()
                    self._state = {name: t for name, t in state.items() if name in needed}

    def _settle_after_fork(self) -> None:
        """Makes new locks and sets torch to one thread, since a forked process has none of its
        parent's threads: neither the one that may own a lock, nor OpenMP's, for which torch would
        wait for ever."""
        if self._device.type == "cuda":
            raise RuntimeError(
                "this engine is on a GPU, which a forked process cannot use; start it by spawn and "
                "load the engine there"
            )
        self._new_locks()
        torch.set_num_threads(1)

    def _no_builds(self) -> threading.Lock:
        """Returns the lock under which plans are added and weights replaced."""
        if forks() != self._forks:
            self._settle_after_fork()
        return self._building

    def _new_locks(self) -> None:
        self._lock, self._building, self._forks = threading.Lock(), threading.Lock(), forks()

    def clone(self) -> "Engine":
        """Returns an engine of the same plans that shares this one's weights and may run at the
        same time: the memory of values is its own. A later `refresh` changes the engine it is
        called on alone.

        Raises:
            ValueError: the engine was built with keep_weights=False.
        """
        with self._no_builds(), asking(self.threads):
            state, model, added = self._weights(), self._model, dict(self._added)
            plans = [plan.bound_again(state) for plan in self._built.values()]
        made = Engine(
            plans, state, other_batches=self.other_batches, other_shapes=self.other_shapes,
            max_shapes=self.max_shapes, model=model, planner=self._planner,
            ceilings=self._ceilings, cuda_graph=self.cuda_graph, threads=self.threads,
            recipe=self._recipe, pixels=self._pixels,
        )  # fmt: skip
        made._added = added
        return made

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Refuses pickle, copy and torch.save."""
        raise ValueError(
            "an engine cannot be copied or pickled: engine.clone() makes another one in this "
            "process, and engine.save(path) a file for load_engine(path)"
        )

    def memory(
        self, batch_size: int | None = None, *, shape: Sequence[int] | None = None
    ) -> Memory:
        """Returns the bytes that the engine uses for a batch size or a shape, by default the
        largest."""
        plan = self._built.find(batch_size, shape)
        recorded = set(self._recorded.values())
        originals = self._originals()
        return Memory(
            arena_bytes=plan.executor.arena.size,
            least_arena_bytes=plan.executor.arena.least_size,
            weights_bytes=plan.executor.weight_bytes(excluding=originals),
            originals_bytes=sum(storages(originals).values()),
            graph_pool_bytes=sum(each.pool_bytes for each in recorded),
            graph_inputs_bytes=sum(each.input_bytes for each in recorded),
        )

    def explain(self, batch_size: int | None = None, *, shape: Sequence[int] | None = None) -> str:
        """Returns a table of the segments for a batch size or a shape, by default the largest:
        tactic, time, floor, bytes and runner-up."""
        plan = self._built.find(batch_size, shape)
        return table(plan.graph, plan.segments, self._ceilings)

    @without_meta()
    def refresh(self, state_dict: Mapping[str, Tensor]) -> None:
        """Replaces the weights without planning again, also those for other batches and shapes.

        Args:
            state_dict: the model's. Constants that are not in it keep their values: numbers written
                in a forward, and buffers that are not persistent.

        Raises:
            ValueError: `state_dict` is no state_dict of dense tensors; a tensor is missing, has
                another shape or cannot be used; or the engine was built with keep_weights=False,
                or in int8. The engine stays unchanged.
        """
        if self.precision == "int8":
            raise ValueError(
                "an engine in int8 takes no new weights: its scales were calibrated with those it "
                "has; accepted: build_engine(model, ..., precision='int8', calibration=...) again"
            )
        with self._no_builds():
            fresh = refreshed(self._weights(), self._constants, state_dict)
            graphs = [plan.graph for plan in self._built.values()]
            require_usable(graphs, fresh, self._constants, "state_dict")
            model = self._model
            if model is not None:
                unread = {name: t for name, t in tensors_of(model) if name not in fresh}
                model = with_weights(model, refreshed(unread, unread, state_dict) | fresh)
            weight_store = WeightStore()
            with asking(self.threads):
                built = ShapePlans(
                    bind(plan.graph, plan.segments, fresh, weight_store)
                    for plan in self._built.values()
                )
            recorded = self._record(built)
            with self._lock:
                if isinstance(self._turns, Turns):
                    self._turns.finish()  # another stream may still replay the old graphs
                self._state, self._built, self._recorded = fresh, built, recorded
                self._model = model

    def save(self, path: str | Path) -> None:
        """Writes the plans (as JSON) and the weights to one safetensors file. See `load_engine`.

        Raises:
            OSError: the file cannot be written; an earlier one stays unchanged.
            ValueError: the engine was built with keep_weights=False.
        """
        with self._no_builds():
            plans = {shape: (p.graph, p.segments) for shape, p in self._built.items()}
            save(
                Path(path), self._device, plans, self._weights(), self.other_batches,
                self.other_shapes, self.cuda_graph, self.threads,
            )  # fmt: skip

    def export_onnx(
        self, path: str | Path, activations: Literal["uint8", "int8"] = "uint8"
    ) -> None:
        """Writes an engine in int8 as an ONNX file of operator set 13, or the lowest later one that
        has its operations, with the engine's weights and scales: QuantizeLinear and
        DequantizeLinear around each value that is quantised, weights as int8 with a scale for each
        output channel. It is written for the largest of the engine's shapes; its batch is free,
        unless the network moves numbers across the batch.

        Args:
            activations: how values are stored. "uint8" is what ONNX Runtime and OpenVINO compute
                fastest in on x86. "int8" has the same numbers less 128, hence the same answers.
                TensorRT reads int8 only, and only with zero points of 0: for it, ranges would have
                to be symmetric, which `calibrate` does not make them.

        Raises:
            ValueError: the engine does not compute in int8, was built with keep_weights=False, or
                runs an operation of torch's that is not written; or `activations` is neither.
            OSError: the file cannot be written; an earlier one stays unchanged.
            ModuleNotFoundError: the package onnx is not installed.
        """
        from resfuse.kernels.engine.saving.onnx.onnx_writer import export_onnx  # onnx is optional

        if self.precision != "int8":
            raise ValueError(
                f"this engine computes in {self.precision}; accepted: one in int8, since "
                "torch.onnx.export writes other models"
            )
        with self._no_builds():
            graph = self._built.find().graph
            export_onnx(graph, with_derived(graph, self._weights()), Path(path), activations)

    def _originals(self) -> list[Tensor]:
        """Returns the copies of the original weights, and those of the model for other batches and
        shapes."""
        fallback = [t for _, t in tensors_of(self._model)] if self._model is not None else []
        return [*(self._state or {}).values(), *fallback]

    def _weights(self) -> dict[str, Tensor]:
        if self._state is None:
            raise ValueError("this engine was built with keep_weights=False; build it with True")
        return self._state


def _is_channels_last(x: Tensor) -> bool:
    return (
        x.dim() == 4
        and not x.is_contiguous()
        and x.is_contiguous(memory_format=torch.channels_last)
    )
