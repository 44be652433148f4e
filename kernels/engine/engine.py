"""Engine: a compiled network to call, explain, refresh and save, made by `build_engine` (build.py)
or `load_engine` (load.py).
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from resfuse.kernels.cpu.cpus import asking
from resfuse.kernels.engine.cost.ceilings import Ceilings
from resfuse.kernels.engine.engine_memory import Memory, memory_of
from resfuse.kernels.engine.frontend.layout_questions import require_layout
from resfuse.kernels.engine.ir.derived_state import with_derived
from resfuse.kernels.engine.ir.graph import Graph
from resfuse.kernels.engine.plan_table import summary, table
from resfuse.kernels.engine.quantization.pixels import Pixels
from resfuse.kernels.engine.quantization.quantization_recipe import QuantizationRecipe
from resfuse.kernels.engine.quantization.quantization_table import quantization_table
from resfuse.kernels.engine.runtime.default_device import without_meta
from resfuse.kernels.engine.runtime.fallback import tensors_of, with_weights
from resfuse.kernels.engine.runtime.input_check import require_input
from resfuse.kernels.engine.runtime.own_weights import refreshed, require_usable
from resfuse.kernels.engine.saving.engine_file import save
from resfuse.kernels.engine.shapes.bound_plan import BoundPlan
from resfuse.kernels.engine.shapes.new_shape import Planner, plan_new_shape
from resfuse.kernels.engine.shapes.plan_runner import PlanRunner, filled_up
from resfuse.kernels.engine.shapes.shape_plans import Shape, ShapePlans
from resfuse.kernels.ops.quantization import QUANTIZED_DTYPES

OtherBatches = Literal["error", "pad", "eager"]
OtherShapes = Literal["error", "build"]


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
        self.other_batches, self.other_shapes = other_batches, other_shapes
        self.max_shapes = max_shapes
        self._model, self._planner, self._ceilings = model, planner, ceilings
        self._state = dict(state) if keep_weights else None
        built = ShapePlans(plans)
        self._input, self._device = built.input, built.device(state)
        self.cuda_graph = cuda_graph and self._device.type == "cuda"
        images = built.images_of_outputs(state) if other_batches == "pad" else {}
        self._runner = PlanRunner(built, self._device, images, cuda_graph=self.cuda_graph)

    def __repr__(self) -> str:
        """Returns one line with the engine's input, batch sizes or shapes, segments and time."""
        return f"Engine({summary(self._built, self._device.type, self.precision)})"

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
        names = {torch.bfloat16: "bf16", torch.float16: "fp16"}
        names |= dict.fromkeys(QUANTIZED_DTYPES, "int8")
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
        if self._runner.images.get(shape[1:]) and larger and count:
            filled = larger[0], *shape[1:]
            require_layout(x, plans[filled].graph.layout)
            return self._run(filled, filled_up(x, larger[0]), count)
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

    def _run(self, shape: Shape, x: Tensor, count: int | None = None) -> Any:
        """Runs a batch of a shape that there is a plan for, and returns the outputs for the first
        `count` images, by default for all."""
        answer = self._runner.run(shape, x, count)
        if answer is None:  # another thread has just dropped the plan
            return self(x if count is None else x[:count])
        return pytree.tree_unflatten(*answer)

    @without_meta()
    def _build(self, planner: Planner, model: nn.Module, x: Tensor) -> None:
        """Adds a plan for the shape of `x`."""
        shape = tuple(x.shape)
        no_autocast = torch.autocast(x.device.type, enabled=False)
        changing = self._runner.changing
        with changing, asking(self.threads), torch.inference_mode(False), no_autocast:
            if shape in self._built:  # by another thread
                return
            try:
                plan, images, state = plan_new_shape(
                    planner, model, x, self._state or {}, self._built,
                    pad=self.other_batches == "pad", pixels=self._pixels,
                )  # fmt: skip
                self._runner.add(plan, images, most=self.max_shapes, cuda_graph=self.cuda_graph)
            except ValueError as error:
                raise ValueError(
                    f"argument x: there can be no plan for shape {shape}: {error}"
                ) from error
            if self._state is not None:
                needed = self._built.state_names()
                self._state = {name: t for name, t in state.items() if name in needed}

    def clone(self) -> "Engine":
        """Returns an engine of the same plans that shares this one's weights and may run at the
        same time: the memory of values is its own. A later `refresh` changes the engine it is
        called on alone.

        Raises:
            ValueError: the engine was built with keep_weights=False.
        """
        with self._runner.changing, asking(self.threads):
            state, model, added = self._weights(), self._model, dict(self._runner.added)
            plans = [plan.bound_again(state) for plan in self._built.values()]
        made = Engine(
            plans, state, other_batches=self.other_batches, other_shapes=self.other_shapes,
            max_shapes=self.max_shapes, model=model, planner=self._planner,
            ceilings=self._ceilings, cuda_graph=self.cuda_graph, threads=self.threads,
            recipe=self._recipe, pixels=self._pixels,
        )  # fmt: skip
        made._runner.added = added
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
        fallback = [t for _, t in tensors_of(self._model)] if self._model is not None else []
        originals = [*(self._state or {}).values(), *fallback]
        return memory_of(self._built.find(batch_size, shape), originals, self._runner)

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
        with self._runner.changing:
            constants, model = self._built.constants(), self._model
            fresh = refreshed(self._weights(), constants, state_dict)
            require_usable(self.graphs, fresh, constants, "state_dict")
            if model is not None:
                unread = {name: t for name, t in tensors_of(model) if name not in fresh}
                model = with_weights(model, refreshed(unread, unread, state_dict) | fresh)
            with asking(self.threads):
                built = self._built.with_weights(fresh)
            self._runner.replace(built, cuda_graph=self.cuda_graph)
            self._state, self._model = fresh, model

    def save(self, path: str | Path) -> None:
        """Writes the plans (as JSON) and the weights to one safetensors file. See `load_engine`.

        Raises:
            OSError: the file cannot be written; an earlier one stays unchanged.
            ValueError: the engine was built with keep_weights=False.
        """
        with self._runner.changing:
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
        with self._runner.changing:
            graph = self._built.find().graph
            state = {name: tensor.cpu() for name, tensor in self._weights().items()}
            export_onnx(graph, with_derived(graph, state), Path(path), activations)

    @property
    def _built(self) -> ShapePlans:
        return self._runner.plans

    def _weights(self) -> dict[str, Tensor]:
        if self._state is None:
            raise ValueError("this engine was built with keep_weights=False; build it with True")
        return self._state
