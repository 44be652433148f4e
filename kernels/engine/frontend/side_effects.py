"""Finds what a forward changes besides computing: attributes, lists and dicts, globals, classes,
Python's random generators. An engine would answer with the values at its capture for ever.

torch.export restores assigned attributes before it returns, so changes are looked for in a hook, as
soon as the forward has returned. What torch leaves changed (lists that it copied) is undone.
"""

import dis
import gc
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from resfuse.kernels.observation.bytecode import facts_of
from resfuse.kernels.observation.engine_capture import OF_FUSED_MODULES
from resfuse.kernels.observation.observed import Refused
from resfuse.kernels.observation.observer import pause_profiler, put_back, shared_generators
from resfuse.kernels.observation.snapshot import (
    MISSING,
    Snapshot,
    Unwatchable,
    alike,
    contents,
    copy_of,
    restore,
    same,
)

# Packages that run while torch captures. Their globals are no part of a forward.
_TOOLS = frozenset({
    "torch", "functorch", "sympy", "mpmath", "numpy", "optree", "networkx", "triton",
    "typing_extensions", "resfuse", "hypothesis", "_pytest", "pytest", "pluggy",
}) | sys.stdlib_module_names  # fmt: skip
_OUR_LAYERS = "resfuse.kernels.fusion.modules"
_CALL_FORWARDS = (
    "torch.nn.", "torch.utils.checkpoint", "torch.utils._pytree", "torch.autograd.function",
    "torch.fx.graph_module", _OUR_LAYERS,
)  # fmt: skip
# Packages whose objects are not looked into.
_OPAQUE = ("torch", "weakref", "logging", "_io", "threading", "_thread")
Place = tuple[str, str]  # the class whose forward it is, and what that would change
_OF_TENSORS = ("_parameters", "_buffers")  # torch.export itself reports writes to these


class Unreadable(ValueError):
    """Says what the forward may read that could not be restored afterwards."""


