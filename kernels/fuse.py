"""fuse, unfuse and fused: faster layers for a model that stays the same object to everybody else.

model = fuse(torchvision.models.resnet50().eval())
with torch.inference_mode():
    model(images)
print(explain(model, images))
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass

import torch.fx as fx
from torch import Tensor, nn

from resfuse.kernels.layers import DTYPES, is_norm
from resfuse.kernels.match import drop_idle, find_chains
from resfuse.kernels.parity import require_parity
from resfuse.kernels.plan import (
    Forward,
    Plan,
    attach,
    compile_forward,
    detach,
    plan_of,
)
from resfuse.kernels.rewrite import Folds, rewrite
from resfuse.kernels.scope import (
    Call,
    NotTraceable,
    calls,
    is_atom,
    is_plain_sequence,
    original_class,
    trace,
)
from resfuse.kernels.steps import Step

LeftAlone = Callable[[nn.Module], str | None]


@dataclass(frozen=True)
class Drafted:
    """A scope's plan, None where there is nothing to fuse."""

    plan: Plan | None
    left: dict[str, str]  # name of a convolution in the scope -> why it is left alone
    inlined: list[nn.Module]  # children whose layers are in the plan


def fuse(model: nn.Module, example: Tensor | None = None, *, inplace: bool = False) -> nn.Module:
    """Fuses every conv-BN(-activation)(-add) it understands; `explain` says which.

    The result has the parameters, buffers, names and hooks of `model`. In eval mode and without
    gradients it computes with folded weights, which follow the parameters when those change; in
    training mode it does what `model` does.

    Args:
        model: any module, on one device, of floating-point weights.
        example: an input [N, C, H, W]; if given, the fused model's answer to it is compared with
            the original's.
        inplace: change `model` itself rather than a copy.

    Raises:
        ValueError: `model` is no module, is on the meta device or on several, or has weights of a
            dtype that no kernel computes in; `example` does not fit it; or the answers differ.
    """
    _require_fusible(model)
    fused_model = model if inplace else deepcopy(model)
    for _, scope, drafted in scopes(fused_model):
        if drafted.plan is not None and plan_of(scope) is None:
            attach(scope, drafted.plan)
    if example is not None:
        try:
            require_parity(fused_model, example, without=unfused(fused_model))
        except ValueError:
            unfuse(fused_model)
            raise
    return fused_model


def unfuse(model: nn.Module) -> nn.Module:
    """Undoes `fuse`, in place: the very modules `model` had run again."""
    for module in model.modules():
        if plan_of(module) is not None:
            detach(module)
    return model


@contextmanager
def fused(model: nn.Module) -> Iterator[nn.Module]:
    """`with fused(model):` runs it fused inside, and as it was afterwards."""
    fuse(model, inplace=True)
    try:
        yield model
    finally:
        unfuse(model)


@contextmanager
def unfused(model: nn.Module) -> Iterator[nn.Module]:
    """The other way round, for a comparison; plans and what they have folded are kept."""
    plans = [(module, plan) for module in model.modules() if (plan := plan_of(module)) is not None]
    for module, _ in plans:
        detach(module)
    try:
        yield model
    finally:
        for module, plan in plans:
            attach(module, plan)


def make_plan(scope: nn.Module, left_alone: LeftAlone) -> Drafted:
    """What fusing one module's forward comes to; it is not changed.

    Args:
        left_alone: the reason to leave a layer for something outside of the scope, or None.
    """
    modes = {module: module.training for module in scope.modules()}
    try:
        for module in modes:
            module.training = False
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
    left_alone = _left_alone_in(model)
    taken: set[nn.Module] = set()
    found: list[tuple[str, nn.Module, Drafted]] = []
    for name, module in model.named_modules():
        if module not in taken and not is_atom(module) and _has_layers(module):
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
    forwards: dict[Call, Forward] = {}
    folds: Folds = {}
    for call, graph in _graphs(scope).items():
        twice = _called_twice(graph, scope)
        containers.update(_containers(graph))
        watched.update(drop_idle(graph, scope))
        chains, unmatched = find_chains(
            graph,
            scope,
            lambda layer, twice=twice: (
                left_alone(layer) or ("it is called more than once" if layer in twice else None)
            ),
        )
        left |= unmatched
        prefix = f"with_{call.arguments}{'_list' if call.takes_list else ''}_"
        steps |= rewrite(graph, scope, chains, prefix, folds)
        watched.update(name for chain in chains for name in chain.modules)
        forwards[call] = compile_forward(graph, original_class(scope).__name__)
    if not steps:
        return Drafted(None, left, [])
    inlined = [
        module for name in containers if is_plain_sequence(module := scope.get_submodule(name))
    ]
    plan = Plan(scope, forwards, steps, sorted(watched | containers), left)
    return Drafted(plan, left, inlined)


def _graphs(scope: nn.Module) -> dict[Call, fx.Graph]:
    """The scope's forward for every way to call it that can be traced."""
    plain, *with_more = calls(scope)
    traced = trace(scope, plain)
    graphs = {plain: traced.graph}
    if traced.asks_types:
        of_list = Call(plain.arguments, takes_list=True)
        graphs[of_list] = trace(scope, of_list).graph
    for call in with_more:
        with suppress(NotTraceable):
            graphs[call] = trace(scope, call).graph
    return graphs


def _left_alone_in(model: nn.Module) -> LeftAlone:
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


def _has_layers(module: nn.Module) -> bool:
    return any(isinstance(child, nn.Conv2d) or is_norm(child) for child in module.modules())


def _called_twice(graph: fx.Graph, scope: nn.Module) -> set[nn.Module]:
    called = Counter(
        scope.get_submodule(str(node.target)) for node in graph.nodes if node.op == "call_module"
    )
    return {layer for layer, times in called.items() if times > 1}


def _containers(graph: fx.Graph) -> set[str]:
    """Names of the sequences that were traced through."""
    targets = [str(node.target).split(".") for node in graph.nodes if node.op == "call_module"]
    return {".".join(path[:depth]) for path in targets for depth in range(1, len(path))}


def _require_fusible(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(f"argument model: a {type(model).__name__}; accepted: a torch.nn.Module")
    devices = {str(t.device) for t in [*model.parameters(), *model.buffers()]}
    if "meta" in devices:
        raise ValueError("argument model: on the meta device, without weights; accepted: cpu, cuda")
    if len(devices) > 1:
        raise ValueError(f"argument model: on {', '.join(sorted(devices))}; accepted: one device")
    for name, module in model.named_modules():
        weight = module._parameters.get("weight") if isinstance(module, nn.Conv2d) else None
        if weight is not None and weight.dtype not in DTYPES:
            names = ", ".join(str(dtype) for dtype in DTYPES)
            raise ValueError(f"argument model: {name}.weight is {weight.dtype}; accepted: {names}")
