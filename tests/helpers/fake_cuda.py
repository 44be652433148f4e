"""A GPU stood in for on a CPU, as far as the engine asks torch.cuda for one.

Tensors meant for "cuda" are made on the CPU, where Triton's interpreter runs the kernels. A CUDA
graph is what it is there: addresses. A capture writes down every operation and launch with the
places of its tensors and keeps alive what was made within it, its pool, and nothing else; a replay
computes from what then lies at those places, and finds out where that has been freed.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from triton.tools.tensor_descriptor import TensorDescriptor

from resfuse.kernels.fusion.layers.prepared_launch import Prepared
from resfuse.kernels.gpu.common.launch import Launch
from resfuse.kernels.gpu.cudnn import cudnn_probe

GPU = torch.device("cuda", 0)
H200 = SimpleNamespace(
    name="NVIDIA H200", multi_processor_count=132, L2_cache_size=60 << 20, total_memory=150 << 30
)
_MS_EACH = 1e-3  # of an operation, by the stand-in for a clock
# What a stream that is recorded refuses: each waits for the device, or copies from Python's memory
_NOT_CAPTURED = {"aten::_local_scalar_dense", "aten::lift_fresh", "aten::equal", "aten::nonzero"}

Step = Callable[[], Any]


class Freed(AssertionError):
    """A replay read or wrote memory that nothing keeps."""


class Place:
    """Where a tensor lies, which keeps nothing alive."""

    def __init__(self, tensor: Tensor) -> None:
        self._storage = StorageWeakRef(tensor.untyped_storage())
        self._view = tensor.storage_offset(), tuple(tensor.shape), tensor.stride()
        self._dtype = tensor.dtype

    def tensor(self) -> Tensor:
        if self._storage.expired():
            raise Freed(f"a graph uses {self._view[1]} of {self._dtype} where all has been freed")
        storage = torch.UntypedStorage._new_with_weak_ptr(self._storage.cdata)
        return torch.empty(0, dtype=self._dtype).set_(storage, *self._view)


@dataclass
class Fake:
    """What happened on the stand-in, and how long it took by its clock."""

    said: list[str] = field(default_factory=list)
    ms: float = 0.0
    graph: "Graph | None" = None  # that is being recorded
    launched: list[Launch] = field(default_factory=list)


class Graph:
    """torch.cuda.CUDAGraph."""

    def __init__(self, gpu: Fake) -> None:
        self._gpu = gpu
        self.steps: list[Step] = []
        self.pool: list[torch.UntypedStorage] = []
        self._writing: _Writing | None = None

    def capture_begin(self, pool: object = None, capture_error_mode: str = "global") -> None:
        assert self._gpu.graph is None, "a capture within another"
        self._gpu.said.append("begin")
        self._gpu.graph, self._writing = self, _Writing(self)
        self._writing.__enter__()

    def capture_end(self) -> None:
        assert self._writing is not None
        self._writing.__exit__(None, None, None)
        self._gpu.graph, self._writing = None, None
        self._gpu.said.append("end")

    def replay(self) -> None:
        with _disable_current_modes(), torch.inference_mode():
            for step in self.steps:
                step()
        self._gpu.ms += _MS_EACH * len(self.steps)
        self._gpu.said.append("replay")


class _Writing(TorchDispatchMode):
    """Writes down what torch computes into a graph."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self._graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func._schema.name, kwargs or {}
        if name in _NOT_CAPTURED:
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        made = func(*args, **kwargs)
        given = {_storage(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        outputs = [t for t in tree_leaves(made) if isinstance(t, Tensor)]
        fresh = [t for t in outputs if _storage(t) not in given]
        self._graph.pool += [t.untyped_storage() for t in fresh]
        places = tree_map(_placed, (args, kwargs))
        if func._schema.is_mutable:
            self._graph.steps.append(lambda: _again(func, places, []))
        elif fresh and not name.startswith(("aten::empty", "aten::new_empty")):
            where = [Place(t) for t in outputs]
            self._graph.steps.append(lambda: _again(func, places, where))
        return made


def _again(func: Any, places: Any, where: list[Place]) -> None:
    args, kwargs = tree_map(_found, places)
    made = func(*args, **kwargs)
    for place, tensor in zip(where, tree_leaves(made), strict=bool(where)):
        place.tensor().copy_(tensor)


def _placed(argument: Any) -> Any:
    return Place(argument) if isinstance(argument, Tensor) else argument


def _found(argument: Any) -> Any:
    return argument.tensor() if isinstance(argument, Place) else argument


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class _OnTheCpu(TorchFunctionMode):
    """Sends what is made on a GPU to the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda":
            kwargs["device"] = "cpu"
        return func(*map(_on_the_cpu, args), **kwargs)


def _on_the_cpu(argument: Any) -> Any:
    is_gpu = isinstance(argument, torch.device) and argument.type == "cuda"
    return torch.device("cpu") if is_gpu else argument


class _Generator(torch.Generator):
    def __new__(cls, device: object = None) -> torch.Generator:  # type: ignore[misc]
        return super().__new__(cls, "cpu")


class _Stream:
    def wait_stream(self, other: "_Stream") -> None: ...

    def synchronize(self) -> None: ...


def fake_graphs(patch: pytest.MonkeyPatch, gpu: Fake | None = None) -> None:
    """CUDA graphs and streams alone: of tensors that are on the CPU and say so."""
    gpu = gpu or Fake()

    @contextlib.contextmanager
    def recorded(graph: Graph) -> Iterator[None]:
        graph.capture_begin()
        yield
        graph.capture_end()

    stand_ins: dict[str, Any] = {
        "Stream": _Stream, "CUDAGraph": lambda: Graph(gpu), "graph": recorded,
        "current_stream": lambda device=None: _Stream(),
        "stream": lambda stream: contextlib.nullcontext(),
        "device": lambda device: contextlib.nullcontext(),
        "synchronize": lambda device=None: None, "empty_cache": lambda: None,
    }  # fmt: skip
    for name, instead in stand_ins.items():
        patch.setattr(torch.cuda, name, instead)


@contextlib.contextmanager
def fake_cuda(monkeypatch: pytest.MonkeyPatch, l2_bytes: int = 60 << 20) -> Iterator[Fake]:
    """An H200 as GPU, within."""
    gpu = Fake()
    run = Launch.run

    def launched(self: Launch) -> None:
        gpu.launched.append(self)
        if gpu.graph is None:
            with _disable_current_modes():
                run(self)
            return
        places = {name: _of_launch(a) for name, a in self.args.items()}
        bare = replace(self, args={})
        gpu.graph.steps.append(
            lambda: run(replace(bare, args={name: back() for name, back in places.items()}))
        )

    def prepared(self: Prepared, values: list[Any]) -> None:
        names = self._launch.kernel.arg_names
        launched(replace(self._launch, args=dict(zip(names, values, strict=True))))

    class Event:
        def __init__(self, enable_timing: bool = False) -> None:
            self.at = 0.0

        def record(self, stream: object = None) -> None:
            self.at = gpu.ms

        def synchronize(self) -> None:
            gpu.said.append("the host waits")

        def elapsed_time(self, other: "Event") -> float:
            return other.at - self.at

    class Stream(_Stream):
        def wait_event(self, event: Event) -> None:
            gpu.said.append("the caller waits")

        def record_event(self) -> Event:
            gpu.said.append("a run ends")
            return Event()

    stand_ins: dict[str, Any] = {
        "Event": Event, "Stream": Stream, "current_stream": lambda device=None: Stream(),
        "is_available": lambda: True,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_name": lambda device=None: H200.name,
        "get_device_properties":
            lambda device=None: SimpleNamespace(**vars(H200) | {"L2_cache_size": l2_bytes}),
        "graph_pool_handle": lambda: (0, 7), "memory_snapshot": list,
        "current_device": lambda: 0,
    }  # fmt: skip
    with monkeypatch.context() as patch, _OnTheCpu(), torch.no_grad():
        fake_graphs(patch, gpu)
        for name, instead in stand_ins.items():
            patch.setattr(torch.cuda, name, instead)
        patch.setattr(torch, "Generator", _Generator)
        patch.setattr(torch.backends.cudnn, "is_available", lambda: True)
        patch.setattr(torch.backends.cudnn, "version", lambda: 91900)
        # its own probe takes shapes of ResNet-50 at batch 64
        patch.setattr(cudnn_probe, "_decided", lambda index, math_mode: cudnn_probe.ASSUMED)
        patch.setattr(torch, "cudnn_convolution_relu", _conv_relu)
        patch.setattr(torch, "cudnn_convolution_add_relu", _conv_add_relu)
        patch.setattr(Launch, "run", launched)
        patch.setattr(Prepared, "_through_front_door", prepared)
        yield gpu


def _of_launch(argument: Any) -> Step:
    """What gives a launch's argument back."""
    if isinstance(argument, Tensor):
        return Place(argument).tensor
    if isinstance(argument, TensorDescriptor):
        place = Place(argument.base)
        own = {f.name: getattr(argument, f.name) for f in fields(argument) if f.name != "base"}
        return lambda: TensorDescriptor(place.tensor(), **own)
    return lambda: argument


def _conv_relu(x: Tensor, w: Tensor, bias: Tensor, *geometry: Any) -> Tensor:
    return F.relu(F.conv2d(x, w, bias, *geometry))


def _conv_add_relu(
    x: Tensor, w: Tensor, z: Tensor, alpha: float, bias: Tensor, *geometry: Any
) -> Tensor:
    return F.relu(F.conv2d(x, w, bias, *geometry) + alpha * z)
