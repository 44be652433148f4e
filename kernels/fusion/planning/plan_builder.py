"""Plans what fusing each module of a model comes to, before anything is changed."""

from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
import torch.fx as fx
from torch import nn

from resfuse.kernels.fusion.layers.compound_layers import FusedStep, StemStep
from resfuse.kernels.fusion.layers.fast_path import FastPath
from resfuse.kernels.fusion.matching.input_effects import Effects, draws_random_numbers
from resfuse.kernels.fusion.matching.layer_kinds import is_norm
from resfuse.kernels.fusion.matching.match import WhySkipped, find_chains, remove_no_ops
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
class PlannedModule:
    """What fusing one module comes to; `plan` is None where there is nothing to fuse."""

    plan: Plan | None
    unfused: dict[str, str]  # name of a convolution in the module -> why it is left alone
    inlined: list[nn.Module]  # children whose layers are in the plan


def make_plan(module: nn.Module, why_skipped: WhySkipped) -> PlannedModule:
    """Plans one module's forward; the module is not changed.

    Args:
        why_skipped: the reason to leave a layer for something outside of the module, or None.
    """
    modes = {child: child.training for child in module.modules()}
    try:
        for child in modes:
            child.training = False
        with torch.no_grad():  # as it will run
            return _plan_module(module, why_skipped)
    except NotTraceable as reason:
        own = [name for name, child in module.named_children() if isinstance(child, nn.Conv2d)]
        kind = original_class(module).__name__
        return PlannedModule(None, dict.fromkeys(own, f"{kind}.forward: {reason}"), [])
    finally:
        for child, mode in modes.items():
            child.training = mode


def plans_of(model: nn.Module) -> list[tuple[str, nn.Module, PlannedModule]]:
    """Plans every module that calls layers in its forward: returns name, module and plan of each.

    Parents come first, and may have taken plain sequences of layers into their own graph. A model
    that has nothing but single convolutions (a vision transformer's patches) is left as it is.
    """
    why_skipped = why_skipped_in(model)
    taken: set[nn.Module] = set()
    found: list[tuple[str, nn.Module, PlannedModule]] = []
    for name, module in model.named_modules():
        if module not in taken and not is_atom(module) and has_layers(module):
            planned = make_plan(module, why_skipped)
            taken.update(planned.inlined)
            found.append((name, module, planned))
    steps = [step for *_, planned in found if planned.plan for step in planned.plan.steps.values()]
    if all(step.chain == "conv" for step in steps):
        return [(name, module, _nothing_in(planned)) for name, module, planned in found]
    return found


def _nothing_in(planned: PlannedModule) -> PlannedModule:
    layers = planned.plan.layers if planned.plan is not None else []
    reason = "no batch norm, activation or sum follows it"
    return PlannedModule(None, planned.unfused | {layer.name: reason for layer in layers}, [])


def _plan_module(module: nn.Module, why_skipped: WhySkipped) -> PlannedModule:
    steps: dict[str, FusedStep] = {}
    watched: set[str] = set()
    containers: set[str] = set()
    unfused: dict[str, str] = {}
    forwards: dict[Call, Forwards] = {}
    folds: Folds = {}
    fresh = False
    effects = Effects()
    for call, traced in _traces(module).items():
        graph = traced.graph
        effects.observed.update(traced.observed)
        twice = called_twice(graph, module)
        containers.update(sequences_in(graph))
        watched.update(remove_no_ops(graph, module, effects.returns_input))
        alone = or_called_twice(why_skipped, twice)
        chains, unmatched = find_chains(graph, module, alone, writes=effects.writes)
        unfused |= unmatched
        prefix = f"with_{call.arguments}{'_list' * call.takes_list}{'_donated' * call.donated}_"
        fast_path = FastPath()
        made = rewrite(graph, module, chains, prefix, folds, fast_path)
        if call.donated and not overwrite_input(graph, made):
            continue
        steps |= made
        watched.update(name for chain in chains for name in chain.modules)
        pools = [step.pool for step in made.values() if isinstance(step, StemStep)]
        watched.update(name for name, child in module.named_modules() if child in pools)
        takes_one_tensor = call.arguments == 1 and not call.takes_list
        forwards[call] = GraphForwards(
            graph, module, made, prefix, fast_path if takes_one_tensor else None
        )
        if call == Call(1):
            fresh = returns_a_step(graph, steps)
    if not steps:
        return PlannedModule(None, unfused, [])
    sequences = [module.get_submodule(name) for name in containers]
    plan = Plan(
        module, forwards, steps, sorted(watched | containers), unfused, returns_fresh=fresh,
        observed=effects.observed,
        children=[*sequences, module] if isinstance(module, nn.Sequential) else sequences,
    )  # fmt: skip
    return PlannedModule(plan, unfused, [child for child in sequences if is_plain_sequence(child)])


def _traces(module: nn.Module) -> dict[Call, Trace]:
    """Traces the module's forward for every way to call it that can be traced."""
    plain, *with_more = calls(module)
    traced = trace(module, plain)
    if draws_random_numbers(traced.graph):
        raise NotTraceable("forward draws random numbers")
    traces = {plain: traced}
    if plain.arguments == 1:
        traces[plain._replace(donated=True)] = replace(traced, graph=_copy(traced.graph))
    lists = traced.asks_types or _concatenates(traced.graph)
    others = [Call(plain.arguments, takes_list=True)] if lists else []
    for call in [*others, *with_more]:
        with suppress(NotTraceable):
            other = trace(module, call)
            if not draws_random_numbers(other.graph) and not (
                call.takes_list and _calls_with_it(other.graph)
            ):
                traces[call] = other
    return traces


def _concatenates(graph: fx.Graph) -> bool:
    """Whether a forward's first argument is what torch.cat is given, which is a list."""
    placeholder = next(iter(graph.nodes))
    return any(
        user.target in (torch.cat, torch.concat) and user.args[:1] == (placeholder,)
        for user in placeholder.users
    )


def _calls_with_it(graph: fx.Graph) -> bool:
    """Whether layers are called with the list that a forward was given: they raise their error."""
    placeholder = next(iter(graph.nodes))
    return any(user.op == "call_module" for user in placeholder.users)


def _copy(graph: fx.Graph) -> fx.Graph:
    twin = fx.Graph(tracer_cls=graph._tracer_cls)
    twin.output(twin.graph_copy(graph, {}))
    return twin


def why_skipped_in(model: nn.Module) -> WhySkipped:
    """Returns a function that skips layers used in two places, and parameters of two layers."""
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


def or_called_twice(why_skipped: WhySkipped, twice: set[nn.Module]) -> WhySkipped:
    def reason(layer: nn.Module) -> str | None:
        return why_skipped(layer) or ("it is called more than once" if layer in twice else None)

    return reason


def called_twice(graph: fx.Graph, module: nn.Module) -> set[nn.Module]:
    called = Counter(
        module.get_submodule(str(node.target)) for node in graph.nodes if node.op == "call_module"
    )
    return {layer for layer, times in called.items() if times > 1}


def sequences_in(graph: fx.Graph) -> set[str]:
    """Names of the sequences that were traced through."""
    targets = [str(node.target).split(".") for node in graph.nodes if node.op == "call_module"]
    return {".".join(path[:depth]) for path in targets for depth in range(1, len(path))}
