"""Watches a forward while it is traced: what it reads besides its arguments (so that a plan can be
guarded by it), what it changes (which is undone, and refused), and what no guard could cover.

Reads of modules' attributes are seen by a subclass with `__getattribute__` that a module is of
while it is watched; what Python functions run, and which of C, by a profile function.
"""

import cProfile
import gc
import random
import sys
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from resfuse.kernels.observation.bytecode import facts_of
from resfuse.kernels.observation.observed import Observed, Refused
from resfuse.kernels.observation.snapshot import MISSING

# Python modules whose functions are what they are, or tracing itself
_KNOWN = (
    "torch", "contextlib", "functools", "collections", "typing", "abc", "enum", "math", "operator",
    "itertools", "numbers", "copy", "_collections_abc", "inspect", "importlib",
)  # fmt: skip
_OURS = "resfuse.kernels."
_OUR_LAYERS = ("resfuse.kernels.fusion.modules",)
_MACHINERY = ("torch.nn.modules.module", "torch.nn.modules.container")
_C_MODULES = ("builtins", "math", "_operator", "itertools", "_functools", "_collections", "torch")
_OWNERS: tuple[type, ...] = (
    list, dict, set, frozenset, tuple, str, bytes, int, float, complex, type, slice, range,
    types.ModuleType, type({}.keys()), type({}.values()), type({}.items()), types.GeneratorType,
)  # fmt: skip
_STATE = frozenset(  # of torch, which may be another when the graph runs
    {
        "is_grad_enabled", "is_inference_mode_enabled", "is_autocast_enabled", "get_rng_state",
        "is_autocast_cpu_enabled", "get_autocast_gpu_dtype", "get_autocast_dtype",
        "get_autocast_cpu_dtype", "get_default_dtype", "_get_default_device", "get_num_threads",
        "is_anomaly_enabled", "is_autocast_cache_enabled", "is_deterministic",
        "set_autocast_enabled", "set_autocast_cpu_enabled", "set_autocast_dtype",
        "set_autocast_cpu_dtype", "set_autocast_gpu_dtype",
    }
)  # fmt: skip
_PYTHON_STATE = frozenset(
    {
        "is_compiling", "is_dynamo_compiling", "is_exporting", "is_in_onnx_export", "initial_seed",
        "get_float32_matmul_precision", "are_deterministic_algorithms_enabled", "get_rank",
        "get_world_size", "is_initialized", "get_default_device", "current_stream",
    }
)  # fmt: skip
_CONTEXTS = frozenset(  # entered: another state of torch, even where it is the one there was
    {
        torch.autocast.__enter__.__code__, torch.enable_grad.__enter__.__code__,
        torch.set_grad_enabled.__init__.__code__, torch.inference_mode.__enter__.__code__,
    }
)  # fmt: skip
_TENSOR_HOLDERS = ("_parameters", "_buffers")
_HOLDERS = (*_TENSOR_HOLDERS, "_modules")


def _called_by_user(frame: types.FrameType | None) -> bool:
    """Whether it is a user's code, and not ours, that torch was called by."""
    name = "torch"
    while frame is not None and (name.partition(".")[0] in ("torch", "contextlib")):
        frame = frame.f_back
        name = (frame and frame.f_globals.get("__name__")) or ""
    return not name.startswith(_OURS)


def pause_profiler() -> Callable[[], None]:
    """Stops the caller's profiler; returns what starts it again.

    Raises:
        Refused: it is written in C, of a kind that only its owner can start again.
    """
    profiler = sys.getprofile()
    if isinstance(profiler, cProfile.Profile):
        profiler.disable()
        return profiler.enable
    if profiler is not None and not callable(profiler):
        raise Refused(f"was traced while a profiler ran ({type(profiler).__module__}): fuse first")
    return lambda: sys.setprofile(profiler)


class _Watch(threading.local):
    observer: "Observer | None" = None


_watch = _Watch()


