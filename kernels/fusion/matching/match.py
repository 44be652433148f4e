"""Finds the chains of layers in a module's graph that one kernel can compute.

They are conv (+ batch norm) (+ residual) (+ activation), and batch norm (+ residual) (+ activation)
where there is no convolution to fold it into. A chain is taken only where nothing else reads the
values between its ends, and nothing in between writes to a tensor in place: the fused layer runs
where the chain's last layer ran.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.fx as fx
import torch.nn.functional as F
from torch import nn

from resfuse.kernels.fusion.matching.input_effects import Effects, Writes, writes_in_place
from resfuse.kernels.fusion.matching.layer_kinds import (
    GELU_FORMS,
    activation_in_norm,
    activation_of,
    channels_of,
    is_norm,
    skips_in_eval,
    why_not_conv,
    why_not_norm,
)

Residual = Literal["none", "before", "after"]  # of the activation

_ACTIVATION_CALLS: dict[Any, str] = {
    F.relu: "relu",
    F.relu_: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    "relu": "relu",
    "relu_": "relu",
    F.relu6: "relu6",
    F.silu: "silu",
    F.hardswish: "hardswish",
}
_ACTS_IN_PLACE = (F.relu_, torch.relu_, "relu_")
_ADDS = (operator.add, operator.iadd, torch.add, "add", "add_")
_ADDS_IN_PLACE = (operator.iadd, "add_")


@dataclass
class Chain:
    """Layers that become one. `nodes` is in order; the first reads `source`, the last one's place
    is where the fused layer goes."""

    name: str  # of its convolution, or batch norm, in the module
    source: fx.Node
    conv: nn.Conv2d | None = None
    norm: nn.Module | None = None
    activation: str = "identity"
    act: nn.Module | None = None  # where the activation has a slope
    residual: Residual = "none"
    added: fx.Node | None = None
    acts_in_place: bool = False  # the activation, on what the layer before it made
    norm_activates: bool = False  # the norm's own forward applies the activation
    adds_to: bool = False  # the residual stands first in the sum
    keeps_dtype: bool = False  # added in place: a wider residual does not widen the sum
    nodes: list[fx.Node] = field(default_factory=list)
    modules: list[str] = field(default_factory=list)  # every module it stands for

    @property
    def end(self) -> fx.Node:
        return self.nodes[-1]

    def summary(self) -> str:
        """Returns text such as `conv + bn + add + relu`."""
        words = ["conv"] if self.conv is not None else []
        words += ["bn"] if self.norm is not None else []
        act = [] if self.activation == "identity" else [self.activation]
        add = [] if self.residual == "none" else ["add"]
        return " + ".join(words + (act + add if self.residual == "after" else add + act))


def remove_no_ops(
    graph: fx.Graph, module: nn.Module, is_no_op: Callable[[nn.Module], bool] = skips_in_eval
) -> list[str]:
    """Takes out what does nothing, by default in eval mode; returns the modules' names."""
    no_ops = [
        node
        for node in graph.nodes
        if node.op == "call_module"
        and len(node.args) == 1
        and is_no_op(module.get_submodule(str(node.target)))
    ]
    for node in no_ops:
        node.replace_all_uses_with(node.args[0])
        graph.erase_node(node)
    return [str(node.target) for node in no_ops]


WhySkipped = Callable[[nn.Module], str | None]


def find_chains(
    graph: fx.Graph,
    module: nn.Module,
    why_skipped: WhySkipped,
    why_skip_norm: WhySkipped = why_not_norm,
    writes: Writes | None = None,
) -> tuple[list[Chain], dict[str, str]]:
    """Returns all chains of a graph, and the reasons why other convolutions are not fused.

    Args:
        graph: of the module; not changed.
        module: the module.
        why_skipped: a reason from outside the module (a shared module, a tied weight), or None.
        why_skip_norm: the reason to leave a batch norm for what it is.
        writes: whether a module may write to what it is given; by default what input_effects.py
            finds.

    Returns:
        The chains in order, and name of a convolution -> reason.
    """
    writes = Effects().writes if writes is None else writes
    matcher = _Matcher(graph, module, why_skipped, why_skip_norm, writes)
    for node in graph.nodes:
        matcher.conv_chain(node)
    for node in graph.nodes:
        matcher.norm_chain(node)
    return matcher.chains, matcher.refused


