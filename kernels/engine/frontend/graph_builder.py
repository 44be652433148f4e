"""Collects the state, values and nodes that are read from an exported program."""

from dataclasses import dataclass, field
from typing import Any

import torch.fx as fx
from torch import Tensor

from resfuse.kernels.engine.ir.graph import Node, Operation, Value
from resfuse.kernels.ops.conv_problem import MATH_MODES

_COMPUTED = tuple(dtype for dtype, _ in MATH_MODES.values())


@dataclass
class Captured:
    """The part of an exported program that has been read so far.

    export.py goes through the program node by node, and the functions of operations.py add them.
    """

    state: dict[str, Tensor]
    states: dict[fx.Node, str] = field(default_factory=dict)  # placeholders: names in the state
    names: dict[fx.Node, str] = field(default_factory=dict)  # values, under the name they go by
    values: dict[str, Value] = field(default_factory=dict)
    nodes: list[Node] = field(default_factory=list)

    def add_value(self, node: fx.Node, name: str) -> None:
        """Adds the result of `node` as the value `name`."""
        meta = node.meta["val"]
        if isinstance(meta, list | tuple):  # a batch norm's result, and unread statistics
            meta = meta[0]
        if not all(isinstance(n, int) for n in meta.shape):
            raise ValueError(
                f"argument model: the shape of {node.target}'s result depends on data; accepted: "
                "models whose shapes do not"
            )
        self.names[node] = name
        self.values[name] = Value(tuple(meta.shape), meta.dtype)

    def add(self, node: fx.Node, op: Operation, *inputs: fx.Node) -> None:
        """Adds an operation whose result is the value `node`."""
        self.add_value(node, node.name)
        self.nodes.append(Node(node.name, op, tuple(self.names[x] for x in inputs)))

    def same(self, node: fx.Node, x: fx.Node) -> None:
        """Makes `node` another name of the value `x`."""
        self.names[node] = self.names[x]

    def state_of(self, arg: Any) -> str | None:
        """Returns the name of a placeholder in the state, None for any other argument."""
        return self.states.get(arg) if isinstance(arg, fx.Node) else None

    def is_map(self, arg: Any) -> bool:
        """Returns whether an argument is a value [N, C, H, W] or [N, C] of a dtype that tactics
        compute in."""
        if not isinstance(arg, fx.Node) or arg not in self.names:
            return False
        value = self.values.get(self.names[arg])
        return value is not None and len(value.shape) in (2, 4) and value.dtype in _COMPUTED
