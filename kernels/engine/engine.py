"""Engine: a compiled network to call, explain, refresh and save, made by `build_engine` (build.py)
or `load_engine` (load.py).
"""

import contextlib
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from resfuse.kernels.cpu.cpus import asking
from resfuse.kernels.engine.bound_plan import BoundPlan, bind
from resfuse.kernels.engine.cost.ceilings import Ceilings
from resfuse.kernels.engine.engine_memory import Memory
from resfuse.kernels.engine.frontend.batching.image_independence import images_at_all_sizes
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


class Engine:
    """A compiled network, made by `build_engine` or `load_engine`.

    An engine owns its weights, so the model may go on training. Calls from several threads take
    turns, since an engine has one arena; different engines run at the same time. In a forked
    process an engine on a CPU runs on one thread, since OpenMP's other threads are not forked.

    A call copies the input into the engine's memory and the outputs out of it. On a GPU it runs on
    the caller's stream, after the engine's previous call on any stream, as one CUDA graph unless
    the engine was built without; a call cannot be captured in another CUDA graph.
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
            self._turns.finish()  # weights are laid out before a call on any stream
        first = next(iter(self._built.values())).graph
        self._input = first.values[first.input]
        self._spec = pytree.treespec_loads(first.spec)

    def __repr__(self) -> str:
        """Returns one line with the engine's input, batch sizes, segments and time."""
        shape = "x".join(map(str, self._input.shape[1:]))
        dtype = str(self._input.dtype).removeprefix("torch.")
        sizes = ", ".join(map(str, self._built))
        largest = self._built[max(self._built)]
        ms = sum(segment.ms for segment in largest.segments)
        return (
            f"Engine(N x {shape} {dtype} on {self._device.type}, batch sizes {sizes}; "
            f"{len(largest.segments)} segments, {ms:.3f} ms one by one at batch {max(self._built)})"
        )

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """Returns the batch sizes that the engine was built for, in ascending order."""
        return tuple(self._built)

    def __call__(self, x: Tensor) -> Any:
        """Returns the model's result in new tensors of the input's memory format.

        Raises:
            ValueError: the input has another shape, dtype or device than the engine was built for,
                or other strides where the model asks for strides.
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
        """Runs a batch of a size that the engine was built for, and returns the outputs for the
        first `count` images, by default for all."""
        if x.requires_grad:  # an output may be the input
            x = x.detach()
        in_format = torch.channels_last if _is_channels_last(x) else torch.contiguous_format
        if forks() != self._forks:
            self._settle_after_fork()
        with self._lock, self._turns:
            with torch.inference_mode():
                run = self._built[size].executor
                results = self._recorded(size, x) if self._recorded else run(x)
            if count is not None and self._images:
                pairs = zip(results, self._images, strict=True)
                results = [y.narrow(at.dim, 0, count * at.each) for y, at in pairs]
            # outside of inference mode: autograd may save these
            outputs = [
                y.clone(memory_format=in_format if y.dim() == 4 else torch.contiguous_format)
                for y in results
            ]
        return pytree.tree_unflatten(outputs, self._spec)

    def _settle_after_fork(self) -> None:
        """Makes a new lock and sets torch to one thread, since a forked process has none of its
        parent's threads: neither the one that may own the lock, nor OpenMP's, for which torch would
        wait for ever."""
        if self._device.type == "cuda":
            raise RuntimeError(
                "this engine is on a GPU, which a forked process cannot use; start it by spawn and "
                "load the engine there"
            )
        self._lock, self._forks = threading.Lock(), forks()
        torch.set_num_threads(1)

    def clone(self) -> "Engine":
        """Returns an engine of the same plan that shares this one's weights and may run at the same
        time: the memory of values is its own. A later `refresh` changes the engine it is called on
        alone.

        Raises:
            ValueError: the engine was built with keep_weights=False.
        """
        state = self._weights()
        with self._lock, asking(self.threads):
            built = {size: b.bound_again(state) for size, b in self._built.items()}
        return Engine(
            built, state, other_batches=self.other_batches, model=self._model,
            ceilings=self._ceilings, cuda_graph=self.cuda_graph, threads=self.threads,
        )  # fmt: skip

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Refuses pickle, copy and torch.save."""
        raise ValueError(
            "an engine cannot be copied or pickled: engine.clone() makes another one in this "
            "process, and engine.save(path) a file for load_engine(path)"
        )

    def memory(self, batch_size: int | None = None) -> Memory:
        """Returns the bytes that the engine uses for a batch size, by default the largest."""
        bound = self._built_for(batch_size)
        pool, inputs = (
            (self._recorded.pool_bytes, self._recorded.input_bytes) if self._recorded else (0, 0)
        )
        originals = self._originals()
        return Memory(
            arena_bytes=bound.executor.arena.size,
            least_arena_bytes=bound.executor.arena.least_size,
            weights_bytes=bound.executor.weight_bytes(excluding=originals),
            originals_bytes=sum(storages(originals).values()),
            graph_pool_bytes=pool,
            graph_inputs_bytes=inputs,
        )

    def explain(self, batch_size: int | None = None) -> str:
        """Returns a table of the segments for a batch size, by default the largest: tactic, time,
        floor, bytes and runner-up."""
        built = self._built_for(batch_size)
        return table(built.graph, built.segments, self._ceilings)

    @without_meta()
    def refresh(self, state_dict: Mapping[str, Tensor]) -> None:
        """Replaces the weights without planning again, also those for other_batches="eager".

        Args:
            state_dict: the model's. Constants that are not in it keep their values: numbers written
                in a forward, and buffers that are not persistent.

        Raises:
            ValueError: `state_dict` is no state_dict of dense tensors; a tensor is missing, has
                another shape or cannot be used; or the engine was built with keep_weights=False.
                The engine stays unchanged.
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
                self._turns.finish()  # another stream may still replay the old graphs
            self._state, self._built, self._recorded = fresh, built, recorded
            self._model = model

    def save(self, path: str | Path) -> None:
        """Writes the plan (as JSON) and the weights to one safetensors file. See `load_engine`.

        Raises:
            OSError: the file cannot be written; an earlier one stays unchanged.
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
        """Returns the copies of the original weights, and those of the model for other batches."""
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
