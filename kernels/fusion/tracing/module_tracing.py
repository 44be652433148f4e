"""Traces the forward of one module with torch.fx.

fuse() works on one module's forward at a time, so that the modules of a model stay where they are:
their names, their hooks, and what a user calls directly. A module's children are leaves of its
graph, except sequences of plain layers (a projection shortcut, torchvision's
Conv2dNormActivation), which are traced through.
"""

import inspect
import operator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.fx as fx
import torch.nn.functional as F
from torch import Tensor, nn

from resfuse.kernels.observation.observed import Observed, Refused
from resfuse.kernels.observation.observer import Observer, asked_by_user
from resfuse.kernels.observation.snapshot import Unwatchable

# Layers with no layers inside; timm's and torchvision's own kinds go by name, as they may be absent
ATOMS = (
    nn.Conv2d, nn.modules.batchnorm._BatchNorm, nn.Identity, nn.ReLU, nn.ReLU6, nn.SiLU,
    nn.LeakyReLU, nn.PReLU, nn.Hardswish, nn.GELU, nn.MaxPool2d, nn.AvgPool2d,
    nn.modules.dropout._DropoutNd,
)  # fmt: skip
ATOM_NAMES = ("FrozenBatchNorm2d", "BatchNormAct2d", "FrozenBatchNormAct2d")
ORIGINAL = "_resfuse_original"  # a fused module's class keeps the class it was made from


class NotTraceable(Exception):
    """What `forward` does depends on more than a graph can say; the message is the reason."""


class Call(NamedTuple):
    """How a forward is called: with how many arguments, and what the first of them is."""

    arguments: int
    takes_list: bool = False  # the first argument is a list of tensors, and not a tensor
    donated: bool = False  # the first argument may be overwritten (JAX: a donated buffer)


@dataclass(frozen=True)
class Trace:
    """A forward as a graph over the arguments of one way to call it."""

    graph: fx.Graph
    asks_types: bool  # forward asks isinstance(argument, ...): the graph holds for one answer only
    observed: Observed  # what else it relies on


def original_class(module: nn.Module) -> type[nn.Module]:
    """Returns the class of a module before it was fused."""
    return getattr(type(module), ORIGINAL, type(module))


def is_atom(module: nn.Module) -> bool:
    return isinstance(module, ATOMS) or type(module).__name__ in ATOM_NAMES


def is_plain_sequence(module: nn.Module) -> bool:
    """Returns whether a module is a Sequential of atoms with nothing attached, and a forward that
    only runs them."""
    return (
        isinstance(module, nn.Sequential)
        and original_class(module).forward is nn.Sequential.forward
        and not has_hooks(module)
        and all(is_atom(child) or is_plain_sequence(child) for child in module)
    )


def has_hooks(module: nn.Module) -> bool:
    """Returns whether calling the module does more than its forward."""
    own = vars(module)
    return (
        any(hooks_of(module))
        or "forward" in own
        or own.get("_compiled_call_impl") is not None  # module.compile()
    )


def hooks_of(module: nn.Module) -> tuple[dict[int, Any], ...]:
    """Returns the module's own dicts of hooks, in which later hooks show up."""
    return (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )


