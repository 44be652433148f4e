"""A plan holds the rewritten forwards of one module, decides at each call whether one of them may
run because it computes what the original would, and finds folded weights that are stale.
"""

import sys
import threading
import warnings
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from resfuse.kernels.cpu.weight_origin import Origin, tensors_of
from resfuse.kernels.fusion.layers.compound_layers import FusedStep, convolutions
from resfuse.kernels.fusion.layers.conv_region import ConvRegion
from resfuse.kernels.fusion.matching.layer_kinds import differs_in_training
from resfuse.kernels.fusion.planning.call_checks import (
    are_plain,
    are_traced,
    is_on_cuda,
    is_watched,
)
from resfuse.kernels.fusion.planning.forwards import Forwards
from resfuse.kernels.fusion.planning.tree_guards import KnownForward, TreeCheck
from resfuse.kernels.fusion.tracing.guards import Guards
from resfuse.kernels.fusion.tracing.memory_formats import InputFormat, suggests_channels_last
from resfuse.kernels.fusion.tracing.module_tracing import Call
from resfuse.kernels.observation.observed import Observed
from resfuse.kernels.observation.optimizer_steps import notify_of_steps

STEPS = "_resfuse_steps"  # the attribute of a fused module that holds its steps
PLAN = "_resfuse_plan"  # the attribute of a fused module that holds its plan
NOT_RUN = object()

Watched = tuple[nn.Module, str, nn.Module]  # where a layer is found, and which


