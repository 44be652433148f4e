"""Drafts: what fusing each module of a model comes to, before anything is changed."""

from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
import torch.fx as fx
from torch import nn

from resfuse.kernels.fusion.layers.fast_path import FastPath
from resfuse.kernels.fusion.layers.fused_layers import StemStep, Step
from resfuse.kernels.fusion.matching.input_effects import Effects, draws
from resfuse.kernels.fusion.matching.layer_kinds import is_norm
from resfuse.kernels.fusion.matching.match import LeftAlone, drop_idle, find_chains
from resfuse.kernels.fusion.planning.forward_variants import GraphForwards
from resfuse.kernels.fusion.planning.forwards import Forwards
from resfuse.kernels.fusion.planning.plan import Plan
from resfuse.kernels.fusion.planning.rewrite import Folds, overwrite_input, returns_a_step, rewrite
from resfuse.kernels.fusion.tracing.module_tracing import (
    Call,
    NotTraceable,
    Trace,
    calls,
    is_atom,
    is_plain_sequence,
    original_class,
    trace,
)


@dataclass(frozen=True)
class Drafted:
    """A scope's plan, None where there is nothing to fuse."""

    plan: Plan | None
    left: dict[str, str]  # name of a convolution in the scope -> why it is left alone
    inlined: list[nn.Module]  # children whose layers are in the plan


def make_plan(scope: nn.Module, left_alone: LeftAlone) -> Drafted:
    """What fusing one module's forward comes to; it is not changed.

    Args:
        left_alone: the reason to leave a layer for something outside of the scope, or None.
    """
    modes = {module: module.training for module in scope.modules()}
    try:
        for module in modes:
            module.training = False
        with torch.no_grad():  # as it will run
            return _draft(scope, left_alone)
    except NotTraceable as reason:
        own = [name for name, child in scope.named_children() if isinstance(child, nn.Conv2d)]
        kind = original_class(scope).__name__
        return Drafted(None, dict.fromkeys(own, f"{kind}.forward: {reason}"), [])
    finally:
        for module, mode in modes.items():
            module.training = mode


def scopes(model: nn.Module) -> list[tuple[str, nn.Module, Drafted]]:
    """Every module that calls layers in its forward: its name, itself, and the draft of its plan.

    Parents come first, and may have taken plain sequences of layers into their own graph. A model
    that has nothing but single convolutions (a vision transformer's patches) is left as it is.
    """
    left_alone = left_alone_in(model)
    taken: set[nn.Module] = set()
    found: list[tuple[str, nn.Module, Drafted]] = []
    for name, module in model.named_modules():
        if module not in taken and not is_atom(module) and has_layers(module):
            drafted = make_plan(module, left_alone)
            taken.update(drafted.inlined)
            found.append((name, module, drafted))
    steps = [step for *_, drafted in found if drafted.plan for step in drafted.plan.steps.values()]
    if all(step.chain == "conv" for step in steps):
        return [(name, module, _nothing_in(drafted)) for name, module, drafted in found]
    return found


def _nothing_in(drafted: Drafted) -> Drafted:
    layers = drafted.plan.layers if drafted.plan is not None else []
    reason = "no batch norm, activation or sum follows it"
    return Drafted(None, drafted.left | {layer.name: reason for layer in layers}, [])