class Observer:
    """Watches the calling thread between `with observer.watching(root):` and its end."""

    def __init__(self) -> None:
        self.seen = Observed()
        self.symbol: Callable[[Tensor], Any] | None = None  # what stands for a tensor attribute
        self.reason: str | None = None  # why the forward is refused
        self.asking = False  # hasattr, getattr or isinstance is being answered
        self.in_torch = False  # one of torch's functions in C runs, called by a user's forward
        self._codes: set[types.CodeType] = set()
        self._inner: set[types.CodeType] = set()
        self._users: set[types.CodeType] = set()
        self._classes: dict[nn.Module, type[nn.Module]] = {}
        self._held: dict[nn.Module, list[tuple[dict[str, Any], dict[str, Any]]]] = {}

    @contextmanager
    def watching(self, root: nn.Module) -> Iterator[None]:
        """Watches what happens inside; afterwards nothing that was reached is changed.

        Raises:
            Refused: for what happened.
        """
        resume = pause_profiler()
        _watch.observer, outer = self, _watch.observer
        self.touch(root)
        generators = shared_generators()
        collects = gc.isenabled()
        gc.disable()  # callbacks of a collection are no part of the forward
        sys.setprofile(self._profile)
        try:
            yield
        finally:
            sys.setprofile(None)
            resume()
            gc.enable() if collects else None
            _watch.observer = outer
            for module, kind in self._classes.items():
                module.__class__ = kind
            changed, drawn = self.seen.undo(), put_back(generators)
            if (name := self._release()) is not None:
                own = name.startswith("_tensor_constant")
                reason = "makes a tensor of its own" if own else f"sets self.{name}"
                self.reason = self.reason or reason
            if changed is not None:
                self.reason = self.reason or f"changes {changed}"
            if drawn:
                self.reason = self.reason or "draws random numbers"
        if self.reason is not None:
            raise Refused(self.reason)

    def _release(self) -> str | None:
        """Gives modules back the attributes they had; returns the name of one that had changed."""
        changed = None
        for holders in self._held.values():
            for holder, before in holders:
                names = [n for n, v in holder.items() if before.get(n, MISSING) is not v]
                if names or len(holder) != len(before):
                    changed = next(iter([*names, *(before.keys() - holder.keys())]), "_modules")
                    holder.clear()
                    holder.update(before)
        return changed

    def refuse(self, reason: str) -> NoReturn:
        """Ends the forward that is being watched; a handler in it may not save it."""
        self.reason = self.reason or reason
        raise Refused(reason)

    def touch(self, module: nn.Module) -> None:
        """Watches a module's attributes, too."""
        if module not in self._classes and not isinstance(module, torch.jit.ScriptModule):
            attributes = _plain_vars(module)
            held = (attributes, *(attributes[name] for name in _HOLDERS))
            self._held[module] = [(holder, dict(holder)) for holder in held]
            kind = type(module)
            try:
                module.__class__ = _watched_class(kind)  # type: ignore[arg-type]
            except TypeError:
                self.refuse(f"reads a {kind.__name__}, whose attributes cannot be watched")
            self._classes[module] = kind

    def read(self, module: nn.Module, name: str, found: Any) -> Any:
        """Notes that the forward has read an attribute; returns what it shall get."""
        try:
            return self._read(module, name, found)
        except Refused as reason:
            self.reason = self.reason or str(reason)
            raise

    def _read(self, module: nn.Module, name: str, found: Any) -> Any:
        kind, attributes = self._classes.get(module, type(module)), _plain_vars(module)
        if name in attributes:
            if isinstance(found, Tensor) and self.symbol is not None:
                self.seen.read(module, name, Tensor)
                return self.symbol(found)
            self.seen.read(module, name, found)
        elif name in attributes["_modules"]:
            self.seen.read(module, name, found)
        elif any(name in attributes[holder] for holder in _TENSOR_HOLDERS):
            holder = next(h for h in _TENSOR_HOLDERS if name in attributes[h])
            self.seen.read(module, name, None if attributes[holder][name] is None else Tensor)
        else:
            self.seen.read(module, name, MISSING)
            static = getattr(kind, name, MISSING)
            if static is not MISSING:
                self.seen.read_class(kind, name, static)
        self._touch_found()
        return found

    def _touch_found(self) -> None:
        """Watches the modules that values read so far hold: in a list, an object, a closure."""
        modules = self.seen.snapshot.modules
        while modules:
            self.touch(modules.pop())

    def read_children(self, module: nn.Module) -> None:
        """Notes that the forward iterates over a module's children."""
        self.seen.children[id(module)] = module
        for child in _plain_vars(module)["_modules"].values():
            if child is not None:
                self.touch(child)

    def _profile(self, frame: types.FrameType, event: str, arg: Any) -> None:
        if event == "call":
            code = frame.f_code
            if code not in self._codes:
                self._codes.add(code)
                self._enter(frame, code)
        elif event == "c_call":
            if frame.f_code in self._users:
                self._c_call(arg)
            elif frame.f_code is torch.is_tensor.__code__:
                self.asking = True
        elif event in ("c_return", "c_exception"):
            asker = frame.f_code
            if asker in self._users:
                self.in_torch = False
            if event == "c_return" and self.asking:
                self.asking = asker not in self._users and asker is not torch.is_tensor.__code__

    def _enter(self, frame: types.FrameType, code: types.CodeType) -> None:
        name = frame.f_globals.get("__name__") or ""
        if is_known(name):
            if code in _CONTEXTS:
                self._codes.discard(code)
                if _called_by_user(frame):
                    self.refuse("changes autocast or whether gradients are kept")
            if code.co_name in _PYTHON_STATE and name.startswith("torch"):
                self._asked(frame, f"asks torch for {code.co_name}()")
            return
        caller = frame.f_back.f_code if frame.f_back is not None else None
        if name.partition(".")[0] in sys.stdlib_module_names and caller not in self._users:
            self._codes.discard(code)  # called by torch; a user's forward may still call it
            return
        self._users.add(code)
        facts = facts_of(code)
        self._inner.update(facts.inner)
        if facts.refusal is not None:
            self.refuse(facts.refusal)
        try:
            for chain in facts.reads:
                self.seen.read_global(frame.f_globals, chain)
            self._touch_found()
        except Refused as reason:
            self.refuse(str(reason))
        frees = [free for free in facts.frees if free != "__class__"]
        if frees and code not in self._inner and code not in self.seen.snapshot.functions:
            self.refuse(f"reads {frees[0]} of an enclosing function, which may change unseen")

    def _asked(self, frame: types.FrameType, reason: str) -> None:
        """Refuses a question that comes from a user's code, not from torch's own."""
        asker = frame.f_back
        if asker is not None and not is_known(asker.f_globals.get("__name__") or ""):
            self.refuse(reason)

    def _c_call(self, function: Any) -> None:
        name, owner = getattr(function, "__name__", ""), getattr(function, "__self__", None)
        module = getattr(function, "__module__", None)
        self.asking = name in ("hasattr", "getattr", "isinstance") and module == "builtins"
        self.in_torch = getattr(torch, name, None) is function
        if name in _STATE:
            self.refuse(f"asks torch for {name}()")
        if name == "setattr" and module == "builtins":
            self.refuse("calls setattr()")
        if module is not None and module.partition(".")[0] not in _C_MODULES:
            self.refuse(f"calls {module}.{name}()")
        if isinstance(owner, Tensor):
            self.refuse(f"reads numbers out of a tensor, by {name}()")
        if module is None and owner is not None and not isinstance(owner, _OWNERS):
            self.refuse(f"calls {type(owner).__name__}.{name}()")