class Plan:
    """The rewritten forwards of one module, by how it is called, and the conditions to run them."""

    def __init__(
        self,
        module: nn.Module,
        forwards: "dict[Call, Forwards]",
        steps: dict[str, FusedStep],
        watched: list[str],
        unfused: dict[str, str],
        *,
        returns_fresh: bool = False,
        observed: Observed | None = None,
        children: Sequence[nn.Module] = (),
    ) -> None:
        self._module = weakref.ref(module)
        self.forwards, self.steps, self.unfused = forwards, steps, unfused
        self.calls: dict[str, Any] = {}  # of fused children, by attribute: see forward_variants.py
        self._has_channels_last = False  # a weight of this module, or of one within it
        self.returns_fresh = returns_fresh  # the caller alone holds the output
        every = [layer for step in steps.values() for layer in convolutions(step)]
        self.layers = list({layer.fold: layer for layer in every}.values())
        self._every = every
        self._tree: list[Plan] = [self]  # of the module and all modules in it
        self._root = self
        self._sources = [source for layer in self.layers for source in layer.sources]
        self._origin: Origin | None = None  # of those sources, when they were looked at last
        self._suspect = False  # something has happened since that may have written to weights
        self._discards, self._lock = False, threading.RLock()
        self.frozen = False  # the user promised not to write to weights: calls need not look
        locations = [watch(module, name) for name in watched]
        self._layers = [layer for *_, layer in locations]
        self._tree_check = TreeCheck(PLAN, {})
        self.guards = Guards(
            Observed() if observed is None else observed,
            layers=() if observed is None else self._layers,
            children=children,
            called=self._layers if observed is None else (),
            in_eval=[layer for layer in self._layers if differs_in_training(layer)],
            locations=locations,
            module=module,
        )
        self._parameters = [(m._parameters, name) for m in self._layers for name in m._parameters]

    def run(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        donated: bool = False,
        input_format: InputFormat | None = None,
        *,
        flexible: bool = False,
    ) -> Any:
        """Runs the rewritten forward if it computes what the original would; else returns NOT_RUN.

        Args:
            donated: the caller does not need its argument any more, so it may be overwritten.
            input_format: which memory format eager's argument would have, where the caller knows
                that; by default it is the format of the arguments given.
            flexible: the argument, and the result, may be in any memory format.
        """
        root = self._root
        if root._discards:
            with root._lock:  # no other thread may see a layer that is just losing its weight
                root._discards = root._is_to_discard()
                return self._run_now(module, args, kwargs, donated, input_format, flexible)
        return self._run_now(module, args, kwargs, donated, input_format, flexible)

    def _run_now(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        donated: bool,
        input_format: InputFormat | None,
        flexible: bool,
    ) -> Any:
        if self.is_guarded():
            if not kwargs and _are_tensors(args) and self._module() is module:
                takes_list = type(args[0]) is list
                known = Call(len(args), takes_list, donated)
                if donated and known not in self.forwards:
                    known = Call(len(args), takes_list)
                if known in self.forwards:
                    return self._run(known, module, args, input_format, flexible, guarded=True)
            _current.guarded = None  # the module's own forward may change anything
        call = self._call(args, kwargs, donated)
        if call is None or self._module() is not module:
            return NOT_RUN
        if _current.root is self._root or torch.compiler.is_compiling():
            return self._run(call, module, args, input_format, flexible)
        self._forget_what_is_stale()
        outer = _current.root, _current.guarded
        _current.root, _current.guarded = self, self if self._tree_holds(module) else None
        try:
            return self._run(call, module, args, input_format, flexible)
        finally:
            _current.root, _current.guarded = outer

    def is_guarded(self) -> bool:
        """Whether its guards, and all other conditions, were checked with the outermost's."""
        return _current.guarded is self._root

    def _tree_holds(self, module: nn.Module) -> bool:
        """Whether no module within needs to check its guards in this call (tree_guards.py)."""
        if self._root is not self or len(self._tree) < 2:
            return False
        # Also those of layers in between: what they return then needs gradients.
        if torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters()):
            return False
        return self._tree_check.holds(module, self._tree)

    def take_over_submodules(
        self, module: nn.Module, known: Mapping[nn.Module, KnownForward]
    ) -> None:
        """From now on checks the weights of all modules within at once, when this one is called.

        Checked module by module, between convolutions that have emptied the caches, the 265 tensors
        of a ResNet-50 take 1.1 ms of its 33 ms (two cores, batch 1).

        Args:
            module: whose plan this is.
            known: forwards of modules without a plan.
        """
        self._tree = [plan for child in module.modules() if (plan := plan_of(child)) is not None]
        for plan in self._tree:
            plan._root = self
        self._sources = [s for plan in self._tree for layer in plan.layers for s in layer.sources]
        self._origin = None
        notify_of_steps(self)
        self._tree_check = TreeCheck(PLAN, known)
        self._look_at_formats()
        for forwards in self.forwards.values():
            self.calls |= forwards.compile_variants()
        vars(vars(module)[STEPS]).update(self.calls)

    def takes_flexible(self) -> bool:
        """Whether it takes one tensor in any memory format, and returns one in any."""
        forwards = self.forwards.get(Call(1))
        return (
            forwards is not None
            and forwards.variant("contiguous", True, guarded=self.is_guarded()).returns_flexible
        )

    def _look_at_formats(self) -> None:
        """Finds the modules in which a channels_last weight makes eager's results channels_last."""
        own = {
            plan: any(
                type(weight) in (Tensor, nn.Parameter) and suggests_channels_last(weight)
                for layer in plan.layers
                if (weight := layer.conv._parameters.get("weight")) is not None
            )
            for plan in self._tree
        }
        for plan in self._tree:
            plan._has_channels_last = any(own.get(within, False) for within in plan._tree)

    def _run(
        self,
        call: Call,
        module: nn.Module,
        args: tuple[Any, ...],
        input_format: InputFormat | None,
        flexible: bool,
        *,
        guarded: bool = False,
    ) -> Any:
        forwards = self.forwards[call]
        if torch.compiler.is_exporting():
            return forwards.variant("exported", False).forward(module, *args)
        if input_format is None:
            input_format = self._input_format(forwards, args)
        variant = forwards.variant(input_format, flexible, guarded=guarded)
        x, fast_path = args[0], forwards.fast_path
        on_cpu = isinstance(x, Tensor) and x.is_cpu
        unchecked = variant.unchecked_on_cpu if on_cpu else variant.unchecked_on_gpu
        if fast_path is None or unchecked is None or torch.compiler.is_compiling():
            return variant.forward(module, *args)
        return fast_path.run(unchecked, variant.forward, module, x)

    def region_for(
        self, x: Tensor, donated: bool, input_format: InputFormat | None, flexible: bool
    ) -> ConvRegion | None:
        """Returns all that a guarded call with such an argument does, where that is convolutions on
        a CPU without their checks; else None. The arguments are those of `run`.
        """
        call = Call(1, False, donated)
        forwards = self.forwards.get(call if call in self.forwards else Call(1))
        if forwards is None or not x.is_cpu:
            return None
        if input_format is None:
            input_format = self._input_format(forwards, (x,))
        return forwards.region_for(x, input_format, flexible)

    def _input_format(self, forwards: Forwards, args: tuple[Any, ...]) -> InputFormat:
        return "any" if self._has_channels_last else forwards.input_format_of(args)

    def _reset_fast_paths(self) -> None:
        for forwards in self.forwards.values():
            forwards.reset()

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any], donated: bool) -> Call | None:
        if kwargs or not args:
            return None
        # First: a tool that watches would see the arguments being looked at.
        if not are_traced(args) and (is_watched() or not are_plain(args)):
            return None
        call = Call(len(args), isinstance(args[0], list), donated)
        if donated and call not in self.forwards:
            call = call._replace(donated=False)
        if call not in self.forwards:
            return None
        if torch.compiler.is_exporting():  # dynamo cannot see whether folded weights are fresh
            return None if torch.compiler.is_dynamo_compiling() else call
        if torch.compiler.is_compiling():  # on a CPU inductor fuses and packs the layers itself
            return call if is_on_cuda(args) else None
        if not self.guards.hold():
            return None
        if torch.is_grad_enabled() and self._needs_gradients(args):
            return None
        return call

    def _forget_what_is_stale(self) -> None:
        origin, looks_closely = self._origin, self._suspect
        if origin is not None and not looks_closely and self.frozen:
            return
        tensors = tensors_of(self._sources)
        if origin is not None and origin.is_where_it_was(tensors):
            readable = not looks_closely or origin.is_readable
            same = origin.is_unchanged() if looks_closely else origin.seems_unchanged()
            if same and readable:
                self._suspect = False
                return
        self._look_at_every_layer(tensors)

    def _look_at_every_layer(self, tensors: list[Tensor]) -> None:
        """Forgets what is stale, layer by layer, and remembers what there is now."""
        suspect, self._suspect = self._suspect, False
        try:
            self._origin = Origin(tensors)  # first: writes from now on are seen at the next call
        except (RuntimeError, TypeError):  # something that is not memory: look again at every call
            self._origin = None
        for plan in self._tree:
            for layer in plan.layers:
                if suspect and not layer.is_readable():
                    layer.forget()
                else:
                    layer.forget_if_stale()
            plan._reset_fast_paths()
        self._look_at_formats()

    def suspect(self) -> None:
        """Makes the next call compare every byte: something may have written to the weights."""
        for plan in self._root._tree:
            plan._suspect = True

    def forget_parameters(self, parameter_ids: set[int]) -> None:
        """Forgets what was folded from parameters that an optimizer has just written to."""
        if self._root is not self:  # the outermost plan is notified, too
            return
        stepped = [
            layer
            for plan in self._tree
            for layer in plan.layers
            if any(id(tensor) in parameter_ids for tensor in tensors_of(layer.sources))
        ]
        for layer in stepped:
            layer.forget()
        if stepped:
            for plan in self._tree:
                plan._origin = None
                plan._reset_fast_paths()

    def _is_to_discard(self) -> bool:
        """Whether a layer, of the module or of one within it, is still to lose its weight."""
        folds = [layer.fold for plan in self._tree for layer in plan.layers]
        return any(fold.discard and not fold.discarded for fold in folds)

    def has_discarded(self) -> bool:
        """Whether a layer, of the module or of one within it, has lost its own weight."""
        return any(layer.fold.discarded for plan in self._tree for layer in plan.layers)

    def discard_weights(self) -> None:
        """Has every layer free its weight at its next run, when it is folded and packed."""
        for layer in self.layers:
            layer.fold.discard = True
        self._discards = self._root._discards = True
        self._reset_fast_paths()

    def fold_ahead(self) -> None:
        """Folds what is not folded yet, since a graph that is compiled or exported cannot fold.

        The plan of the outermost module does it for all modules within.
        """
        if self._root is self:
            self._forget_what_is_stale()
        for plan in self._tree if self._root is self else [self]:
            for layer in plan.layers:
                weight = layer.conv._parameters.get("weight")
                if isinstance(weight, nn.Parameter):
                    layer.folded(weight.dtype)

    def forget_folded(self) -> None:
        """Frees the folded weights: training is about to make them stale."""
        for layer in self._every:
            layer.forget()
        self._reset_fast_paths()
        self._origin = None

    def _needs_gradients(self, args: tuple[Any, ...]) -> bool:
        if any(isinstance(a, Tensor) and a.requires_grad for a in args):
            return True
        needs = self._has_trainable()
        if needs:
            warnings.warn(
                "gradients are enabled, so fused layers compute as the original ones did; "
                "run inference under torch.inference_mode()",
                stacklevel=_level_of_user(),
            )
        return needs

    def _has_trainable(self) -> bool:
        parameters = (holder[name] for holder, name in self._parameters)
        return any(p is not None and p.requires_grad for p in parameters)


def _are_tensors(args: tuple[Any, ...]) -> bool:
    """Whether all arguments are tensors, but the first may be a list of them."""
    if not args:
        return False
    first = args[0] if type(args[0]) is list else args[:1]
    return all(type(each) is Tensor for each in (*first, *args[1:]))


class _CurrentCall(threading.local):
    """What this thread is running: the plan of the outermost fused module."""

    root: Plan | None = None  # it has checked the weights of all modules within
    guarded: Plan | None = None  # the same plan, if the guards of all modules within hold, too


_current = _CurrentCall()


def plan_of(module: nn.Module) -> Plan | None:
    return vars(module).get(PLAN)


def watch(module: nn.Module, name: str) -> Watched:
    """Returns where a layer of a module is found, and which layer it is now."""
    parent, _, last = name.rpartition(".")
    holder = module.get_submodule(parent)
    layer = holder._modules[last]
    assert layer is not None
    return holder, last, layer


def _level_of_user() -> int:
    """Returns the stack level, for a warning of the caller's, of the code that calls the model."""
    level = 1
    frame = sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").startswith(("torch.", "resfuse.")):
        level, frame = level + 1, frame.f_back
    return level
