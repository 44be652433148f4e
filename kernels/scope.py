"""Scopes: whose `forward` calls which layers. fuse() works on one module's forward at a time, so
that the modules of a model stay where they are: their names, hooks, and what people call directly.

A scope's forward is traced with torch.fx. Its children are leaves, except sequences of plain layers
(a projection shortcut, torchvision's Conv2dNormActivation), which are traced through.
"""

import builtins
import inspect
import operator
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch.fx as fx
from torch import Tensor, nn

# Layers with no layers inside; timm's and torchvision's own kinds go by name, as they may be absent
ATOMS = (
    nn.Conv2d, nn.modules.batchnorm._BatchNorm, nn.Identity, nn.ReLU, nn.ReLU6, nn.SiLU,
    nn.LeakyReLU, nn.PReLU, nn.Hardswish, nn.MaxPool2d, nn.AvgPool2d, nn.modules.dropout._DropoutNd,
)  # fmt: skip
ATOM_NAMES = ("FrozenBatchNorm2d", "BatchNormAct2d", "FrozenBatchNormAct2d")
ORIGINAL = "_resfuse_original"  # a fused module's class keeps the class it was made from


class NotTraceable(Exception):
    """What `forward` does depends on more than a graph can say; the message is the reason."""


class Call(NamedTuple):
    """How a forward is called: with that many arguments, the first a tensor or a list of them,
    which may be nobody else's."""

    arguments: int
    takes_list: bool = False
    owns: bool = False


@dataclass(frozen=True)
class Trace:
    """A forward as a graph over the arguments of one way to call it."""

    graph: fx.Graph
    asks_types: bool  # forward asks isinstance(argument, ...): the graph holds for one answer only


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module before it was fused."""
    return getattr(type(module), ORIGINAL, type(module))


def is_atom(module: nn.Module) -> bool:
    return isinstance(module, ATOMS) or type(module).__name__ in ATOM_NAMES


def is_plain_sequence(module: nn.Module) -> bool:
    """A Sequential of atoms with nothing attached to it, and a forward that only runs them."""
    return (
        isinstance(module, nn.Sequential)
        and original_class(module).forward is nn.Sequential.forward
        and not has_hooks(module)
        and all(is_atom(child) or is_plain_sequence(child) for child in module)
    )


def has_hooks(module: nn.Module) -> bool:
    """True where calling the module does more than its forward."""
    return any(hooks_of(module)) or "forward" in vars(module)


def hooks_of(module: nn.Module) -> tuple[dict[int, Any], ...]:
    """The module's own dicts of hooks: later ones show up in them."""
    return (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )


def calls(module: nn.Module) -> list[Call]:
    """The ways to call a module by position: without its optional tensors, and with them.

    Raises:
        NotTraceable: forward takes any number of arguments.
    """
    parameters = _parameters(module)
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        raise NotTraceable("forward takes any number of arguments")
    required = [p for p in parameters if p.default is p.empty]
    found = [Call(len(required))]
    for parameter in parameters[len(required) :]:
        if parameter.default is not None or parameter.kind is parameter.KEYWORD_ONLY:
            break
        found.append(Call(found[-1].arguments + 1))
    return found


def trace(module: nn.Module, call: Call, tracer: "ScopeTracer | None" = None) -> Trace:
    """Traces `module.forward`, called that way, in the mode it is in (the caller has set that).

    DenseNet's layers take a tensor or a list of them, ask isinstance which, and are called with a
    list: hence `call.takes_list`, which is what isinstance then answers.

    Args:
        tracer: one that looks closer.

    Raises:
        NotTraceable: with the reason.
    """
    forward = original_class(module).forward
    defaults = {p.name: p.default for p in _parameters(module)[call.arguments :]}
    tracer = ScopeTracer() if tracer is None else tracer
    attributes = dict(vars(module))
    fused_class, module.__class__ = module.__class__, original_class(module)
    with _isinstance_answers(forward, not call.takes_list) as questions:
        try:
            graph = tracer.trace(module, concrete_args=defaults or None)
        except Exception as error:  # whatever foreign code does with a symbol instead of a tensor
            raise NotTraceable(_first_sentence(error)) from error
        finally:
            module.__class__ = fused_class
            changed = _restore(module, attributes)
    if any(name.startswith("_tensor_constant") for name in changed):
        raise NotTraceable("forward makes a tensor of its own")
    if changed:
        raise NotTraceable(f"forward sets self.{changed[0]}")
    _drop_defaults(graph, call.arguments)
    return Trace(graph, bool(questions))


def _restore(module: nn.Module, attributes: dict[str, Any]) -> list[str]:
    """Takes back what tracing a forward did to its module; returns the attributes' names."""
    now = vars(module)
    changed = [n for n, value in now.items() if n not in attributes or attributes[n] is not value]
    now.clear()
    now.update(attributes)
    return changed


def _parameters(module: nn.Module) -> list[inspect.Parameter]:
    return list(inspect.signature(original_class(module).forward).parameters.values())[1:]


class _Proxy(fx.Proxy):
    """fx takes `x += y` for `x = x + y`; who else holds x would miss the write."""

    def __iadd__(self, other: Any) -> fx.Proxy:
        return self._in_place(operator.iadd, other)

    def __isub__(self, other: Any) -> fx.Proxy:
        return self._in_place(operator.isub, other)

    def __imul__(self, other: Any) -> fx.Proxy:
        return self._in_place(operator.imul, other)

    def __itruediv__(self, other: Any) -> fx.Proxy:
        return self._in_place(operator.itruediv, other)

    def _in_place(self, operation: Any, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operation, (self, other), {})


class ScopeTracer(fx.Tracer):
    """Traces through plain sequences, and nothing else."""

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not is_plain_sequence(m)


@contextmanager
def _isinstance_answers(forward: Any, tensors: bool) -> Iterator[list[Any]]:
    """Within `forward`'s Python module, isinstance takes a symbol for a tensor, or for a list."""
    space, questions = forward.__globals__, []

    def answer(instance: Any, kind: Any) -> bool:
        if not builtins.isinstance(instance, fx.Proxy):
            return builtins.isinstance(instance, kind)
        questions.append(kind)
        return issubclass(Tensor if tensors else list, kind)

    before = space.get("isinstance")
    space["isinstance"] = answer
    try:
        yield questions
    finally:
        if before is None:
            del space["isinstance"]
        else:
            space["isinstance"] = before


def _drop_defaults(graph: fx.Graph, arguments: int) -> None:
    """fx asserts that concrete arguments keep their values; we do not pass them at all."""
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for node in placeholders[arguments:]:
        for user in list(node.users):
            for last in reversed([user, *user.users]):
                graph.erase_node(last)
        graph.erase_node(node)


def _first_sentence(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0][:120] if text else type(error).__name__
