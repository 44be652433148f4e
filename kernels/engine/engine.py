"""Engine: a compiled network as its users hold it, to call, explain, refresh and save.

`build_engine` makes one (build.py), or `load_engine` (load.py).
"""

import contextlib
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from resfuse.kernels.cpu.cpus import asking
from resfuse.kernels.engine.bound_plan import BoundPlan, bind
from resfuse.kernels.engine.cost.ceilings import Ceilings
from resfuse.kernels.engine.frontend.batching import images_at_all_sizes
from resfuse.kernels.engine.frontend.layout_questions import require_layout
from resfuse.kernels.engine.memory.buffers import WeightStore
from resfuse.kernels.engine.memory.storage_bytes import storages
from resfuse.kernels.engine.plan_table import table
from resfuse.kernels.engine.runtime.cuda_graph import Recorded, Turns
from resfuse.kernels.engine.runtime.default_device import without_meta
from resfuse.kernels.engine.runtime.fallback import tensors_of, with_weights
from resfuse.kernels.engine.runtime.forks import forks, watch
from resfuse.kernels.engine.runtime.input_check import require_input
from resfuse.kernels.engine.runtime.own_weights import refreshed, require_usable
from resfuse.kernels.engine.saving.engine_file import save

OtherBatches = Literal["error", "pad", "eager"]


@dataclass(frozen=True)
class Memory:
    """Bytes an engine holds: `arena` for values between layers, `least` what the largest sum of
    values alive at one moment is, `weights` in the tactics' own layouts, for all batch sizes, and
    `originals` copies of them as they were given, kept for save, refresh, other batches and torch's
    operations. On a GPU with CUDA graphs, for all batch sizes together: `graph_pool` what
    the allocator has reserved for values between layers, outputs and scratch, `graph_inputs` the
    buffers that inputs are copied into.
    """

    arena: int
    least: int
    weights: int
    originals: int
    graph_pool: int = 0
    graph_inputs: int = 0