def _draft(scope: nn.Module, left_alone: LeftAlone) -> Drafted:
    steps: dict[str, Step] = {}
    watched: set[str] = set()
    containers: set[str] = set()
    left: dict[str, str] = {}
    forwards: dict[Call, Forwards] = {}
    folds: Folds = {}
    fresh = False
    effects = Effects()
    for call, traced in _traces(scope).items():
        graph = traced.graph
        effects.observed.update(traced.observed)
        twice = called_twice(graph, scope)
        containers.update(sequences_in(graph))
        watched.update(drop_idle(graph, scope, effects.hands_on))
        alone = or_called_twice(left_alone, twice)
        chains, unmatched = find_chains(graph, scope, alone, writes=effects.writes)
        left |= unmatched
        prefix = f"with_{call.arguments}{'_list' * call.takes_list}{'_owned' * call.owns}_"
        fast_path = FastPath()
        made = rewrite(graph, scope, chains, prefix, folds, fast_path)
        if call.owns and not overwrite_input(graph, made):
            continue
        steps |= made
        watched.update(name for chain in chains for name in chain.modules)
        pools = [step.pool for step in made.values() if isinstance(step, StemStep)]
        watched.update(name for name, module in scope.named_modules() if module in pools)
        takes_one_tensor = call.arguments == 1 and not call.takes_list
        forwards[call] = GraphForwards(graph, scope, made, fast_path if takes_one_tensor else None)
        if call == Call(1):
            fresh = returns_a_step(graph, steps)
    if not steps:
        return Drafted(None, left, [])
    sequences = [scope.get_submodule(name) for name in containers]
    plan = Plan(
        scope, forwards, steps, sorted(watched | containers), left, returns_fresh=fresh,
        observed=effects.observed,
        children=[*sequences, scope] if isinstance(scope, nn.Sequential) else sequences,
    )  # fmt: skip
    return Drafted(plan, left, [module for module in sequences if is_plain_sequence(module)])


def _traces(scope: nn.Module) -> dict[Call, Trace]:
    """The scope's forward for every way to call it that can be traced."""
    plain, *with_more = calls(scope)
    traced = trace(scope, plain)
    if draws(traced.graph):
        raise NotTraceable("forward draws random numbers")
    traces = {plain: traced}
    if plain.arguments == 1:
        traces[plain._replace(owns=True)] = replace(traced, graph=_copy(traced.graph))
    others = [Call(plain.arguments, takes_list=True)] if traced.asks_types else []
    for call in [*others, *with_more]:
        with suppress(NotTraceable):
            other = trace(scope, call)
            if not draws(other.graph) and not (call.takes_list and _calls_with_it(other.graph)):
                traces[call] = other
    return traces


def _calls_with_it(graph: fx.Graph) -> bool:
    """Whether layers are called with the list that a forward was given: they raise their error."""
    placeholder = next(iter(graph.nodes))
    return any(user.op == "call_module" for user in placeholder.users)


def _copy(graph: fx.Graph) -> fx.Graph:
    twin = fx.Graph(tracer_cls=graph._tracer_cls)
    twin.output(twin.graph_copy(graph, {}))
    return twin


def left_alone_in(model: nn.Module) -> LeftAlone:
    """Sees layers that stand in the model twice, and parameters that belong to two layers."""
    named = Counter(module for _, module in model.named_modules(remove_duplicate=False))
    owners = Counter(
        id(parameter)
        for module in model.modules()
        for parameter in module._parameters.values()
        if parameter is not None
    )

    def reason(layer: nn.Module) -> str | None:
        if named[layer] > 1:
            return "it is shared: the model has it in two places"
        if any(owners[id(p)] > 1 for p in layer._parameters.values() if p is not None):
            return "its weight is tied to another layer's"
        return None

    return reason


def has_layers(module: nn.Module) -> bool:
    return any(isinstance(child, nn.Conv2d) or is_norm(child) for child in module.modules())


def or_called_twice(left_alone: LeftAlone, twice: set[nn.Module]) -> LeftAlone:
    def reason(layer: nn.Module) -> str | None:
        return left_alone(layer) or ("it is called more than once" if layer in twice else None)

    return reason


def called_twice(graph: fx.Graph, scope: nn.Module) -> set[nn.Module]:
    called = Counter(
        scope.get_submodule(str(node.target)) for node in graph.nodes if node.op == "call_module"
    )
    return {layer for layer, times in called.items() if times > 1}


def sequences_in(graph: fx.Graph) -> set[str]:
    """Names of the sequences that were traced through."""
    targets = [str(node.target).split(".") for node in graph.nodes if node.op == "call_module"]
    return {".".join(path[:depth]) for path in targets for depth in range(1, len(path))}
