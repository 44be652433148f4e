"""Precision: a pass that has a graph in float32 computed in bfloat16.

Convolutions and linear layers are computed in bfloat16, but for those to keep. Other operations
follow what they read: they are computed in bfloat16 where one of their inputs is. Of torch's own
operations only those do which move values or round each of them once; all others see float32.
Where dtypes meet, a `Convert` is inserted before the first reader.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from resfuse.kernels.engine.ir.graph import Conv, Convert, Graph, Node, Torch, Value
from resfuse.kernels.ops.conv_problem import dtypes_of

PRECISIONS = ("fp32", "bf16")
_COMPUTED = (torch.float32, torch.bfloat16)
# Operations of torch's, of one tensor, that move values, or compute each from one in float32 and
# round it once.
_MOVE = """
    alias channel_shuffle chunk clone contiguous expand flatten flip narrow permute pixel_shuffle
    pixel_unshuffle reshape roll select slice split split_with_sizes squeeze transpose unflatten
    unsqueeze view
"""
_ROUND_ONCE = """
    abs clamp clamp_max clamp_min elu gelu hardsigmoid hardswish hardtanh leaky_relu mish neg relu
    relu6 sigmoid silu softplus tanh
"""
_FOLLOW = frozenset((_MOVE + _ROUND_ONCE).split())


@dataclass(frozen=True)
class Precision:
    """What is computed inside an engine.

    Attributes:
        name: one of PRECISIONS, or None for that of the model.
        keep: patterns of names of modules and parameters, as fnmatch has them; convolutions and
            linear layers that they match are computed in float32.
    """

    name: str | None = None
    keep: tuple[str, ...] = ()

    def require_fit(self, model: nn.Module, example: Tensor) -> None:
        """Raises ValueError unless the model can be computed in this precision."""
        if self.name not in (None, *PRECISIONS):
            raise ValueError(f"argument precision: {self.name!r}; accepted: fp32, bf16")
        if self.keep and self.name != "bf16":
            raise ValueError("argument keep: given without precision='bf16'; accepted: with it")
        own = {"fp32": (torch.float32,), "bf16": _COMPUTED}.get(self.name or "", (example.dtype,))
        if example.dtype not in own:
            takes = " or ".join(map(str, own))
            raise ValueError(
                f"argument precision: {self.name!r} of a model that takes {example.dtype}; "
                f"accepted: with models that take {takes}"
            )
        if self.name != "bf16":
            return
        if example.device.type != "cpu":
            raise ValueError(
                "argument precision: 'bf16' is for engines on a CPU; on a GPU convert the model "
                "and its inputs: model.bfloat16()"
            )
        if self.keep and example.dtype == torch.bfloat16:
            raise ValueError(
                "argument keep: the model is in bfloat16 itself; accepted: with a float32 one"
            )
        named = [*model.named_parameters(), *model.named_buffers()]
        wide = next((name for name, t in named if t.dtype == torch.float64), None)
        if wide is not None:
            raise ValueError(
                f"argument model: {wide} is torch.float64; precision='bf16' accepts weights in "
                "float32 and bfloat16"
            )

    def of(self, graph: Graph) -> Graph:
        """Returns a graph that computes the same in this precision.

        Raises:
            ValueError: a pattern matches no convolution or linear layer.
        """
        if self.name != "bf16":
            return graph
        layers = [node.op.weight for node in graph.nodes if isinstance(node.op, Conv)]
        for pattern in self.keep:
            if not any(_matches(pattern, layer) for layer in layers):
                some = ", ".join(layer.removesuffix(".weight") for layer in layers[:4])
                more = ", ..." * (len(layers) > 4)
                raise ValueError(
                    f"argument keep: {pattern!r} matches no convolution or linear layer; accepted: "
                    f"names of modules or parameters such as {some}{more}"
                )
        kept = {layer for layer in layers if any(_matches(p, layer) for p in self.keep)}
        return _Rewriter(graph).rewritten(kept)


def _matches(pattern: str, weight: str) -> bool:
    """Returns whether a pattern matches a parameter, its module or one around it."""
    parts = weight.split(".")
    names = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
    return any(fnmatchcase(name, pattern) for name in names)


@dataclass
class _Rewriter:
    graph: Graph
    nodes: list[Node] = field(default_factory=list)
    values: dict[str, Value] = field(default_factory=dict)
    converted: dict[tuple[str, torch.dtype], str] = field(default_factory=dict)

    def rewritten(self, kept: Iterable[str]) -> Graph:
        graph, kept = self.graph, set(kept)
        self.values = {name: graph.values[name] for name in graph.reads}
        for node in graph.nodes:
            self._add(node, self._dtype(node, kept))
        outputs = tuple(self._as(name, graph.values[name].dtype) for name in graph.outputs)
        return replace(graph, nodes=tuple(self.nodes), values=self.values, outputs=outputs)

    def _dtype(self, node: Node, kept: set[str]) -> torch.dtype | None:
        """Returns the dtype that a node is computed in: bfloat16, or None as it was."""
        captured = {self.graph.values[name].dtype for name in (*node.inputs, node.name)}
        if captured != {torch.float32}:
            return None
        if isinstance(node.op, Conv):
            return None if node.op.weight in kept else torch.bfloat16
        if isinstance(node.op, Torch):
            namespace, name, *_ = node.op.target.split(".")
            if namespace != "aten" or name not in _FOLLOW or len(node.inputs) != 1:
                return None
        reads_bf16 = any(self.values[name].dtype == torch.bfloat16 for name in node.inputs)
        return torch.bfloat16 if reads_bf16 else None

    def _add(self, node: Node, dtype: torch.dtype | None) -> None:
        value, op = self.graph.values[node.name], node.op
        inputs = tuple(self._as(n, dtype or self.graph.values[n].dtype) for n in node.inputs)
        if dtype is not None:
            value = Value(value.shape, dtype)
            if isinstance(op, Conv):
                op = replace(op, problem=replace(op.problem, dtypes=dtypes_of("bf16")))
        self.nodes.append(Node(node.name, op, inputs))
        self.values[node.name] = value

    def _as(self, name: str, dtype: torch.dtype) -> str:
        """Returns the name of a value in a dtype, converted if need be."""
        value = self.values[name]
        if value.dtype == dtype:
            return name
        key = name, dtype
        if key not in self.converted:
            self.converted[key] = to = f"{name}:{_SHORT[dtype]}"
            self.nodes.append(Node(to, Convert(str(dtype).removeprefix("torch.")), (name,)))
            self.values[to] = Value(value.shape, dtype)
        return self.converted[key]


_SHORT: Mapping[torch.dtype, str] = {torch.float32: "fp32", torch.bfloat16: "bf16"}