def calls(module: nn.Module) -> list[Call]:
    """Returns the ways to call a module by position: without its optional tensors, and with them.

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


def trace(module: nn.Module, call: Call) -> Trace:
    """Traces `module.forward`, called that way, in the mode it is in (the caller has set that).

    DenseNet's layers take a tensor or a list of them, ask isinstance which, and are called with a
    list: hence `call.takes_list`, which is what isinstance then answers.

    Raises:
        NotTraceable: with the reason.
    """
    defaults = {p.name: p.default for p in _parameters(module)[call.arguments :]}
    for name, value in defaults.items():
        if isinstance(value, tuple | list | dict | set):
            raise NotTraceable(f"forward has a default that torch.fx cannot read, {name}")
    tracer = ModuleTracer()
    tracer.argument = list if call.takes_list else Tensor
    observer = tracer.observer
    fused_class, module.__class__ = type(module), original_class(module)
    try:
        with observer.watching(module):
            observer.seen.snapshot.add(original_class(module).forward)
            graph = tracer.trace(module, concrete_args=defaults or None)
    except (Refused, Unwatchable) as reason:
        raise NotTraceable(f"forward {reason}") from reason
    except Exception as error:  # whatever foreign code does with a symbol instead of a tensor
        refused = observer.reason and f"forward {observer.reason}"
        raise NotTraceable(refused or _first_sentence(error)) from error
    finally:
        module.__class__ = fused_class
    _drop_defaults(graph, call.arguments)
    return Trace(graph, tracer.asked, observer.seen)


def _parameters(module: nn.Module) -> list[inspect.Parameter]:
    return list(inspect.signature(original_class(module).forward).parameters.values())[1:]


class _Answers(fx.Proxy):
    """A symbol that answers what it is as the value it stands for would."""

    tracer: "ModuleTracer"

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        observer = self.tracer.observer
        if not observer.asking:
            # torch.cat(symbol) asks, too, in C
            if asked_by_user(1) and not observer.in_torch:
                observer.refuse("asks for the __class__ of a tensor")
            return type(self)
        kind = self.tracer.kind_of(self)
        if kind is None:
            observer.refuse("asks for the type of what a module or a function returns")
        self.tracer.asked = True
        return kind

    def __getattr__(self, name: str) -> "_Attribute":
        kind = self.tracer.kind_of(self)
        if kind is None and self.tracer.observer.asking:
            self.tracer.observer.refuse("asks for attributes of what a module returns")
        if kind is not None and not hasattr(kind, name):
            self.tracer.asked = True
            raise AttributeError(f"'{kind.__name__}' object has no attribute '{name}'")
        return _Attribute(self, name)

    def __iadd__(self, other: Any) -> fx.Proxy:
        """Traces `x += y` as a write in place; fx would take it for `x = x + y`, and other
        references to x would miss the write."""
        return self._in_place(operator.iadd, other)

    def __isub__(self, other: Any) -> fx.Proxy:
        return self._in_place(operator.isub, other)

    def __imul__(self, other: Any) -> fx.Proxy:
        return self._in_place(operator.imul, other)

    def __itruediv__(self, other: Any) -> fx.Proxy:
        return self._in_place(operator.itruediv, other)

    def _in_place(self, operation: Any, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operation, (self, other), {})


class _Attribute(_Answers, fx.proxy.Attribute):
    """`x.shape`; what is called, `x.size()`, never becomes one in the graph."""


class ModuleTracer(fx.Tracer):
    """Traces through plain sequences, and nothing else."""

    proxy_buffer_attributes = True

    def __init__(self) -> None:
        super().__init__()
        self.observer = Observer()
        self.observer.symbol = self._tensor_attribute
        self.argument: type = Tensor  # what the first argument is
        self.asked = False  # for the type of a symbol
        self._contexts = _contexts()

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Answers(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not is_plain_sequence(m)

    def create_arg(self, a: Any) -> Any:
        return a.node if issubclass(type(a), fx.Proxy) else super().create_arg(a)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _contexts() != self._contexts:
            self.observer.refuse("changes autocast or whether gradients are kept")
        return super().create_node(*args, **kwargs)

    def kind_of(self, symbol: fx.Proxy) -> type | None:
        """Returns the type of the value a symbol stands for; None where only a run can tell."""
        return None if type(symbol) is _Attribute else self._kind_of_node(symbol.node)

    def _kind_of_node(self, node: Any) -> type | None:
        if not isinstance(node, fx.Node):
            return None
        if node.op == "placeholder":
            first = next(iter(node.graph.nodes)) is node
            return self.argument if first else Tensor
        if node.op == "call_module":
            return Tensor if returns_a_tensor(self.root.get_submodule(str(node.target))) else None
        if node.target in _ARITHMETIC and Tensor in map(self._kind_of_node, node.args):
            return Tensor
        return Tensor if node.op == "get_attr" or node.target in _MAKE_TENSORS else None

    def _tensor_attribute(self, tensor: Tensor) -> Any:
        """Returns a node for a tensor that is a plain attribute, read whenever the graph runs, like
        a buffer."""
        name = self.tensor_attrs.get(tensor)
        return tensor if name is None else self.create_proxy("get_attr", name, (), {})


def returns_a_tensor(module: nn.Module) -> bool:
    """Returns whether a module is one of torch's own layers, called with one tensor, or a sequence
    of them."""
    if isinstance(module, nn.Sequential):
        return is_plain_sequence(module) and len(module) > 0
    return is_atom(module) or isinstance(module, _TENSOR_LAYERS)


_TENSOR_LAYERS = (
    nn.Linear, nn.GroupNorm, nn.LayerNorm, nn.Sigmoid, nn.Tanh, nn.ELU, nn.Hardsigmoid,
    nn.Hardtanh, nn.Softmax, nn.AdaptiveAvgPool2d, nn.Flatten, nn.Upsample, nn.ConvTranspose2d,
)  # fmt: skip
_MAKE_TENSORS = (  # of a tensor, whatever else they are given
    torch.cat, torch.relu, torch.sigmoid, torch.flatten, F.relu, F.silu, F.dropout, F.conv2d,
    F.avg_pool2d, F.adaptive_avg_pool2d, F.interpolate, F.pad, "relu", "relu_", "sigmoid", "view",
    "reshape", "flatten", "mean", "permute", "transpose", "contiguous", "unsqueeze", "squeeze",
    "clone", "detach", "float", "to",
)  # fmt: skip

_ARITHMETIC = (
    operator.add, operator.sub, operator.mul, operator.truediv, operator.iadd, operator.isub,
    operator.imul, operator.itruediv, torch.add, "add", "add_", "mul", "mul_",
)  # fmt: skip


def _contexts() -> tuple[Any, ...]:
    """Returns the settings that affect how a forward's operations compute, besides their
    arguments."""
    autocasts = [
        (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
        for device in ("cpu", "cuda")
    ]
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocasts


def _drop_defaults(graph: fx.Graph, arguments: int) -> None:
    """Removes fx's assertions that concrete arguments have their traced values: they are never
    passed."""
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for node in placeholders[arguments:]:
        for user in list(node.users):
            for last in reversed([user, *user.users]):
                graph.erase_node(last)
        graph.erase_node(node)


def _first_sentence(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0][:120] if text else type(error).__name__
