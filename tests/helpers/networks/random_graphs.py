"""Random graphs for the engine, as hypothesis strategies."""

import torch
from hypothesis import strategies as st
from torch import Tensor

from graphs import norm_named, norm_state
from resfuse.kernels.engine.ir.graph import (
    Affine,
    AveragePool,
    Concat,
    Conv,
    Finished,
    Graph,
    GroupNorm,
    MaxPool,
    Mean,
    Node,
    Operation,
    Pick,
    Torch,
    Value,
)
from resfuse.kernels.ops.conv_problem import ConvProblem, Epilogue, Geometry, dtypes_of

State = dict[str, Tensor]
Shape = tuple[int, ...]

FEW = ["identity", "relu", "leaky_relu", "prelu"]
AROUND = [(0, 0, 0, 0), (0, 0, 0, 0), (1, 2, 0, 1)]
HALF: Torch = Torch("aten.slice.Tensor", ({"value": 0}, 1, 0, 16))  # a view
SAME: Torch = Torch("aten.alias.default", ({"value": 0},))  # a view, too
SIGMOID: Torch = Torch("aten.sigmoid.default", ({"value": 0},))


class Builder:
    """Adds nodes that read what there is; weights are random, and no batch norm is the identity.

    Maps are read again and again, in any order, so that lifetimes overlap in every way.
    """

    def __init__(self, draw: st.DrawFn, *, elementary: bool, torch_nodes: bool) -> None:
        self._draw, self._elementary = draw, elementary
        self._kinds = ["conv", "conv", "affine", "affine", "concat", "pool", "mean", "gate", "pick"]
        self._kinds += ["group_norm", *["torch"] * torch_nodes]
        self._generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
        size = draw(st.sampled_from([4, 5, 7]))
        self.shapes: dict[str, Shape] = {
            "x": (draw(st.integers(1, 2)), draw(st.sampled_from([3, 16, 32])), size, size)
        }
        self.nodes: list[Node] = []
        self.state: State = {}

    def add(self) -> None:
        getattr(self, f"_{self._draw(st.sampled_from(self._kinds))}")()

    def graph(self) -> Graph:
        """Several outputs, among them the last node's."""
        names = [node.name for node in self.nodes]
        outputs = dict.fromkeys(
            [*self._draw(st.lists(st.sampled_from(names), max_size=2)), names[-1]]
        )
        values = {name: Value(shape, torch.float32) for name, shape in self.shapes.items()}
        return Graph("x", tuple(outputs), tuple(self.nodes), values)

    def _latest(self, names: list[str]) -> str:
        """The latest ones more often, as in a network."""
        return self._draw(st.sampled_from([*names, *names[-2:], *names[-1:]]))

    def _maps(self) -> list[str]:
        return [name for name, shape in self.shapes.items() if len(shape) == 4]

    def _append(self, op: Operation, shape: Shape, *inputs: str) -> None:
        name = f"v{len(self.nodes)}"
        self.nodes.append(Node(name, op, inputs))
        self.shapes[name] = shape

    def _residual(self, shape: Shape) -> str | None:
        """A value of that shape, or none; what was computed last most often."""
        alike = [name for name, other in self.shapes.items() if other == shape]
        return self._latest(alike) if alike and self._draw(st.booleans()) else None

    def _activation(self, channels: int) -> tuple[str, str | float | None]:
        name = self._draw(st.sampled_from(FEW))
        slope = {"leaky_relu": 0.1, "prelu": f"slope{len(self.nodes)}"}.get(name)
        if isinstance(slope, str):
            self.state[slope] = torch.rand(channels, generator=self._generator)
        return name, slope

    def _norm(self, channels: int) -> str:
        name = f"norm{len(self.nodes)}"
        self.state |= norm_state(name, channels, self._generator)
        return name

    def _conv(self) -> None:
        x = self._latest(list(self.shapes))
        n, c, h, w = (*self.shapes[x], 1, 1)[:4]
        flat = len(self.shapes[x]) == 2
        r = 1 if flat else self._draw(st.sampled_from([1, 3]))
        k = self._draw(st.sampled_from([10, 16, 32]))
        stride = 1 if flat or h < 3 else self._draw(st.sampled_from([1, 1, 2]))
        geometry = Geometry((stride, stride), (r // 2, r // 2))
        problem = ConvProblem(n, c, h, w, k, r, r, geometry, Epilogue(), dtypes_of("ieee"))
        shape = (n, k) if flat else (n, k, problem.p, problem.q)
        weight = f"w{len(self.nodes)}"
        self.state[weight] = torch.randn(k, c, r, r, generator=self._generator) / (c * r * r) ** 0.5
        op = Conv(problem, weight)
        if self._elementary:
            self._append(op, shape, x)
            return
        norm = norm_named(self._norm(k)) if self._draw(st.booleans()) else None
        residual, last = self._residual(shape), self._draw(st.booleans())
        op = Conv(problem, weight, None, norm).with_activation(*self._activation(k))
        self._with_residual(op, shape, (x,), residual, last)

    def _affine(self) -> None:
        x = self._latest(list(self.shapes))
        shape = self.shapes[x]
        residual = self._residual(shape)
        kind = self._draw(st.sampled_from(["norm", "activation", "sum"]))
        norm = norm_named(self._norm(shape[1])) if kind == "norm" or not self._elementary else None
        if self._elementary and kind == "sum":
            self._append(Affine(residual=True), shape, x, residual or x)
        elif self._elementary and kind == "norm":
            self._append(Affine(norm), shape, x)
        elif self._elementary:
            self._append(Affine(None, *self._activation(shape[1])), shape, x)
        else:
            op = Affine(norm, *self._activation(shape[1]))
            self._with_residual(op, shape, (x,), residual, self._draw(st.booleans()))

    def _group_norm(self) -> None:
        """Its eps bounds by how much it enlarges what earlier nodes have rounded."""
        x = self._latest(list(self.shapes))
        shape = self.shapes[x]
        groups = self._draw(st.sampled_from([g for g in (1, 2, 5, shape[1]) if shape[1] % g == 0]))
        name = self._norm(shape[1])
        op = GroupNorm(groups, f"{name}.weight", f"{name}.bias", 0.1)
        if self._elementary:
            self._append(op, shape, x)
            return
        residual, last = self._residual(shape), self._draw(st.booleans())
        ended = op.with_activation(*self._activation(shape[1]))
        self._with_residual(ended, shape, (x,), residual, last)

    def _with_residual(
        self,
        op: Finished,
        shape: Shape,
        inputs: tuple[str, ...],
        residual: str | None,
        last: bool,
    ) -> None:
        if residual is None:
            self._append(op, shape, *inputs)
            return
        plain = type(op).with_activation(op, "identity", None).with_residual()
        added = op.with_residual() if last else plain.with_activation(op.activation, op.slope)
        self._append(added, shape, *inputs, residual)

    def _concat(self) -> None:
        first = self._latest(self._maps())
        n, _, *size = self.shapes[first]
        alike = [name for name in self._maps() if self.shapes[name][2:] == tuple(size)]
        parts = [first, *(self._latest(alike) for _ in range(self._draw(st.integers(0, 2))))]
        channels = sum(self.shapes[part][1] for part in parts)
        self._append(Concat(), (n, channels, *size), *parts)

    def _pool(self) -> None:
        x = self._latest(self._maps())
        n, c, h, w = self.shapes[x]
        stride = self._draw(st.sampled_from([1, 2]))
        op: MaxPool | AveragePool = MaxPool((3, 3), (stride, stride), (1, 1), (1, 1))
        if self._draw(st.booleans()):
            counted = self._draw(st.booleans())
            op = AveragePool((3, 3), (stride, stride), (1, 1), False, counted)
        self._append(op, (n, c, -(-h // stride), -(-w // stride)), x)

    def _pick(self) -> None:
        x = self._latest(self._maps())
        n, c, h, w = self.shapes[x]
        size = self._draw(st.integers(1, 9))
        rows, columns = (tuple(i * side // size for i in range(size)) for side in (h, w))
        zeros = self._draw(st.sampled_from([0, 16, 3]))
        around = left, right, top, bottom = self._draw(st.sampled_from(AROUND))
        padded = size + top + bottom, size + left + right
        self._append(Pick(rows, columns, zeros, None, around), (n, c + zeros, *padded), x)

    def _gate(self) -> None:
        """Of a map by one of its own means, or by another's."""
        x = self._latest(self._maps())
        n, c, _, _ = self.shapes[x]
        gates = [name for name, shape in self.shapes.items() if shape == (n, c, 1, 1)]
        if not gates or self._draw(st.booleans()):
            self._append(Mean(), (n, c, 1, 1), x)
            gates = [f"v{len(self.nodes) - 1}"]
        gate, op = self._latest(gates), Affine(gate=True)
        if self._elementary:
            self._append(op, self.shapes[x], x, gate)
            return
        residual, last = self._residual(self.shapes[x]), self._draw(st.booleans())
        ended = op.with_activation(*self._activation(c))
        self._with_residual(ended, self.shapes[x], (x, gate), residual, last)

    def _mean(self) -> None:
        x = self._latest(self._maps())
        n, c, _, _ = self.shapes[x]
        keep = self._draw(st.booleans())
        self._append(Mean(), (n, c, 1, 1) if keep else (n, c), x)

    def _torch(self) -> None:
        x = self._latest(self._maps())
        n, c, *size = self.shapes[x]
        op = self._draw(st.sampled_from([HALF, SAME, SIGMOID]))
        self._append(op, (n, min(c, 16), *size) if op is HALF else self.shapes[x], x)


@st.composite
def graphs(
    draw: st.DrawFn, *, elementary: bool = False, torch_nodes: bool = False
) -> tuple[Graph, State]:
    """A graph of 2 to 12 nodes and its state.

    Args:
        elementary: nodes as they are captured, one thing each, to be merged.
        torch_nodes: with operations that only torch computes, and views among them.
    """
    builder = Builder(draw, elementary=elementary, torch_nodes=torch_nodes)
    for _ in range(draw(st.integers(2, 12))):
        builder.add()
    return builder.graph(), builder.state