def is_known(name: str) -> bool:
    """Whether a Python module's functions need no look."""
    if name.startswith(_OURS):
        return name not in _OUR_LAYERS
    return name.partition(".")[0] in _KNOWN


def asked_by_user(depth: int) -> bool:
    """Whether the frame `depth` above the caller's is of a user's forward."""
    return not is_known(sys._getframe(depth + 1).f_globals.get("__name__") or "")


def _plain_vars(module: nn.Module) -> dict[str, Any]:
    attributes: dict[str, Any] = object.__getattribute__(module, "__dict__")
    return attributes


@lru_cache(maxsize=512)
def _watched_class(kind: type[nn.Module]) -> type[nn.Module]:
    plain = kind.__getattribute__

    def __getattribute__(self: nn.Module, name: str) -> Any:  # noqa: N807
        observer = _watch.observer
        if observer is None or (name[:2] == "__" and name != "__dict__" and name != "__class__"):
            return plain(self, name)
        asker = sys._getframe(1)
        space = asker.f_globals.get("__name__") or ""
        if space in _MACHINERY:
            if name != "_modules":
                return plain(self, name)
            while asker.f_back and asker.f_globals.get("__name__") in _MACHINERY:
                asker = asker.f_back
            if not is_known(asker.f_globals.get("__name__") or ""):
                observer.read_children(self)
            return plain(self, name)
        if is_known(space):
            return plain(self, name)
        if name in ("__dict__", "__class__", *_TENSOR_HOLDERS):
            observer.refuse(f"reads self.{name}")
        if name == "_modules":
            observer.read_children(self)
            return plain(self, name)
        try:
            found = plain(self, name)
        except AttributeError:
            try:
                found = kind.__getattr__(self, name)
            except AttributeError:
                observer.read(self, name, MISSING)
                raise
        return observer.read(self, name, found)

    def __setattr__(self: nn.Module, name: str, value: Any) -> None:  # noqa: N807
        if _watch.observer is not None and asked_by_user(1):
            _watch.observer.refuse(f"sets self.{name}")
        kind.__setattr__(self, name, value)

    def __delattr__(self: nn.Module, name: str) -> None:  # noqa: N807
        if _watch.observer is not None and asked_by_user(1):
            _watch.observer.refuse(f"deletes self.{name}")
        kind.__delattr__(self, name)

    body = {
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__getattribute__": __getattribute__,
        "__setattr__": __setattr__,
        "__delattr__": __delattr__,
    }
    return type(kind.__name__, (kind,), body)


@contextmanager
def undrawn() -> Iterator[None]:
    """Restores the global random generators afterwards."""
    before = shared_generators()
    try:
        yield
    finally:
        put_back(before)


def shared_generators() -> tuple[Any, ...]:
    """Returns the states of the global random generators of Python, torch and numpy."""
    numpy = sys.modules.get("numpy")
    state = numpy.random.get_state() if numpy is not None else None
    return random.getstate(), torch.get_rng_state(), state


def put_back(before: tuple[Any, ...]) -> bool:
    """Sets the generators back; returns whether one had been used."""
    now = shared_generators()
    drawn = now[0] != before[0] or not torch.equal(now[1], before[1])
    if before[2] is not None:
        drawn = drawn or now[2][2:] != before[2][2:] or (now[2][1] != before[2][1]).any()
    if drawn:
        random.setstate(before[0])
        torch.set_rng_state(before[1])
        if before[2] is not None:
            sys.modules["numpy"].random.set_state(before[2])
    return drawn
