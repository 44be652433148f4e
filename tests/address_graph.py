"""A stand-in for torch.cuda's graphs on a CPU, as strict about lifetimes as the real ones.

A graph has the addresses of what it read; where that has been freed, it finds NaN.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


class _Address:
    """Where a tensor was; whatever is there now can be read."""

    def __init__(self, tensor: Tensor) -> None:
        self._storage = StorageWeakRef(tensor.untyped_storage())
        self._like = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
        self._offset = tensor.storage_offset()

    def read(self) -> Tensor:
        storage = torch.UntypedStorage._new_with_weak_ptr(self._storage.cdata)
        if storage is None:
            return torch.full_like(self._like, float("nan"))
        empty = torch.empty(0, dtype=self._like.dtype)
        return empty.set_(storage, self._offset, self._like.shape, self._like.stride())


class CUDAGraph(TorchDispatchMode):
    """Writes down operations and addresses. What operations make is in the graph's own memory."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self._own: dict[int, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        made = [found] if isinstance(found, Tensor) else [y for y in found if torch.is_tensor(y)]
        where = tree_map_only(Tensor, self._where, (args, kwargs or {}))
        self._own |= {y.untyped_storage().data_ptr(): y for y in made}
        if not func.__name__.startswith("empty"):  # a replay allocates nothing
            self._calls.append((func, *where, made))
        return found

    def capture_begin(self, pool: object = None, capture_error_mode: str = "global") -> None:
        self.__enter__()

    def capture_end(self) -> None:
        self.__exit__(None, None, None)

    def _where(self, tensor: Tensor) -> Tensor | _Address:
        own = tensor.untyped_storage().data_ptr() in self._own
        return tensor if own else _Address(tensor)

    @torch.inference_mode()
    def replay(self) -> None:
        for func, args, kwargs, made in self._calls:
            args, kwargs = tree_map_only(_Address, _Address.read, (args, kwargs))
            found = func(*args, **kwargs)
            for old, new in zip(made, [found] if isinstance(found, Tensor) else found, strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class _Stream:
    def wait_stream(self, other: "_Stream") -> None:
        pass

    def synchronize(self) -> None:
        pass


def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.cuda's streams and graphs, on a CPU."""

    @contextlib.contextmanager
    def graph(recorded: CUDAGraph) -> Iterator[None]:
        with recorded:
            yield

    stand_ins = {
        "Stream": _Stream, "CUDAGraph": CUDAGraph, "graph": graph,
        "current_stream": _Stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "device": lambda device: contextlib.nullcontext(),
        "empty_cache": lambda: None,
        "synchronize": lambda *device: None,
    }  # fmt: skip
    for name, instead in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, instead)
