"""Whether everything a rewritten forward relies on, besides its arguments, is as it was when it was
made: attributes that the original read, the layers it stands for, classes and globals.

The check runs at every call of every fused module, so it compares whole dicts in C with what they
were; only where they differ it looks whether the difference matters.
"""

from collections.abc import Iterable, Sequence
from types import CellType
from typing import Any, NamedTuple, TypeVar

from torch import Tensor, nn

from resfuse.kernels.fusion.tracing.module_tracing import ORIGINAL
from resfuse.kernels.observation.observed import Observed
from resfuse.kernels.observation.snapshot import MISSING, Pair, alike, contents, same

_METHODS = ("forward", "__call__", "_conv_forward", "_check_input_dim")  # what runs a layer
_SHADOWS = ("forward", "_compiled_call_impl")  # what a call runs instead, if an instance has it
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_UNRELATED = ("training", "_is_full_backward_hook")
_T = TypeVar("_T")


class _Now(NamedTuple):
    """What was found the last time that everything held, in lists that are compared in C."""

    live: list[Any]
    copies: list[Any]
    kinds: list[type]


class Guards:
    """The guards of one plan, which are checked together.

    Args:
        observed: what its forwards read.
        layers: modules it stands for: they must stay what they are in everything.
        children: modules whose children must stay the same: sequences that were traced through.
        called: modules that are run past their `__call__`.
        in_eval: layers that must be in eval mode.
        locations: where layers are found: a module, a name, and its child of that name.
        module: the module whose forward was rewritten.
    """

    def __init__(
        self,
        observed: Observed,
        layers: Iterable[nn.Module] = (),
        children: Iterable[nn.Module] = (),
        called: Iterable[nn.Module] = (),
        in_eval: Iterable[nn.Module] = (),
        locations: Iterable[tuple[nn.Module, str, nn.Module]] = (),
        module: nn.Module | None = None,
    ) -> None:
        layers, called = list(dict.fromkeys(layers)), list(dict.fromkeys(called))
        self._in_eval = list(in_eval)
        self._unchanged = [(layer, dict(vars(layer))) for layer in layers]
        self._reads = [*observed.attributes.values(), *locations]
        self._reads += [(m, name, attribute(m, name)) for m in called for name in _SHADOWS]
        self._parents = [
            (m, dict(m._modules)) for m in dict.fromkeys([*observed.children.values(), *children])
        ]
        readers = {id(m): m for m, *_ in self._reads}
        self._fixed = {id(m) for m in [*layers, *called, *children]} | set(readers)
        modules = list({id(m): m for m in [*layers, *readers.values()]}.values())
        holders = [*modules, *(m for m, _ in self._parents)]
        self._modules = list({id(m): m for m in holders}.values())
        self._pairs: list[Pair] = [*observed.snapshot.pairs]
        self._pairs += [(v, list(v)) for m in layers for v in _lists_of(m)]
        self._hooks = [vars(m)[name] for m in [*layers, *called] for name in _HOOKS]
        whose = [*layers, *called] if module is None else [module, *layers, *called]
        self._kinds = [(m, kind_of(m)) for m in whose]
        methods = {
            (kind, name): getattr(kind, name)
            for kind in {kind for _, kind in self._kinds}
            for name in _METHODS
            if hasattr(kind, name)
        } | observed.classes
        self._class_of = [kind for kind, _ in methods]
        self._class_names = [name for _, name in methods]
        self._class_values = list(methods.values())
        spaces = list(observed.spaces.values())
        self._spaces = [space for space, *_ in spaces]
        self._globals = [name for _, name, _ in spaces]
        self._global_values = [value for *_, value in spaces]
        self._cells: list[tuple[CellType, Any]] = list(observed.snapshot.cells())
        self._now = self._look()

    @classmethod
    def joined(cls, guards: "Sequence[Guards]") -> "Guards":
        """Joins the guards of several plans, so that what they share is checked once.

        Raises:
            ValueError: they do not hold now.
        """
        one = cls.__new__(cls)
        for name in ("_in_eval", "_unchanged", "_reads", "_parents", "_kinds", "_cells"):
            setattr(one, name, [value for each in guards for value in getattr(each, name)])
        one._fixed = set().union(*(each._fixed for each in guards))
        one._modules = _once(module for each in guards for module in each._modules)
        one._hooks = _once(hooks for each in guards for hooks in each._hooks)
        pairs = {id(container): (container, copy) for g in guards for container, copy in g._pairs}
        one._pairs = list(pairs.values())
        methods = {
            (kind, name): value
            for each in guards
            for kind, name, value in zip(
                each._class_of, each._class_names, each._class_values, strict=True
            )
        }
        one._class_of = [kind for kind, _ in methods]
        one._class_names = [name for _, name in methods]
        one._class_values = list(methods.values())
        spaces = {
            (id(space), name): (space, name, value)
            for each in guards
            for space, name, value in zip(
                each._spaces, each._globals, each._global_values, strict=True
            )
        }
        one._spaces = [space for space, *_ in spaces.values()]
        one._globals = [name for _, name, _ in spaces.values()]
        one._global_values = [value for *_, value in spaces.values()]
        one._now = _Now([], [], [])
        if any(one._hooks) or not one._hold_exactly():
            raise ValueError("the guards do not hold")
        return one

    def hold(self) -> bool:
        """Returns whether the rewritten forward computes the same as the original."""
        if any(self._hooks):
            return False
        now = self._now
        try:
            if (
                now.live == now.copies
                and [*map(type, self._modules)] == now.kinds
                and [*map(getattr, self._class_of, self._class_names)] == self._class_values
                and [*map(dict.get, self._spaces, self._globals)] == self._global_values
                and (not self._cells or self._cells_hold())
            ):
                return True
        except Exception:  # comparing foreign objects may do anything; a closer look does not
            pass
        return self._hold_exactly()

    def _look(self) -> _Now:
        live: list[Any] = [vars(m) for m in self._modules]
        live += [m._modules for m in self._modules if m._modules]
        copies = [dict(container) for container in live]
        live += [container for container, _ in self._pairs]
        copies += [copy for _, copy in self._pairs]
        return _Now(live, copies, [*map(type, self._modules)])

    def _hold_exactly(self) -> bool:
        """Looks at what matters; where only other things have changed, remembers them."""
        now = self._look()
        holds = (
            all(not layer.training for layer in self._in_eval)
            and all(_is_as_it_was(layer, then) for layer, then in self._unchanged)
            and all(self._child_holds(m._modules, then) for m, then in self._parents)
            and all(self._read_holds(*read) for read in self._reads)
            and all(kind_of(m) is kind for m, kind in self._kinds)
            and all(alike(container, copy) for container, copy in self._pairs)
            and all(map(_same_method, self._class_of, self._class_names, self._class_values))
            and all(map(same, map(dict.get, self._spaces, self._globals), self._global_values))
            and self._cells_hold()
        )
        if holds:
            self._now = now
        return holds

    def _cells_hold(self) -> bool:
        return all(same(contents(cell), value) for cell, value in self._cells)

    def _read_holds(self, module: nn.Module, name: str, then: Any) -> bool:
        now = attribute(module, name)
        if isinstance(then, nn.Module):
            return self._same_child(now, then)
        if then is Tensor:
            return isinstance(now, Tensor)
        return same(now, then)

    def _child_holds(self, now: dict[str, Any], then: dict[str, Any]) -> bool:
        return list(now) == list(then) and all(map(self._same_child, now.values(), then.values()))

    def _same_child(self, now: Any, then: Any) -> bool:
        """Returns whether a child is still acceptable: one that is only called may be replaced by
        another of its class, such as a new head."""
        if now is then:
            return True
        alike = isinstance(now, nn.Module) and kind_of(now) is kind_of(then)
        return alike and id(then) not in self._fixed


