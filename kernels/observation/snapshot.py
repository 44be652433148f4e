"""What Python objects hold, so that a change can be seen and undone: a shallow copy of every list,
dict, set and attribute dict that can be reached from a value, each beside the container it is of.

Numbers, strings, functions, classes and modules count as what they are. Tensors, arrays, iterators,
random generators and whatever else keeps its state in C cannot be watched.
"""

import enum
import functools
import types
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

MISSING = object()
LIMIT = 2000  # containers; a forward that reads more of them is left alone

_CONSTANTS = (
    int, float, complex, bool, str, bytes, type(None), type(...), type(NotImplemented),
    range, slice, enum.Enum, torch.dtype, torch.device, torch.Size, torch.layout,
    torch.memory_format,
)  # fmt: skip
_CODE = (
    type, types.ModuleType, types.BuiltinFunctionType, types.MethodDescriptorType,
    types.WrapperDescriptorType, types.MethodWrapperType, types.ClassMethodDescriptorType,
    types.GetSetDescriptorType, types.MemberDescriptorType, property, torch._ops.OpOverload,
    torch._ops.OpOverloadPacket, torch._ops._OpNamespace, torch.jit.ScriptFunction,
    type(functools.lru_cache(len)),
)  # fmt: skip
_CONTAINERS = (list, dict, set, deque)

Pair = tuple[Any, Any]  # a container, and a shallow copy of it


class Unwatchable(Exception):
    """A value may change without a trace; the message names its type."""


class Snapshot:
    """Containers reachable from the values added to it, as they were then."""

    def __init__(self) -> None:
        self.pairs: list[Pair] = []
        self.functions: dict[types.CodeType, types.FunctionType] = {}
        self.modules: list[nn.Module] = []  # found on the way, whose attributes are no part of it
        self._seen: dict[int, Any] = {}  # keeps what it names alive

    def add(self, value: Any) -> None:
        """Takes a snapshot of a value and everything in it.

        Raises:
            Unwatchable: something in it cannot be watched.
        """
        if isinstance(value, _CONSTANTS) and not isinstance(value, slice):
            return
        if id(value) in self._seen:
            return
        self._seen[id(value)] = value
        if isinstance(value, types.FunctionType):
            self._add_function(value)
        elif isinstance(value, nn.Module):
            self.modules.append(value)
        elif not isinstance(value, (*_CODE, slice)):
            for part in self._parts(value):
                self.add(part)

    def _parts(self, value: Any) -> list[Any]:
        if isinstance(value, tuple | frozenset):
            return list(value)
        if isinstance(value, _CONTAINERS):
            self._pair(value)
            return [*value, *value.values()] if isinstance(value, dict) else list(value)
        if isinstance(value, types.MethodType):
            return [value.__func__, value.__self__]
        if isinstance(value, staticmethod | classmethod):
            return [value.__func__]
        if isinstance(value, functools.partial):
            return [value.func, value.args, value.keywords]
        if isinstance(value, Tensor) or not _keeps_its_state_in_python(value):
            raise Unwatchable(f"a {type(value).__name__}")
        attributes = vars(value)
        self._pair(attributes)
        return [attributes[name] for name in list(attributes)]

    def _add_function(self, function: types.FunctionType) -> None:
        """Its closure and its defaults, which are part of what it does."""
        self.functions[function.__code__] = function
        for cell in function.__closure__ or ():
            if (value := contents(cell)) is not MISSING:
                self.add(value)
        for value in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            self.add(value)
        if (wrapped := vars(function).get("__wrapped__")) is not None:
            self.add(wrapped)

    def _pair(self, container: Any) -> None:
        if len(self.pairs) == LIMIT:
            raise Unwatchable(f"more than {LIMIT} objects")
        self.pairs.append((container, copy_of(container)))

    def cells(self) -> Iterator[tuple[types.CellType, Any]]:
        """Closures' cells, and what is in them now."""
        for function in self.functions.values():
            for cell in function.__closure__ or ():
                yield cell, contents(cell)

    def undo(self) -> bool:
        """Gives every container its contents back; returns whether one had changed."""
        changed = False
        for container, before in self.pairs:
            if not alike(container, before):
                changed = True
                restore(container, before)
        return changed


def contents(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return MISSING


def alike(container: Any, before: Any) -> bool:
    """Whether a container holds the very same objects as its copy, or equal constants."""
    if len(container) != len(before):
        return False
    if isinstance(container, dict):
        return all(same(container.get(name, MISSING), value) for name, value in before.items())
    if isinstance(container, set):
        return bool(container == before)
    return all(map(same, container, before))


def same(now: Any, then: Any) -> bool:
    """Whether two values are one object, or equal constants of one type."""
    if now is then:
        return True
    return type(now) is type(then) and is_constant(now) and repr(now) == repr(then)


def is_constant(value: Any) -> bool:
    if isinstance(value, tuple | frozenset):
        return all(map(is_constant, value))
    return isinstance(value, _CONSTANTS)


def restore(container: Any, before: Any) -> None:
    container.clear()
    container.extend(before) if isinstance(container, list | deque) else container.update(before)


def copy_of(container: Any) -> Any:
    for kind in _CONTAINERS:
        if isinstance(container, kind):
            return kind(container)
    raise AssertionError(f"no container: {type(container)}")


def _keeps_its_state_in_python(value: Any) -> bool:
    """True for an instance of a class written in Python, whose attributes are in its `__dict__`."""
    kinds = [kind for kind in type(value).__mro__ if kind is not object]
    written = all(kind.__flags__ & (1 << 9) for kind in kinds)  # Py_TPFLAGS_HEAPTYPE
    slots = any(vars(kind).get("__slots__") for kind in kinds)
    return written and not slots and hasattr(value, "__dict__")