class Engine:
    """A network that runs as planned; made by build_engine or load_engine.

    Its weights are its own: the model may train on. Calls from several threads take turns: an
    engine has one arena. Two engines run side by side. In a forked process an engine for a CPU
    runs on one thread, for OpenMP's others stay behind.
    The input is copied into the engine's memory and the outputs out of it, within the call. On a
    GPU a call runs on the caller's stream, behind the engine's previous call on whichever stream,
    as one CUDA graph unless the engine was built without; it cannot itself be captured in another.
    """

    def __init__(
        self,
        built: Mapping[int, BoundPlan],
        state: Mapping[str, Tensor],
        *,
        other_batches: OtherBatches = "error",
        model: nn.Module | None = None,
        ceilings: Ceilings | None = None,
        keep_weights: bool = True,
        cuda_graph: bool = True,
        threads: int | None = None,
    ) -> None:
        self.threads = threads
        self._built = dict(sorted(built.items()))
        self._constants = {name for b in built.values() for name in b.graph.constants}
        weights = [*(t for n, t in state.items() if n not in self._constants), *state.values()]
        self._device = weights[0].device if weights else torch.device("cpu")
        self._state = dict(state) if keep_weights else None
        self.other_batches = other_batches
        graphs = {size: b.graph for size, b in self._built.items()}
        self._images = images_at_all_sizes(graphs, state) if other_batches == "pad" else None
        self._model = model
        self._ceilings = ceilings
        watch()
        self._lock, self._forks = threading.Lock(), forks()
        on_gpu = self._device.type == "cuda"
        self._turns = Turns(self._device) if on_gpu else contextlib.nullcontext()
        self.cuda_graph = cuda_graph and on_gpu
        self._recorded = self._record(self._built)
        if isinstance(self._turns, Turns):
            self._turns.finish()  # weights are laid out, on whichever stream the first call is
        first = next(iter(self._built.values())).graph
        self._input = first.values[first.input]
        self._spec = pytree.treespec_loads(first.spec)

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        return tuple(self._built)

    def __call__(self, x: Tensor) -> Any:
        """What the model returns, in new tensors of the input's memory format.

        Raises:
            ValueError: an input of another shape, dtype or device than the engine was built for,
                or of other strides where the model asks for strides.
        """
        require_input(x, self._input, self._device)
        count = x.shape[0]
        if count in self._built:
            require_layout(x, self._built[count].graph.layout)
            return self._run(count, x)
        larger = [size for size in self._built if size > count]
        if self._images and larger and count:
            require_layout(x, self._built[larger[0]].graph.layout)
            padded = x.new_zeros(larger[0], *x.shape[1:])
            if _is_channels_last(x):
                padded = padded.contiguous(memory_format=torch.channels_last)
            padded[:count] = x
            return self._run(larger[0], padded, count)
        if self.other_batches == "eager" and self._model is not None:
            with torch.no_grad():
                return self._model(x)
        without = ", and was loaded without its model" * (self.other_batches == "eager")
        raise ValueError(
            f"argument x: a batch of {count}; this engine was built for "
            f"{', '.join(map(str, self._built))} and other_batches={self.other_batches!r}{without}"
        )

    def _record(self, built: Mapping[int, BoundPlan]) -> Recorded | None:
        if not self.cuda_graph:
            return None
        return Recorded({size: b.executor for size, b in built.items()}, self._device)

    def _run(self, size: int, x: Tensor, count: int | None = None) -> Any:
        """What a batch of a size that was built for gives, or `count` images of it."""
        if x.requires_grad:  # an output may be the input
            x = x.detach()
        in_format = torch.channels_last if _is_channels_last(x) else torch.contiguous_format
        if forks() != self._forks:
            self._settle_after_fork()
        with self._lock, self._turns:
            with torch.inference_mode():
                run = self._built[size].executor
                made = self._recorded(size, x) if self._recorded else run(x)
            if count is not None and self._images:
                pairs = zip(made, self._images, strict=True)
                made = [y.narrow(at.dim, 0, count * at.each) for y, at in pairs]
            # outside of inference mode: autograd may save these
            outputs = [
                y.clone(memory_format=in_format if y.dim() == 4 else torch.contiguous_format)
                for y in made
            ]
        return pytree.tree_unflatten(outputs, self._spec)

    def _settle_after_fork(self) -> None:
        """Threads stay behind in the parent: those that may have held the lock, and OpenMP's, for
        which torch's operations would wait for ever."""
        if self._device.type == "cuda":
            raise RuntimeError(
                "this engine is on a GPU, which a forked process cannot use; start it by spawn and "
                "load the engine there"
            )
        self._lock, self._forks = threading.Lock(), forks()
        torch.set_num_threads(1)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Refuses pickle, copy and torch.save."""
        raise ValueError(
            "an engine cannot be copied or pickled: write it with engine.save(path) and read it "
            "with load_engine(path)"
        )

    def memory(self, batch_size: int | None = None) -> Memory:
        """What the engine holds for a batch size (the largest one by default), in bytes."""
        executor = self._built_for(batch_size).executor
        pool, inputs = (
            (self._recorded.pool_bytes, self._recorded.input_bytes) if self._recorded else (0, 0)
        )
        arena = executor.arena
        originals = self._originals()
        weights, kept = executor.held_bytes(originals), sum(storages(originals).values())
        return Memory(arena.size, arena.least_size, weights, kept, pool, inputs)

    def explain(self, batch_size: int | None = None) -> str:
        """A table of the segments: tactic, runner-up, time, floor, bytes."""
        built = self._built_for(batch_size)
        return table(built.graph, built.segments, self._ceilings)

    @without_meta()
    def refresh(self, state_dict: Mapping[str, Tensor]) -> None:
        """New weights, without planning anew; for other_batches="eager", too.

        Args:
            state_dict: of the model. Constants, which no state_dict has, stay as they are: numbers
                written in a forward, and buffers that are not persistent unless they are given.

        Raises:
            ValueError: it is no state_dict of dense tensors; one is missing, has another shape or
                cannot be used; or the engine was built with keep_weights=False. It stays as it was.
        """
        fresh = refreshed(self._weights(), self._constants, state_dict)
        graphs = [b.graph for b in self._built.values()]
        require_usable(graphs, fresh, self._constants, "state_dict")
        model = self._model
        if model is not None:
            unread = {name: t for name, t in tensors_of(model) if name not in fresh}
            model = with_weights(model, refreshed(unread, unread, state_dict) | fresh)
        weight_store = WeightStore()
        with asking(self.threads):
            built = {
                size: bind(b.graph, b.segments, fresh, weight_store)
                for size, b in self._built.items()
            }
        recorded = self._record(built)
        with self._lock:
            if isinstance(self._turns, Turns):
                self._turns.finish()  # another stream may still replay what is let go of here
            self._state, self._built, self._recorded = fresh, built, recorded
            self._model = model

    def save(self, path: str | Path) -> None:
        """One file: the plan as JSON, and the weights (safetensors). See load_engine.

        Raises:
            OSError: it cannot be written; what was there before is as it was.
            ValueError: the engine was built with keep_weights=False.
        """
        plans = {size: (b.graph, b.segments) for size, b in self._built.items()}
        save(
            Path(path), self._device, plans, self._weights(), self.other_batches,
            self.cuda_graph, self.threads,
        )  # fmt: skip

    def _built_for(self, batch_size: int | None) -> BoundPlan:
        if batch_size is not None and batch_size not in self._built:
            sizes = ", ".join(map(str, self._built))
            raise ValueError(
                f"argument batch_size: {batch_size}; this engine was built for {sizes}"
            )
        return self._built[batch_size or max(self._built)]

    def _originals(self) -> list[Tensor]:
        """Weights as they were given."""
        beside = [t for _, t in tensors_of(self._model)] if self._model is not None else []
        return [*(self._state or {}).values(), *beside]

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