def _once(values: Iterable[_T]) -> list[_T]:
    """Returns the objects without repetitions."""
    return list({id(value): value for value in values}.values())


def kind_of(module: nn.Module) -> type[nn.Module]:
    """Returns the class that a module has, or had before it was fused."""
    return getattr(type(module), ORIGINAL, type(module))


def attribute(module: nn.Module, name: str) -> Any:
    """Returns a module's own attribute, child, parameter or buffer; MISSING where it has none."""
    attributes = vars(module)
    if name in attributes:
        return attributes[name]
    for holder in ("_modules", "_parameters", "_buffers"):
        if name in attributes[holder]:
            return attributes[holder][name]
    return MISSING


def _lists_of(layer: nn.Module) -> list[list[Any]]:
    """Returns the sizes in a layer that were given as lists, which may be written to."""
    return [v for k, v in vars(layer).items() if type(v) is list and not k.startswith("_")]


def _is_as_it_was(layer: nn.Module, then: dict[str, Any]) -> bool:
    now = vars(layer)
    if any(not same(now.get(k, MISSING), v) for k, v in then.items() if k not in _UNRELATED):
        return False
    return not any(hasattr(kind_of(layer), name) for name in now.keys() - then.keys())


def _same_method(kind: type, name: str, then: Any) -> bool:
    now = getattr(kind, name, MISSING)
    return same(now, then) or now == then  # a classmethod is bound anew each time it is read
