"""Checks a fused module and all fused modules within it at once, when the outermost is called.

Each module checks its own guards when it is called, since the code between two of them may change
anything. Where nothing but torch's own code runs between them, nothing changes until the outermost
returns, so one check is enough. It is also the cheaper one: between convolutions that have emptied
the caches, the checks of ResNet-50's 21 modules take 2 ms of 80 (one core, batch 1).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from resfuse.kernels.fusion.layers.compound_layers import FusedStep, convolutions
from resfuse.kernels.fusion.matching.layer_kinds import is_norm
from resfuse.kernels.fusion.planning.forwards import CalledModule
from resfuse.kernels.fusion.tracing.guards import Guards
from resfuse.kernels.fusion.tracing.module_tracing import has_hooks
from resfuse.kernels.observation.observed import Observed


class Plan(Protocol):
    """What is asked of a plan (plan.py)."""

    guards: Any
    forwards: Any
    steps: Any


@dataclass(frozen=True)
class KnownForward:
    """The forward of a module that has no plan: what it relies on, and what it calls."""

    observed: Observed
    called: dict[int, list[CalledModule]]  # by the number of tensors it is called with
    sequences: list[nn.Module]  # whose children it calls one after another


_KNOWN_NORMS = ("torch", "timm", "torchvision", "detectron2")  # packages


class TreeGuards:
    """The joined guards of a fused module and of all fused modules within it.

    Args:
        modules: the outermost first.
        plans: theirs.
        attribute: where a module keeps its plan.
        known: forwards of modules without a plan.

    Raises:
        ValueError: one of them may run code that is not torch's, or does not hold now.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        plans: Sequence[Plan],
        attribute: str,
        known: Mapping[nn.Module, KnownForward],
    ) -> None:
        between, leaves = _called_within(modules, plans, known)
        for each in (*modules, *between):
            _require_plain_tensors(each)
        forwards = [known[module] for module in between]
        own = Guards(
            Observed(),
            children=[sequence for each in forwards for sequence in each.sequences],
            called=[*modules, *between, *leaves],
            in_eval=[*modules, *between],
        )
        observed = [Guards(each.observed) for each in forwards]
        self._guards = Guards.joined([own, *observed, *(plan.guards for plan in plans)])
        holders: list[dict[str, Any]] = [child._modules for child in modules[0].modules()]
        run = [*modules, *between, *leaves]
        holders += [held for each in run for held in (each._parameters, each._buffers)]
        locations = [(holder, name, holder[name]) for holder in holders for name in holder]
        locations += [
            (vars(module), attribute, plan) for module, plan in zip(modules, plans, strict=True)
        ]
        self._holders = [holder for holder, *_ in locations]
        self._names = [name for _, name, _ in locations]
        self._values = [value for *_, value in locations]  # alive, so that their ids stay theirs
        self._ids = [*map(id, self._values)]
        self._owners = [*modules, *between]
        self._kinds = [*map(type, self._owners)]

    def hold(self) -> bool:
        """Whether every module computes what its original would, until the outermost returns."""
        return (
            [*map(type, self._owners)] == self._kinds
            and [*map(id, map(dict.get, self._holders, self._names))] == self._ids
            and self._guards.hold()
        )


class TreeCheck:
    """TreeGuards that are made when first asked for, and again after they have failed: at the next
    call, the one after two more, four more, ...

    Args:
        attribute: where a module keeps its plan.
        known: forwards of modules without a plan.
    """

    def __init__(self, attribute: str, known: Mapping[nn.Module, KnownForward]) -> None:
        self._attribute, self._known = attribute, known
        self._guards: TreeGuards | None = None
        self._wait, self._longest = 0, 1

    def holds(self, module: nn.Module, plans: Sequence[Plan]) -> bool:
        """Whether the guards of a module, and of all within it, hold until it returns."""
        guards = self._guards  # which another thread may replace
        if guards is not None and guards.hold():
            self._longest = 1
            return True
        if self._wait > 0:
            self._wait -= 1
            return False
        self._wait, self._longest = self._longest, min(2 * self._longest, 1024)
        modules = [child for child in module.modules() if self._attribute in vars(child)]
        try:
            self._guards = TreeGuards(modules, plans, self._attribute, self._known)
        except ValueError:
            self._guards = None
        return self._guards is not None


def _called_within(
    modules: Sequence[nn.Module], plans: Sequence[Plan], known: Mapping[nn.Module, KnownForward]
) -> tuple[list[nn.Module], list[nn.Module]]:
    """Returns all that is called in fused modules and has no plan: modules whose forward is known,
    and torch's own layers.

    Raises:
        ValueError: one may run code that is not torch's.
    """
    seen = {id(module) for module in modules}
    between: list[nn.Module] = []
    leaves: list[nn.Module] = []
    called = [each for plan in plans for each in _called_by(plan)]
    while called:
        module, tensors = called.pop()
        forward = known.get(module)
        if forward is not None and tensors not in forward.called:
            raise ValueError(f"{type(module).__name__} is not called with tensors alone")
        if id(module) in seen:
            continue
        seen.add(id(module))
        if has_hooks(module):
            raise ValueError(f"{type(module).__name__} has hooks, or a forward of its own")
        if forward is None:
            _require_leaf(module)
            leaves.append(module)
        else:
            between.append(module)
            called += [each for calls in forward.called.values() for each in calls]
    return between, leaves


def _called_by(plan: Plan) -> Iterator[CalledModule]:
    """Modules that a plan's forwards call, besides its steps."""
    if not plan.forwards:
        raise ValueError("a module runs its own forward")
    for step in plan.steps.values():
        _require_known(step)
    for forwards in plan.forwards.values():
        yield from forwards.called_modules()


def _require_known(step: FusedStep) -> None:
    norms = [layer.norm for layer in convolutions(step)] or [getattr(step, "norm", None)]
    for norm in norms:
        if norm is not None and is_norm(norm):
            package = type(norm).__module__.partition(".")[0]
            if package not in _KNOWN_NORMS:
                raise ValueError(f"{type(norm).__name__} is not torch's")


def is_torch_leaf(module: nn.Module) -> bool:
    """Returns whether a module is one of torch's own layers, without modules in it."""
    return not module._modules and type(module).__module__.startswith("torch.nn.modules.")


def _require_leaf(module: nn.Module) -> None:
    """Raises ValueError for what is not one of torch's own layers on plain tensors."""
    if not is_torch_leaf(module):
        raise ValueError(f"{type(module).__name__} may run code that is not torch's")
    _require_plain_tensors(module)


def _require_plain_tensors(module: nn.Module) -> None:
    tensors: list[Any] = [*module._parameters.values(), *module._buffers.values()]
    if not all(t is None or type(t) in (Tensor, nn.Parameter) for t in tensors):
        raise ValueError(f"the tensors of {type(module).__name__} may run code")
