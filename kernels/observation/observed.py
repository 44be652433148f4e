"""What a forward relies on besides its arguments, as it was when the forward read it."""

import builtins
import types
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from resfuse.kernels.observation.snapshot import MISSING, Snapshot, Unwatchable, same

_TRACING = "torch.fx._symbolic_trace"


class Refused(Exception):
    """A forward does what no graph can do; the message ends "forward ..."."""


@dataclass
class Observed:
    """What a forward relies on, besides its arguments."""

    attributes: dict[tuple[int, str], tuple[nn.Module, str, Any]] = field(default_factory=dict)
    children: dict[int, nn.Module] = field(default_factory=dict)  # whose list of children was read
    classes: dict[tuple[type, str], Any] = field(default_factory=dict)
    spaces: dict[tuple[int, str], tuple[dict[str, Any], str, Any]] = field(default_factory=dict)
    snapshot: Snapshot = field(default_factory=Snapshot)
    _classes_then: dict[type, dict[str, Any]] = field(default_factory=dict)

    def read(self, module: nn.Module, name: str, value: Any) -> None:
        """A module's own attribute; MISSING where it has none of that name."""
        if (id(module), name) not in self.attributes:
            self.attributes[id(module), name] = (module, name, value)
            self._add(value, f"self.{name}")

    def read_class(self, kind: type, name: str, value: Any) -> None:
        if (kind, name) not in self.classes:
            self.classes[kind, name] = value
            self._add(value, f"{kind.__name__}.{name}")

    def read_global(self, space: dict[str, Any], chain: tuple[str, ...]) -> None:
        """A global, and what is read of it as far as modules and classes go."""
        name, *rest = chain
        value = self._read_name(space, name)
        for attribute in rest:
            if isinstance(value, types.ModuleType):
                value = self._read_name(vars(value), attribute)
            elif isinstance(value, type):
                kind, value = value, getattr(value, attribute, MISSING)
                self._remember(kind)
                if value is not MISSING:
                    self.read_class(kind, attribute, value)
            else:
                break

    def _read_name(self, space: dict[str, Any], name: str) -> Any:
        value = _as_it_was(space.get(name, MISSING))
        if value is MISSING:
            return getattr(builtins, name, MISSING) if "__builtins__" in space else MISSING
        if (id(space), name) not in self.spaces:
            self.spaces[id(space), name] = (space, name, value)
            self._add(value, f"the global {name}")
            if isinstance(value, type):
                self._remember(value)
        return value

    def _remember(self, kind: type) -> None:
        if not kind.__module__.startswith("torch") and kind.__flags__ & (1 << 9):
            self._classes_then.setdefault(kind, dict(vars(kind)))

    def _add(self, value: Any, where: str) -> None:
        try:
            if value is not MISSING:
                self.snapshot.add(value)
        except Unwatchable as kind:
            raise Refused(f"reads {where}, {kind}, which may change unseen") from None

    def undo(self) -> str | None:
        """Takes back what has changed since it was read; returns what that was."""
        what = "a list, a dict or an object" if self.snapshot.undo() else None
        for space, name, value in self.spaces.values():
            if not same(_as_it_was(space.get(name, MISSING)), value):
                space[name], what = value, f"the global {name}"
        for kind, before in self._classes_then.items():
            for name in [n for n, v in vars(kind).items() if not same(v, before.get(n, MISSING))]:
                what = f"{kind.__name__}.{name}"
                setattr(kind, name, before[name]) if name in before else delattr(kind, name)
        return what

    def update(self, other: "Observed") -> None:
        """Takes in what another forward relies on."""
        self.attributes.update(other.attributes)
        self.children.update(other.children)
        self.classes.update(other.classes)
        self.spaces.update(other.spaces)
        self.snapshot.pairs += other.snapshot.pairs
        self.snapshot.functions.update(other.snapshot.functions)


def _as_it_was(value: Any) -> Any:
    """A global before torch.fx wrapped it, as it does with math's functions while it traces."""
    if not isinstance(value, types.FunctionType) or value.__module__ == _TRACING:
        return value
    wrapped = value.__globals__.get("__name__") == _TRACING
    return vars(value).get("__wrapped__", value) if wrapped else value
