"""PlanRunner: runs the plans of an engine, one call at a time, and exchanges them between calls."""

import contextlib
import threading
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec

from resfuse.kernels.engine.frontend.batching.image_dimension import Images
from resfuse.kernels.engine.runtime.cuda_graph import Recorded, Turns
from resfuse.kernels.engine.runtime.forks import forks, watch
from resfuse.kernels.engine.shapes.bound_plan import BoundPlan
from resfuse.kernels.engine.shapes.shape_plans import Shape, ShapePlans


class PlanRunner:
    """The plans that calls run now, and on a GPU their CUDA graphs.

    Calls from several threads take turns. A thread that adds or replaces plans holds `changing`
    throughout, and stops the calls of the others only while it exchanges the plans.

    Attributes:
        plans: by shape.
        added: the shapes that calls have added, the one used last at the end.
        images: for each shape of an image whose batches may be filled up, where the images are in
            the outputs.
    """

    def __init__(
        self,
        plans: ShapePlans,
        device: torch.device,
        images: Mapping[Shape, tuple[Images, ...] | None],
        *,
        cuda_graph: bool,
    ) -> None:
        """
        Args:
            cuda_graph: whether to record each plan as a CUDA graph.

        Raises:
            ValueError: a network cannot be recorded as a CUDA graph.
        """
        self.plans, self.images = plans, dict(images)
        self.added: dict[Shape, None] = {}
        self._device = device
        watch()
        self._new_locks()
        self._turns = Turns(device) if device.type == "cuda" else contextlib.nullcontext()
        self._recorded = self._record(plans, cuda_graph)
        self._finish()  # weights are laid out before a call on any stream

    def run(
        self, shape: Shape, x: Tensor, count: int | None = None
    ) -> tuple[list[Tensor], TreeSpec] | None:
        """Runs the plan for a shape, and returns its outputs, copied, and their containers; None if
        another thread has just dropped the plan.

        Args:
            count: the number of images to return outputs for, by default all.
        """
        if x.requires_grad:  # an output may be the input
            x = x.detach()
        in_format = torch.channels_last if is_channels_last(x) else torch.contiguous_format
        if forks() != self._forks:
            self._settle_after_fork()
        with self._lock, self._turns:
            plan = self.plans.get(shape)
            if plan is None:
                return None
            if shape in self.added:
                self.added[shape] = self.added.pop(shape)
            with torch.inference_mode():
                recorded = self._recorded.get(shape)
                results = recorded(shape, x) if recorded else plan.executor(x)
            images = self.images.get(shape[1:])
            if count is not None and images:
                pairs = zip(results, images, strict=True)
                results = [y.narrow(at.dim, 0, count * at.each) for y, at in pairs]
            # outside of inference mode: autograd may save these
            outputs = [
                y.clone(memory_format=in_format if y.dim() == 4 else torch.contiguous_format)
                for y in results
            ]
            return outputs, plan.spec

    @property
    def changing(self) -> threading.Lock:
        """Returns the lock under which plans are added and weights replaced."""
        if forks() != self._forks:
            self._settle_after_fork()
        return self._building

    def add(
        self,
        plan: BoundPlan,
        images: tuple[Images, ...] | None,
        *,
        most: int,
        cuda_graph: bool,
    ) -> None:
        """Adds a plan. Of those added before, the ones not used for longest make room.

        Args:
            images: where the images are in the outputs of a batch that may be filled up.
            most: the number of added plans to keep, this one included.

        Raises:
            ValueError: the network cannot be recorded as a CUDA graph.
        """
        recorded = self._record({plan.shape: plan}, cuda_graph)
        with self._lock:
            dropped = list(self.added)[: max(0, len(self.added) - (most - 1))]
            self._finish()  # another stream may still replay a graph to be dropped
            kept = [p for shape, p in self.plans.items() if shape not in dropped]
            self.plans = ShapePlans([*kept, plan])
            self.added = dict.fromkeys([s for s in self.added if s not in dropped] + [plan.shape])
            self._recorded = {s: r for s, r in self._recorded.items() if s not in dropped}
            self._recorded |= recorded
            self.images[plan.shape[1:]] = images

    def replace(self, plans: ShapePlans, *, cuda_graph: bool) -> None:
        """Runs other plans for the same shapes from now on.

        Raises:
            ValueError: a network cannot be recorded as a CUDA graph.
        """
        recorded = self._record(plans, cuda_graph)
        with self._lock:
            self._finish()  # another stream may still replay the old graphs
            self.plans, self._recorded = plans, recorded

    def graph_pool_bytes(self) -> int:
        """Returns the bytes reserved for values, outputs and scratch memory of CUDA graphs."""
        return sum(each.pool_bytes for each in set(self._recorded.values()))

    def graph_inputs_bytes(self) -> int:
        """Returns the bytes of the buffers that CUDA graphs read inputs from."""
        return sum(each.input_bytes for each in set(self._recorded.values()))

    def _record(self, plans: Mapping[Shape, BoundPlan], cuda_graph: bool) -> dict[Shape, Recorded]:
        if not cuda_graph:
            return {}
        executors = {shape: plan.executor for shape, plan in plans.items()}
        return dict.fromkeys(plans, Recorded(executors, self._device))

    def _finish(self) -> None:
        """Waits for the last run on a GPU, and for the work queued on the current stream."""
        if isinstance(self._turns, Turns):
            self._turns.finish()

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

    def _new_locks(self) -> None:
        self._lock, self._building, self._forks = threading.Lock(), threading.Lock(), forks()


def filled_up(x: Tensor, size: int) -> Tensor:
    """Returns a batch of `size` images in the memory format of `x`: those of `x`, then zeros."""
    filled = x.new_zeros(size, *x.shape[1:])
    if is_channels_last(x):
        filled = filled.contiguous(memory_format=torch.channels_last)
    filled[: len(x)] = x
    return filled


def is_channels_last(x: Tensor) -> bool:
    """Returns whether a tensor is in channels_last memory format, and not also in torch's own."""
    return (
        x.dim() == 4
        and not x.is_contiguous()
        and x.is_contiguous(memory_format=torch.channels_last)
    )
