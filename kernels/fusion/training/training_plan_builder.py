"""Makes the training plans of a model: each module's forward, traced as it runs in training mode,
with a training step in place of every chain that has a batch norm.
"""

from collections.abc import Iterator
from contextlib import suppress

import torch.fx as fx
from torch import nn

from resfuse.kernels.fusion.matching.layer_kinds import is_norm, why_not_norm_in_training
from resfuse.kernels.fusion.matching.match import Chain, WhySkipped, find_chains, remove_no_ops
from resfuse.kernels.fusion.planning.plan_builder import (
    called_twice,
    has_layers,
    or_called_twice,
    why_skipped_in,
)
from resfuse.kernels.fusion.planning.plan_builder import sequences_in as containers_in
from resfuse.kernels.fusion.planning.rewrite import (
    attribute_of,
    compile_forward,
    replace_chain,
    replace_view_with_reshape,
)
from resfuse.kernels.fusion.tracing.module_tracing import (
    Call,
    NotTraceable,
    Trace,
    calls,
    has_hooks,
    is_atom,
    is_plain_sequence,
    original_class,
)
from resfuse.kernels.fusion.training.training_layers import (
    AnyTrainingStep,
    JoinStep,
    PooledStep,
    TrainingStep,
    averages_over,
    steps_of,
)
from resfuse.kernels.fusion.training.training_plan import TRAINING_STEPS, TrainingPlan
from resfuse.kernels.fusion.training.training_tracer import trace_for_training
from resfuse.kernels.observation.observed import Observed


def plans_for_training(model: nn.Module) -> Iterator[tuple[str, nn.Module, TrainingPlan]]:
    """Yields every module that calls batch norms in its forward: its name, itself, and its plan,
    which may have no forward. Nothing is changed."""
    why_skipped = why_skipped_in(model)
    taken: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module in taken or is_atom(module) or not has_layers(module):
            continue
        plan = make_training_plan(module, why_skipped)
        taken.update(_inlined(module, plan))
        if plan.steps or plan.unfused:
            yield name, module, plan


def make_training_plan(module: nn.Module, why_skipped: WhySkipped) -> TrainingPlan:
    """Makes the plan of one module, without forwards where nothing can be fused.

    Args:
        why_skipped: the reason to leave a layer for something outside of the module, or None.
    """
    steps: dict[str, AnyTrainingStep] = {}
    forwards: dict[Call, fx.Graph] = {}
    guarded: set[str] = set()
    reasons: dict[str, str] = {}
    observed = Observed()
    try:
        traces = _traces(module)
    except NotTraceable as reason:
        own = [name for name, child in module.named_children() if is_norm(child)]
        kind = original_class(module).__name__
        return TrainingPlan(module, {}, {}, [], dict.fromkeys(own, f"{kind}.forward: {reason}"))
    for call, traced in traces.items():
        graph = traced.graph
        observed.update(traced.observed)
        containers = containers_in(graph)
        norms = _norms_in(graph, module)
        guarded.update(remove_no_ops(graph, module, _is_identity))
        twice = or_called_twice(why_skipped, called_twice(graph, module))
        found, _ = find_chains(graph, module, twice, why_not_norm_in_training)
        chains = [chain for chain in found if chain.norm is not None]
        fused_steps = _rewrite(graph, chains, f"with_{call.arguments}_")
        fused = {name for chain in chains for name in chain.modules}
        fused |= _take_pools(graph, module, fused_steps)
        for name, norm in norms.items():
            if name not in fused:
                reasons[name] = twice(norm) or why_not_norm_in_training(norm) or "nothing fits it"
        if fused_steps:
            steps |= fused_steps
            guarded.update(fused | containers)
            forwards[call] = graph
    compiled = {
        call: compile_forward(graph, f"{original_class(module).__name__} in training")
        for call, graph in forwards.items()
    }
    return TrainingPlan(module, compiled, steps, sorted(guarded), reasons, observed)


def _traces(module: nn.Module) -> dict[Call, Trace]:
    """Traces the module's forward in training mode, for every way to call it with tensors."""
    plain, *with_more = calls(module)
    traces = {plain: trace_for_training(module, plain)}
    for call in with_more:
        with suppress(NotTraceable):
            traces[call] = trace_for_training(module, call)
    return traces


