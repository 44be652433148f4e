"""Collects the state, values and nodes that are read from an exported program."""

from dataclasses import dataclass, field
from typing import Any

import torch.fx as fx
from torch import Tensor

from resfuse.kernels.engine.ir.derived_state import derive, derived_name
from resfuse.kernels.engine.ir.graph import Node, Operation, Torch, Value
from resfuse.kernels.ops.conv_problem import MATH_MODES

_COMPUTED = tuple(dtype for dtype, _ in MATH_MODES.values())


@dataclass
class Captured:
    """The part of an exported program that has been read so far.

    export.py goes through the program node by node, and the functions of operations.py add them.
    """

    state: dict[str, Tensor]
    # placeholders, and what is derived from them alone: names in the state
    states: dict[fx.Node, str] = field(default_factory=dict)
    names: dict[fx.Node, str] = field(default_factory=dict)  # values, under the name they go by
    values: dict[str, Value] = field(default_factory=dict)
    nodes: list[Node] = field(default_factory=list)
    derived: list[Node] = field(default_factory=list)  # of the state: ir/derived_state.py
    # values [N, H, W, C], by the names of the maps [N, C, H, W] that have their numbers
    pixels: dict[fx.Node, str] = field(default_factory=dict)
    # values [N, R, C, H, W], by the names of the maps [N, R * C, H, W] that they are views of
    splits: dict[fx.Node, str] = field(default_factory=dict)

    @property
    def named(self) -> tuple[dict[fx.Node, str], ...]:
        """Returns the names of values, of each kind."""
        return self.names, self.pixels, self.splits

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

    def derive(self, op: Torch) -> str:
        """Adds what an operation makes of the state alone to the state, and returns its name.

        Raises:
            ValueError: it cannot be computed, as the inverse of a singular matrix.
        """
        name = derived_name(op)
        if name not in self.state:
            try:
                self.state[name] = derive(op, self.state)
            except RuntimeError as error:
                said = str(error).strip().splitlines()[0]
                raise ValueError(
                    f"argument model: what its forward makes of its weights cannot be computed: "
                    f"{said}"
                ) from error
            self.derived.append(Node(name, op, ()))
        return name

    def is_ours(self, x: fx.Node) -> bool:
        """Returns whether a value is the input, or made by an operation of resfuse's."""
        if x.op == "placeholder":
            return True
        name = self.names.get(x) or self.pixels.get(x)
        made = next((node for node in reversed(self.nodes) if node.name == name), None)
        return made is not None and not isinstance(made.op, Torch)

    def add_pixelwise(self, node: fx.Node, op: Operation, *inputs: fx.Node) -> None:
        """Adds an operation that computes a pixel from one pixel of each input: on maps, or on
        values [N, H, W, C] if all inputs are such."""
        if not all(map(self.is_pixels, inputs)):
            self.add(node, op, *inputs)
            return
        n, h, w, c = node.meta["val"].shape
        self.pixels[node] = node.name
        self.values[node.name] = Value((n, c, h, w), node.meta["val"].dtype)
        self.nodes.append(Node(node.name, op, tuple(self.pixels[x] for x in inputs)))

    def same(self, node: fx.Node, x: fx.Node) -> None:
        """Makes `node` another name of the value `x`."""
        for names in self.named:
            if x in names:
                names[node] = names[x]

    def name_of(self, x: fx.Node) -> str:
        """Returns the name of a value; of pixels that have none, a permute of their map, and of
        splits a reshape."""
        if x not in self.names and x in self.pixels:
            of_map = self.pixels[x]
            name = f"{of_map}:nhwc"
            if name not in self.values:
                n, c, h, w = self.values[of_map].shape
                self.values[name] = Value((n, h, w, c), self.values[of_map].dtype)
                permute = Torch("aten.permute.default", ({"value": 0}, [0, 2, 3, 1]))
                self.nodes.append(Node(name, permute, (of_map,)))
            self.names[x] = name
        if x not in self.names and x in self.splits:
            of_map, shape = self.splits[x], tuple(x.meta["val"].shape)
            name = f"{of_map}:{shape[1]}splits"
            if name not in self.values:
                self.values[name] = Value(shape, self.values[of_map].dtype)
                reshape = Torch("aten.reshape.default", ({"value": 0}, list(shape)))
                self.nodes.append(Node(name, reshape, (of_map,)))
            self.names[x] = name
        return self.names[x]

    def is_pixels(self, arg: Any) -> bool:
        """Returns whether an argument is a value [N, H, W, C] whose numbers a map has."""
        return isinstance(arg, fx.Node) and arg in self.pixels

    def state_of(self, arg: Any) -> str | None:
        """Returns the name of an argument in the state, None for one that is not, and where what is
        derived is not finite: only torch computes with that."""
        name = self.states.get(arg) if isinstance(arg, fx.Node) else None
        if name is not None and arg.op != "placeholder":
            tensor = self.state[name]
            return name if tensor.is_meta or tensor.isfinite().all() else None
        return name

    def is_map(self, arg: Any) -> bool:
        """Returns whether an argument is a value [N, C, H, W] or [N, C] of a dtype that tactics
        compute in."""
        if not isinstance(arg, fx.Node) or arg not in self.names:
            return False
        value = self.values.get(self.names[arg])
        return value is not None and len(value.shape) in (2, 4) and value.dtype in _COMPUTED