class SideEffects:
    """The changes made by a model's forwards inside `with effects.observed():`, which undoes them
    at its end."""

    def __init__(self, model: nn.Module) -> None:
        self.change: str | None = None  # "<Class> changes self.calls", once something has changed
        # Whether the forward calls type(), perhaps of tensors: while torch captures, they are of
        # types of its own.
        self.asks_type = False
        self._model, self._name = model, type(model).__name__
        self._snapshot = _ForwardSnapshot()
        self._codes: set[types.CodeType] = set()
        self._users: set[types.CodeType] = set()
        self._spaces: dict[tuple[int, str], tuple[dict[str, Any], str, Any]] = {}
        self._kinds: dict[type, dict[str, Any]] = {}
        self._modules: dict[nn.Module, dict[str, Any]] = {}
        self._cells: dict[int, tuple[types.CellType, Any]] = {}

    @contextmanager
    def observed(self) -> Iterator[None]:
        """Records changes until its end, and undoes them there.

        Raises:
            ValueError: the forward may read what could not be restored.
        """
        if isinstance(self._model, torch.jit.ScriptModule):  # which torch does not capture
            yield
            return
        try:
            resume = pause_profiler()
        except Refused as reason:
            raise ValueError(f"argument model: its forward {reason}") from None
        hook = self._model.register_forward_hook(lambda *_: self.look())
        generators, collects = shared_generators(), gc.isenabled()
        gc.disable()  # a collection may run callbacks that are no part of the forward
        try:
            self._add_module(self._model)
            self._add_found()
            sys.setprofile(self._profile)
            yield
        finally:
            sys.setprofile(None)
            self.undo()
            hook.remove()
            resume()
            gc.enable() if collects else None
            if _drawn(generators, shared_generators()):
                self.change = self.change or f"{self._name} draws random numbers outside of torch"
            put_back(generators)

    def look(self) -> None:
        """Records the first change, once the forward has returned."""
        sys.setprofile(None)
        self.change = self.change or next(self._changes(), None)

    def settle(self, forward: Callable[[], Any]) -> bool:
        """Runs `forward` twice and returns whether the second run changes nothing and answers the
        same: the first one has filled a cache, or recorded its input's shape."""
        sys.setprofile(self._profile)
        first = forward()
        again = SideEffects(self._model)
        with again.observed():
            second = forward()
        return again.change is None and _equal(first, second)

    def _changes(self) -> Iterator[str]:
        for module, before in self._modules.items():
            if not type(module).__module__.startswith("torch."):
                now = vars(module)
                for name in [*before, *(name for name in now if name not in before)]:
                    if not same(now.get(name, MISSING), before.get(name, MISSING)):
                        yield f"{type(module).__name__} changes self.{name}"
        for (container, before), where in zip(
            self._snapshot.pairs, self._snapshot.places, strict=True
        ):
            if where is not None and not alike(container, before):
                yield f"{where[0]} changes {where[1]}"
        for holder, name, value in self._snapshot.slots:
            if not same(getattr(holder, name, MISSING), value):
                yield f"{self._name} changes a {type(holder).__name__}.{name}"
        for space, name, value in self._spaces.values():
            if not same(space.get(name, MISSING), value):
                yield f"{self._name} changes the global {name}"
        for kind, before in self._kinds.items():
            now = dict(vars(kind))
            for name in now.keys() | before.keys():
                if not same(now.get(name, MISSING), before.get(name, MISSING)):
                    yield f"{self._name} changes {kind.__name__}.{name}"
        for cell, value in self._cells.values():
            if not same(contents(cell), value):
                yield f"{self._name} changes a variable of an enclosing function"
        if any(tensor._version != version for tensor, version, _ in self._snapshot.tensors):
            yield f"{self._name} writes to a tensor that is no buffer"

    def undo(self) -> None:
        """Restores every value that has changed."""
        for module, before in self._modules.items():
            now = vars(module)
            if len(now) != len(before) or any(
                now.get(n, MISSING) is not v for n, v in before.items()
            ):
                now.clear()
                now.update(before)
        for container, before in self._snapshot.pairs:
            if not alike(container, before):
                restore(container, before)
        for holder, name, value in self._snapshot.slots:
            if getattr(holder, name, MISSING) is not value:
                setattr(holder, name, value)
        for space, name, value in self._spaces.values():
            if value is MISSING:
                space.pop(name, None)
            elif space.get(name, MISSING) is not value:
                space[name] = value
        for kind, before in self._kinds.items():
            for name in [n for n, v in vars(kind).items() if not same(v, before.get(n, MISSING))]:
                if name not in before:
                    delattr(kind, name)
            for name in [n for n, v in before.items() if not same(vars(kind).get(n, MISSING), v)]:
                setattr(kind, name, before[name])
        for cell, value in self._cells.values():
            if value is not MISSING and contents(cell) is not value:
                cell.cell_contents = value
        for tensor, version, copy in self._snapshot.tensors:
            if tensor._version != version:
                with torch.no_grad():
                    tensor.copy_(copy)

    def _add_module(self, module: nn.Module) -> None:
        if module in self._modules:
            return
        attributes = vars(module)
        self._modules[module] = dict(attributes)
        torchs = type(module).__module__.startswith("torch.")
        for name, value in list(attributes.items()):
            quiet = torchs or name in _OF_TENSORS
            if name in _OF_TENSORS:
                self._snapshot.add_contents(value)
            elif not name.startswith(OF_FUSED_MODULES):
                owner = type(module).__name__
                self._snapshot.take(value, None if quiet else (owner, f"self.{name}"))
        for kind in type(module).__mro__:
            self._add_kind(kind)

    def _add_kind(self, kind: type) -> None:
        ours = kind.__module__.partition(".")[0] in _TOOLS and kind.__module__ != _OUR_LAYERS
        if kind in self._kinds or ours or not kind.__flags__ & (1 << 9):
            return
        self._kinds[kind] = dict(vars(kind))
        for name, value in self._kinds[kind].items():
            if name not in ("__dict__", "__weakref__"):
                self._snapshot.take(value, (self._name, f"{kind.__name__}.{name}"))

    def _add_found(self) -> None:
        """Adds what the snapshot has come across: modules in lists, variables of enclosing
        functions."""
        while self._snapshot.modules:
            self._add_module(self._snapshot.modules.pop())
        for cell, value in self._snapshot.cells():
            self._cells.setdefault(id(cell), (cell, value))

    def _profile(self, frame: types.FrameType, event: str, arg: Any) -> None:
        if event != "call" or frame.f_code in self._codes:
            return
        code, space = frame.f_code, frame.f_globals
        name = space.get("__name__") or ""
        if name.partition(".")[0] in _TOOLS and name != _OUR_LAYERS:
            self._codes.add(code)
            return
        if not self._by_forward(frame.f_back):
            return
        self._codes.add(code)
        self._users.add(code)
        self.asks_type = self.asks_type or "type" in code.co_names or "__class__" in code.co_names
        for chain in facts_of(code).reads:
            self._add_global(space, chain)
        for name in _sets(code):
            self._remember(space, name)
        self._add_found()

    def _by_forward(self, caller: types.FrameType | None) -> bool:
        """Returns whether the call comes from the forward and not from torch's own machinery."""
        while caller is not None and caller.f_code not in self._users:
            name = caller.f_globals.get("__name__") or ""
            if name.startswith(_CALL_FORWARDS):
                return True
            if name.partition(".")[0] not in sys.stdlib_module_names:
                return False
            caller = caller.f_back
        return caller is not None

    def _add_global(self, space: dict[str, Any], chain: tuple[str, ...]) -> None:
        """Adds a global, and the attributes read from it as long as they are modules."""
        for name in chain:
            value = self._remember(space, name)
            if not isinstance(value, types.ModuleType):
                break
            if value.__name__.partition(".")[0] in _TOOLS and value.__name__ != "__main__":
                break
            space = vars(value)

    def _remember(self, space: dict[str, Any], name: str) -> Any:
        value = space.get(name, MISSING)
        if (id(space), name) not in self._spaces:
            self._spaces[id(space), name] = (space, name, value)
            if isinstance(value, type):
                self._add_kind(value)
            elif value is not MISSING:
                self._snapshot.take(value, (self._name, f"the global {name}"))
        return value