def _rewrite(graph: fx.Graph, chains: list[Chain], prefix: str) -> dict[str, AnyTrainingStep]:
    nodes: dict[fx.Node, AnyTrainingStep] = {}
    replaced: dict[fx.Node, fx.Node] = {}
    for chain in chains:
        target = f"{TRAINING_STEPS}.{prefix}{chain.name.replace('.', '_')}"
        nodes[replace_chain(graph, chain, target, replaced)] = TrainingStep(chain)
    _take_in(graph, nodes)
    for node, step in list(nodes.items()):
        added = node.args[1] if len(node.args) == 2 else None
        projection = nodes.get(added) if isinstance(added, fx.Node) else None
        if (
            isinstance(added, fx.Node)
            and isinstance(step, TrainingStep)
            and isinstance(projection, TrainingStep)
            and len(added.users) == 1
            and _is_projection(step, projection)
        ):
            node.args = (node.args[0], added.args[0])
            graph.erase_node(added)
            del nodes[added]
            nodes[node] = JoinStep(step, projection)
    replace_view_with_reshape(graph)
    return {attribute_of(node): step for node, step in nodes.items()}


def _take_in(graph: fx.Graph, nodes: dict[fx.Node, AnyTrainingStep]) -> None:
    """Lets 1x1 convolutions compute the norm before them, where they alone read it."""
    for node, step in list(nodes.items()):
        before = node.args[0]
        if not isinstance(before, fx.Node) or len(before.users) != 1 or before in node.args[1:]:
            continue
        first = nodes.get(before)
        assert isinstance(step, TrainingStep)
        if isinstance(first, TrainingStep) and step.takes_in(first):
            step.take_in(first)
            node.args = (before.args[0], *node.args[1:])
            graph.erase_node(before)
            del nodes[before]


def _take_pools(graph: fx.Graph, module: nn.Module, steps: dict[str, AnyTrainingStep]) -> set[str]:
    """Puts max-pools that alone read a step with a ReLU into it; returns their names."""
    taken = set()
    for node in list(graph.nodes):
        if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
            continue
        before, name = node.args[0], str(node.target)
        step = steps.get(attribute_of(before)) if isinstance(before, fx.Node) else None
        if not isinstance(step, TrainingStep) or len(before.users) != 1:
            continue
        pool = module.get_submodule(name) if attribute_of(node) not in steps else None
        if type(pool) is not nn.MaxPool2d or pool.return_indices or has_hooks(pool):
            continue
        if _ends_in_relu(step):
            steps[attribute_of(before)] = PooledStep(step, pool)
            node.replace_all_uses_with(before)
            graph.erase_node(node)
            taken.add(name)
    return taken


def _ends_in_relu(step: TrainingStep) -> bool:
    return step.activation == "relu" and step.residual != "after" and not step.norm_activates


def _is_projection(step: TrainingStep, projection: TrainingStep) -> bool:
    """Returns whether a step adds a norm's result, so that both norms can be applied at once."""
    return (
        step.residual == "before"
        and step.activation in ("relu", "identity")
        and not step.norm_activates
        and projection.activation == "identity"
        and projection.residual == "none"
        and averages_over(projection.norm) == averages_over(step.norm)
    )


def _norms_in(graph: fx.Graph, module: nn.Module) -> dict[str, nn.Module]:
    called = {
        str(node.target): module.get_submodule(str(node.target))
        for node in graph.nodes
        if node.op == "call_module"
    }
    return {name: child for name, child in called.items() if is_norm(child)}


def _is_identity(module: nn.Module) -> bool:
    return type(module) is nn.Identity and not has_hooks(module)


def _inlined(module: nn.Module, plan: TrainingPlan) -> list[nn.Module]:
    """Returns the sequences whose layers are in the module's own plan."""
    names = {own.name.rpartition(".")[0] for s in plan.steps.values() for own in steps_of(s)}
    modules = [module.get_submodule(name) for name in names if name]
    return [child for child in modules if is_plain_sequence(child)]