class _Matcher:
    def __init__(
        self,
        graph: fx.Graph,
        module: nn.Module,
        why_skipped: WhySkipped,
        why_skip_norm: WhySkipped,
        writes: Writes,
    ) -> None:
        self.nodes = list(graph.nodes)
        self.order = {node: i for i, node in enumerate(self.nodes)}
        self._writes = writes
        self._writing: dict[fx.Node, bool] = {}
        self.module = module
        self.why_skipped = why_skipped
        self.why_skip_norm = why_skip_norm
        self.taken: set[fx.Node] = set()
        self.chains: list[Chain] = []
        self.refused: dict[str, str] = {}

    def conv_chain(self, node: fx.Node) -> None:
        conv = self._called(node)
        if not isinstance(conv, nn.Conv2d):
            return
        name = str(node.target)
        reason = self.why_skipped(conv) or why_not_conv(conv)
        if reason is None and not _one_node(node.args, node.kwargs):
            reason = "it is not called with one tensor"
        if reason is not None:
            self.refused[name] = reason
            return
        (source,) = node.args
        assert isinstance(source, fx.Node)
        chain = Chain(name, source, conv=conv)
        self._take(chain, node)
        norm_node = self._next(chain)
        norm = self._called(norm_node)
        if norm_node is not None and norm is not None and is_norm(norm):
            reason = self.why_skipped(norm) or self.why_skip_norm(norm)
            if reason is None and channels_of(norm) == conv.out_channels:
                chain.norm = norm
                self._take(chain, norm_node)
                if self._activation_inside(chain, norm):
                    self._tail(chain)
        else:
            self._tail(chain)
        self.chains.append(chain)

    def norm_chain(self, node: fx.Node) -> None:
        norm = self._called(node)
        if norm is None or node in self.taken or not is_norm(norm):
            return
        if not _one_node(node.args, node.kwargs):
            return
        if self.why_skip_norm(norm) or self.why_skipped(norm):
            return
        (source,) = node.args
        assert isinstance(source, fx.Node)
        chain = Chain(str(node.target), source, norm=norm)
        self._take(chain, node)
        if self._activation_inside(chain, norm):
            self._tail(chain)
        if chain.nodes:
            self.chains.append(chain)

    def _activation_inside(self, chain: Chain, norm: nn.Module) -> bool:
        """Takes over what the norm applies itself; False where the chain must end there."""
        act = activation_in_norm(norm)
        if act is None:
            self._watch_inside(chain, norm)
            return True
        name = activation_of(act)
        if name is None:  # an activation we cannot compute: then the norm is not a plain norm
            self.taken.discard(chain.nodes.pop())
            chain.modules.pop()
            chain.norm = None
            return False
        chain.activation, chain.act, chain.norm_activates = name, act, True
        self._watch_inside(chain, norm)
        return False

    def _watch_inside(self, chain: Chain, norm: nn.Module) -> None:
        """Adds the layers inside timm's norms to those that are guarded, since they may be replaced
        or given hooks like any other."""
        within = [name for name in ("drop", "act") if name in norm._modules]
        chain.modules += [f"{chain.modules[-1]}.{name}" for name in within]

    def _tail(self, chain: Chain) -> None:
        """Takes residual and activation into a chain, in either order."""
        self._add(chain, "before")
        if self._activation(chain) and chain.residual == "none":
            self._add(chain, "after")

    def _add(self, chain: Chain, where: Residual) -> None:
        node = self._next(chain)
        if node is None or node.target not in _ADDS or len(node.args) != 2 or node.kwargs:
            return
        left, right = node.args
        if not (isinstance(left, fx.Node) and isinstance(right, fx.Node)) or left is right:
            return
        added = right if left is chain.end else left
        written_to = node.target in _ADDS_IN_PLACE and added is left  # the residual itself
        if written_to and (added.op == "placeholder" or len(added.users) > 1):
            return
        chain.added, chain.residual, chain.adds_to = added, where, added is left
        chain.keeps_dtype = node.target in _ADDS_IN_PLACE and left is chain.end
        self._take(chain, node)

    def _activation(self, chain: Chain) -> bool:
        node = self._next(chain)
        if node is None:
            return False
        called = self._called(node)
        name = _ACTIVATION_CALLS.get(node.target) if called is None else activation_of(called)
        if called is None and node.target is F.gelu:
            name = _gelu_form(node)
        elif called is None and not _only_inplace(node):
            name = None
        if called is not None and next(called.parameters(), None) is not None:
            name = None if self.why_skipped(called) else name
        if name is None or name == "identity":
            return False
        chain.activation, chain.act = name, called
        chain.acts_in_place = _acts_in_place(node, called)
        self._take(chain, node)
        return True

    def _take(self, chain: Chain, node: fx.Node) -> None:
        chain.nodes.append(node)
        self.taken.add(node)
        if node.op == "call_module":
            chain.modules.append(str(node.target))

    def _next(self, chain: Chain) -> fx.Node | None:
        """Returns the only reader of the chain's end, unless something is written on the way to
        it."""
        if len(chain.end.users) != 1:
            return None
        (node,) = chain.end.users
        if node in self.taken:
            return None
        first, last = self.order[chain.nodes[0]], self.order[node]
        between = self.nodes[first + 1 : last]
        if any(self._writes_in_place(w) for w in between if w not in chain.nodes):
            return None
        return node

    def _writes_in_place(self, node: fx.Node) -> bool:
        if node not in self._writing:
            self._writing[node] = writes_in_place(node, self.module, self._writes)
        return self._writing[node]

    def _called(self, node: fx.Node | None) -> nn.Module | None:
        if node is None or node.op != "call_module":
            return None
        return self.module.get_submodule(str(node.target))


def _one_node(args: Any, kwargs: Any) -> bool:
    return len(args) == 1 and isinstance(args[0], fx.Node) and not kwargs


def _gelu_form(node: fx.Node) -> str | None:
    """Returns the name in ACTIVATIONS of a call of F.gelu(x, approximate="none"); None if there is
    none."""
    if len(node.args) != 1 or not set(node.kwargs) <= {"approximate"}:
        return None
    return GELU_FORMS.get(str(node.kwargs.get("approximate", "none")))


def _acts_in_place(node: fx.Node, called: nn.Module | None) -> bool:
    if called is not None:
        return bool(getattr(called, "inplace", False))
    return node.target in _ACTS_IN_PLACE or bool(node.kwargs.get("inplace", False))


def _only_inplace(node: fx.Node) -> bool:
    return len(node.args) == 1 and set(node.kwargs) <= {"inplace"}