class _ForwardSnapshot(Snapshot):
    """A snapshot that skips objects it cannot observe, and records the place of each container."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[Place | None] = []  # of `pairs`; None where a change need not be reported
        self.tensors: list[tuple[Tensor, int, Tensor]] = []  # tensor, its version, a copy
        self.slots: list[tuple[Any, str, Any]] = []
        self._place: Place | None = None
        self._paired: set[int] = set()
        self._waiting: list[Any] = []

    def take(self, value: Any, place: Place | None) -> None:
        """Adds a value and what it contains, without recursion, since a linked list may be long."""
        self._place, self._waiting = place, [value]
        while self._waiting:
            super().add(self._waiting.pop())

    def add_contents(self, container: Any) -> None:
        """Adds a container to be restored, without what it contains."""
        self._place = None
        self._pair(container)

    def add(self, value: Any) -> None:
        """Queues a value that was found in another one."""
        self._waiting.append(value)

    def _parts(self, value: Any) -> list[Any]:
        kind = type(value)
        if isinstance(value, Tensor):
            if kind is Tensor and value.layout == torch.strided and not value.is_inference():
                self.tensors.append((value, value._version, value.detach().clone()))
            return []
        if kind.__module__.partition(".")[0] in _OPAQUE or kind is SideEffects:
            return []
        if hasattr(kind, "__next__") and kind.__module__ in ("builtins", "itertools"):
            where = self._place[1] if self._place else "it"
            raise Unreadable(
                f"argument model: {where} holds a {kind.__name__}, which changes when it is read; "
                "accepted: models that only compute"
            )
        names = [name for each in kind.__mro__ for name in _slots_of(each)]
        if names and not hasattr(value, "__dict__"):
            found = [(name, getattr(value, name, MISSING)) for name in names]
            present = [(name, content) for name, content in found if content is not MISSING]
            self.slots += [(value, name, content) for name, content in present]
            return [content for _, content in present]
        try:
            return super()._parts(value)
        except Unwatchable:
            return []

    def _pair(self, container: Any) -> None:
        if id(container) not in self._paired:
            self._paired.add(id(container))
            self.pairs.append((container, copy_of(container)))
            self.places.append(self._place)


def _slots_of(kind: type) -> tuple[str, ...]:
    slots = vars(kind).get("__slots__", ())
    names = (slots,) if isinstance(slots, str) else tuple(slots)
    return tuple(name for name in names if not name.startswith("__"))


@lru_cache(maxsize=4096)
def _sets(code: types.CodeType) -> tuple[str, ...]:
    """Returns the globals that a function assigns or deletes."""
    wanted = ("STORE_GLOBAL", "DELETE_GLOBAL")
    return tuple({step.argval for step in dis.get_instructions(code) if step.opname in wanted})


def _drawn(before: tuple[Any, ...], now: tuple[Any, ...]) -> bool:
    """Returns whether Python's or numpy's shared generator has been used."""
    if before[2] is None or now[2] is None:
        return bool(before[0] != now[0])
    numpys = now[2][2:] != before[2][2:] or (now[2][1] != before[2][1]).any()
    return bool(before[0] != now[0] or numpys)


def _equal(one: Any, other: Any) -> bool:
    (leaves, spec), (others, other_spec) = pytree.tree_flatten(one), pytree.tree_flatten(other)
    return spec == other_spec and all(map(_same_numbers, leaves, others))


def _same_numbers(one: Any, other: Any) -> bool:
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return same(one, other)
    alike = one.shape == other.shape and one.dtype == other.dtype and one.device == other.device
    return alike and (one.is_meta or bool(torch.equal(one.nan_to_num(), other.nan_to_num())))
