"""Finds out what calling a module does to the tensor it is given: returns it, or writes to it.

torch's own layers are known. The forward of any other module is traced, and what the answer relies
on is added to the guards of the plan. A module that cannot be traced is taken to write.
"""

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.fx as fx
from torch import nn

from resfuse.kernels.fusion.matching.layer_kinds import is_norm, skips_in_eval
from resfuse.kernels.fusion.tracing.module_tracing import (
    Call,
    NotTraceable,
    calls,
    has_hooks,
    original_class,
    trace,
)
from resfuse.kernels.observation.observed import Observed

Writes = Callable[[nn.Module], bool]

_IN_PLACE = (
    operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.setitem,
)  # fmt: skip
_NEW = (  # make a tensor of their own
    operator.add, operator.sub, operator.mul, operator.truediv, torch.add, torch.cat, torch.mul,
    torch.relu, torch.sigmoid, torch.nn.functional.conv2d, torch.nn.functional.linear,
    torch.nn.functional.avg_pool2d, "mean", "sigmoid", "add", "mul", "clone", "relu", "softmax",
)  # fmt: skip


class Effects:
    """What the children of one module do to their inputs."""

    def __init__(self) -> None:
        self.observed = Observed()  # what is relied on, added to
        self._graphs: dict[nn.Module, fx.Graph | None] = {}

    def returns_input(self, module: nn.Module) -> bool:
        """Returns whether a module returns what it is given, in eval mode."""
        if skips_in_eval(module):
            return True
        if is_torchs(module) or has_hooks(module) or any(True for _ in module.parameters()):
            return False
        graph = self._graph_of(module)
        if graph is None:
            return False
        nodes = list(graph.nodes)
        return len(nodes) == 2 and nodes[1].args[0] is nodes[0]

    def writes(self, module: nn.Module) -> bool:
        """Returns whether a module may write to the tensor it is given."""
        if any(has_hooks(inner) for inner in module.modules()):
            return True
        if is_norm(module) or skips_in_eval(module):
            return False
        if is_torchs(module):
            own = bool(getattr(module, "inplace", False))
            return own or any(map(self.writes, module.children()))
        graph = self._graph_of(module)
        if graph is None:
            return True
        return any(
            writes_in_place(node, module, self.writes) and not self._is_new(node.args[0], module)
            for node in graph.nodes
        )

    def _is_new(self, value: Any, module: nn.Module) -> bool:
        """Returns whether a result is a new tensor, and no view of the input."""
        if not isinstance(value, fx.Node) or value.op in ("placeholder", "get_attr"):
            return False
        if value.op == "call_module":
            layer = module.get_submodule(str(value.target))
            if isinstance(layer, nn.Conv2d | nn.Linear) or is_norm(layer):
                return True
        elif value.target in _NEW:
            return True
        return bool(value.args) and all(
            self._is_new(arg, module) for arg in value.args if isinstance(arg, fx.Node)
        )

    def _graph_of(self, module: nn.Module) -> fx.Graph | None:
        if module not in self._graphs:
            self._graphs[module] = None
            try:
                plain = calls(module)[0]
                if plain == Call(1):
                    traced = trace(module, plain)
                    self.observed.update(traced.observed)
                    self._graphs[module] = traced.graph
            except NotTraceable:
                pass
        return self._graphs[module]


def draws_random_numbers(graph: fx.Graph) -> bool:
    """Returns whether a graph draws random numbers. In which order a tensor gets them depends on
    its memory format, and so would what a seed stands for."""
    return any(
        getattr(node.target, "__name__", node.target) in _RANDOM_FUNCTIONS and not _is_off(node)
        for node in graph.nodes
        if node.op in ("call_function", "call_method")
    )


def _is_off(node: fx.Node) -> bool:
    """Returns whether a node is a dropout with training=False."""
    given = node.kwargs.get("training", node.args[2] if len(node.args) > 2 else True)
    return "dropout" in getattr(node.target, "__name__", "") and given is False


_RANDOM_FUNCTIONS = frozenset({
    "dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout",
    "feature_dropout", "rand_like", "randn_like", "randint_like", "bernoulli", "bernoulli_",
    "normal", "normal_", "uniform_", "multinomial", "poisson", "rrelu", "rrelu_", "random_",
    "exponential_", "gumbel_softmax", "cauchy_", "geometric_", "log_normal_",
    "fractional_max_pool2d",
})  # fmt: skip


def is_torchs(module: nn.Module) -> bool:
    """Returns whether a layer is torch's own with nothing overridden."""
    kind = original_class(module)
    return kind.__module__.startswith("torch.nn.") and kind.__call__ is nn.Module.__call__


def writes_in_place(node: fx.Node, module: nn.Module, writes: Writes) -> bool:
    """Returns whether a node of `module`'s graph may write to a tensor that others see.

    Args:
        writes: whether a module may write to what it is given.
    """
    if node.op == "call_module":
        return writes(module.get_submodule(str(node.target)))
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    if node.op == "call_function":
        name = getattr(node.target, "__name__", "")
        in_place = node.kwargs.get("inplace", False) or node.kwargs.get("out") is not None
        in_place = in_place or any(arg is True for arg in node.args[1:])  # F.relu(x, True)
        return (
            bool(in_place)
            or node.target in _IN_PLACE
            or name.endswith("_")
            or (not _is_known(node.target))
        )
    return False


def _is_known(function: Any) -> bool:
    """Returns whether a function is torch's or Python's own."""
    module = getattr(function, "__module__", None) or "torch"
    return module.partition(".")[0] in (
        "torch",
        "_operator",
        "builtins",
        "math",
        "_VariableFunctions",
    )
