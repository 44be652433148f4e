"""Captures a model as a Graph, by torch.export."""

import hashlib
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.fx as fx
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.export.graph_signature import InputKind, InputSpec, OutputKind

from resfuse.kernels.engine.graph import (
    Affine,
    AveragePool,
    Concat,
    Conv,
    Graph,
    MaxPool,
    Mean,
    Node,
    Norm,
    Pick,
    Torch,
    Value,
)
from resfuse.kernels.engine.merge import merge
from resfuse.kernels.engine.spelled_norm import spelled_norm
from resfuse.kernels.problem import MATH_MODES, ConvProblem, math_mode_of

aten = torch.ops.aten

# operation -> our name, and where among its arguments the slope is
_ACTIVATIONS: dict[Any, str] = {
    aten.relu.default: "relu",
    aten.silu.default: "silu",
    aten.hardswish.default: "hardswish",
    aten.leaky_relu.default: "leaky_relu",
    aten.hardtanh.default: "relu6",
    aten.prelu.default: "prelu",
    aten._prelu_kernel.default: "prelu",
}
_SAME_VALUES = (aten.dropout.default, aten.clone.default, aten.contiguous.default)
_COMPUTED = tuple(dtype for dtype, _ in MATH_MODES.values())


def capture(model: nn.Module, example: Tensor) -> tuple[Graph, dict[str, Tensor]]:
    """The graph of `model` in eval mode for inputs like `example`, and the state it needs.

    Raises:
        ValueError: the model cannot be exported, most often because its control flow depends on
            data; or it writes to its buffers in eval mode.
    """
    try:
        with torch.no_grad():
            program = torch.export.export(model, (example,), strict=False)
            program = program.run_decompositions({})  # batch norms and in-place operations as ATen
    except Exception as error:  # export raises whatever it meets
        said = str(error).strip().splitlines()
        raise ValueError(
            f"argument model: {type(model).__name__} cannot be exported: "
            f"{said[0] if said else type(error).__name__}"
        ) from error
    for spec in program.graph_signature.output_specs:
        if spec.kind != OutputKind.USER_OUTPUT:
            raise ValueError(
                f"argument model: {type(model).__name__} writes to {spec.target} in eval mode; "
                "accepted: models that only compute"
            )
    reader = _Reader(program)
    graph = merge(reader.graph())
    return graph, reader.state


class _Reader:
    """Reads an exported program, a node of ATen each."""

    def __init__(self, program: torch.export.ExportedProgram) -> None:
        self.state: dict[str, Tensor] = {name: t.detach() for name, t in program.state_dict.items()}
        self._constants: list[str] = []
        self._program = program
        self._names: dict[fx.Node, str] = {}  # values, under the name that stands for them
        self._states: dict[fx.Node, str] = {}
        self._values: dict[str, Value] = {}
        self._nodes: list[Node] = []

    def graph(self) -> Graph:
        signature = self._program.graph_signature
        inputs = {spec.arg.name: spec for spec in signature.input_specs}
        for node in self._program.graph.nodes:
            if node.op == "placeholder":
                spec = inputs[node.name]
                if spec.kind == InputKind.USER_INPUT:
                    self._add_value(node, node.name)
                else:
                    self._states[node] = self._name_of(spec)
            elif node.op == "call_function":
                self._call(node)
        (output,) = (node for node in self._program.graph.nodes if node.op == "output")
        returned = [self._returned(item) for item in output.args[0]]
        (input_name,) = signature.user_inputs
        out_spec = self._program.call_spec.out_spec
        try:
            spec = pytree.treespec_dumps(out_spec)
        except NotImplementedError as error:  # a named tuple of the model's own, say
            raise ValueError(
                f"argument model: it returns a {out_spec.type.__name__}; accepted: tensors, and "
                "lists, tuples and dicts of them"
            ) from error
        return Graph(
            str(input_name), tuple(returned), tuple(self._nodes), self._values, spec,
            tuple(self._constants),
        )  # fmt: skip

    def _name_of(self, spec: InputSpec) -> str:
        """In the state. A tensor that the forward makes of numbers may have others for other batch
        sizes, though torch calls it the same: its content becomes part of its name.
        """
        name = str(spec.target)
        if name in self._program.state_dict:
            return name
        constant = self._program.constants[name].detach()
        if spec.kind == InputKind.CONSTANT_TENSOR:
            content = constant.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            name = f"{name}:{hashlib.sha256(content).hexdigest()[:12]}"
        self._constants.append(name)
        self.state[name] = constant
        return name

    def _returned(self, item: Any) -> str:
        if not isinstance(item, fx.Node) or item not in self._names:
            raise ValueError(
                f"argument model: it returns {item!r}, which does not depend on its input; "
                "accepted: outputs computed from the input"
            )
        return self._names[item]

    def _add_value(self, node: fx.Node, name: str) -> None:
        meta = node.meta["val"]
        if not all(isinstance(n, int) for n in meta.shape):
            raise ValueError(
                f"argument model: the shape of {node.target}'s result depends on data; accepted: "
                "models whose shapes do not"
            )
        self._names[node] = name
        self._values[name] = Value(tuple(meta.shape), meta.dtype)

    def _add(self, node: fx.Node, op: Any, *inputs: fx.Node) -> None:
        self._add_value(node, node.name)
        self._nodes.append(Node(node.name, op, tuple(self._names[x] for x in inputs)))

    def _call(self, node: fx.Node) -> None:
        target, args = node.target, _arguments(node)
        if target is operator.getitem and args[1] == 0 and self._names[args[0]] in self._values:
            self._names[node] = self._names[args[0]]  # of a batch norm read below
        elif target is aten._assert_tensor_metadata.default:
            pass  # held for the example; the engine takes inputs like it only
        elif target in _SAME_VALUES and args[0] in self._names:
            self._names[node] = self._names[args[0]]
        elif not (read := _READERS.get(target)) or not read(self, node):
            self._torch(node)

    def _torch(self, node: fx.Node) -> None:
        inputs: list[fx.Node] = []

        def encode(arg: Any) -> Any:
            if isinstance(arg, fx.Node):
                if arg in self._states:
                    return {"state": self._states[arg]}
                inputs.append(arg)
                return {"value": len(inputs) - 1}
            if isinstance(arg, list | tuple):
                return [encode(a) for a in arg]
            if isinstance(arg, torch.dtype | torch.device | torch.memory_format | torch.layout):
                return {type(arg).__name__: str(arg).removeprefix("torch.")}
            if arg is None or isinstance(arg, bool | int | float | str):
                return arg
            raise ValueError(f"argument model: {node.target} takes {arg!r}, which cannot be kept")

        target = node.target
        if target is operator.getitem:
            source, which = _arguments(node)
            made = next(n for n in self._nodes if n.name == self._names[source])
            self._add_value(node, node.name)
            several = made.op
            assert isinstance(several, Torch)
            one = Torch(several.target, several.args, several.kwargs, int(which))
            self._nodes.append(Node(node.name, one, made.inputs))
            return
        args = tuple(encode(a) for a in node.args)
        kwargs = tuple((key, encode(value)) for key, value in node.kwargs.items())
        if not isinstance(target, torch._ops.OpOverload):
            raise ValueError(
                f"argument model: {target} is no ATen operation; accepted: models without "
                "data-dependent control flow"
            )
        meta = node.meta.get("val")
        if isinstance(meta, Tensor):
            self._add_value(node, node.name)
        elif isinstance(meta, list | tuple):
            self._names[node] = node.name  # each result is a node of its own
        else:
            raise ValueError(
                f"argument model: {target} returns no tensor; accepted: models without "
                "data-dependent control flow"
            )
        op = Torch(str(target), args, kwargs)
        self._nodes.append(Node(node.name, op, tuple(self._names[x] for x in inputs)))

    def _state(self, arg: Any) -> str | None:
        return self._states.get(arg) if isinstance(arg, fx.Node) else None

    def _is_map(self, arg: Any) -> bool:
        """[N, C, H, W], or [N, C] for maps of one pixel, of a dtype that is computed in."""
        if not isinstance(arg, fx.Node) or arg not in self._names:
            return False
        value = self._values.get(self._names[arg])
        return value is not None and len(value.shape) in (2, 4) and value.dtype in _COMPUTED

    def _conv(self, node: fx.Node) -> bool:
        x, w, b, stride, padding, dilation, groups = _with_defaults(
            node, (None, [1, 1], [0, 0], [1, 1], 1)
        )
        weight, bias = self._state(w), self._state(b)
        if weight is None or (b is not None and bias is None) or not self._is_map(x):
            return False
        n, c, h, width = x.meta["val"].shape
        k, _, r, s = w.meta["val"].shape
        problem = ConvProblem(
            n, c, h, width, k, r, s, _pair(stride), _pair(padding), _pair(dilation), groups,
            math_mode_of(x.meta["val"].dtype, x.meta["val"].device), "identity",
        )  # fmt: skip
        self._add(node, Conv(problem, weight, bias), x)
        return True

    def _linear(self, node: fx.Node) -> bool:
        x, w, b = _with_defaults(node, (None,))
        weight, bias = self._state(w), self._state(b)
        if weight is None or (b is not None and bias is None):
            return False
        map_of = _flattened(x)
        if not self._is_map(map_of):
            return False
        n, c, h, width = (*map_of.meta["val"].shape, 1, 1)[:4]
        k = w.meta["val"].shape[0]
        mode = math_mode_of(map_of.meta["val"].dtype, map_of.meta["val"].device)
        problem = ConvProblem(n, c, h, width, k, h, width, math_mode=mode, activation="identity")
        self._add(node, Conv(problem, weight, bias), map_of)
        return True

    def _norm(self, node: fx.Node) -> bool:
        x, weight, bias, mean, var, _, eps = _arguments(node)
        names = [self._state(arg) for arg in (mean, var)]
        if None in names or not self._is_map(x):
            return False
        norm = Norm(str(names[0]), str(names[1]), self._state(weight), self._state(bias), eps)
        meta = node.meta["val"][0]
        self._names[node] = node.name
        self._values[node.name] = Value(tuple(meta.shape), meta.dtype)
        self._nodes.append(Node(node.name, Affine(norm), (self._names[x],)))
        return True

    def _activation(self, node: fx.Node) -> bool:
        x, *rest = _arguments(node)
        if not self._is_map(x):
            return False
        name = _ACTIVATIONS[node.target]
        slope: str | float | None = None
        if name == "relu6" and [float(limit) for limit in rest] != [0, 6]:
            return False
        if name == "leaky_relu":
            slope = float(rest[0]) if rest else 0.01
        if name == "prelu":
            slope = self._state(_reshaped(rest[0]))
            if slope is None or self.state[slope].numel() != x.meta["val"].shape[1]:
                return False
        self._add(node, Affine(None, name, slope), x)
        return True

    def _sum(self, node: fx.Node) -> bool:
        if (spelled := spelled_norm(node, self._state)) is not None and self._is_map(spelled[0]):
            x, norm = spelled
            self._add(node, Affine(norm), x)
            return True
        a, b = _arguments(node)
        if not (self._is_map(a) and self._is_map(b)) or node.kwargs:
            return False
        if a.meta["val"].shape != b.meta["val"].shape or a.meta["val"].dtype != b.meta["val"].dtype:
            return False
        self._add(node, Affine(residual=True), a, b)
        return True

    def _max_pool(self, node: fx.Node) -> bool:
        x, kernel, stride, padding, dilation, ceil = _with_defaults(
            node, (None, [0, 0], [1, 1], False)
        )
        if not self._is_map(x):
            return False
        op = MaxPool(
            _pair(kernel), _pair(stride or kernel), _pair(padding), _pair(dilation), bool(ceil)
        )
        self._add(node, op, x)
        return True

    def _average_pool(self, node: fx.Node) -> bool:
        x, kernel, stride, padding, ceil, count_padding, divisor = _with_defaults(
            node, ([], [0, 0], False, True, None)
        )
        if not self._is_map(x) or len(x.meta["val"].shape) != 4:
            return False
        window = _pair(kernel), _pair(stride or kernel), _pair(padding)
        self._add(node, AveragePool(*window, bool(ceil), bool(count_padding), divisor), x)
        return True

    def _nearest(self, node: fx.Node) -> bool:
        """Which pixels are picked is found out by having torch pick numbers."""
        x, *how = _arguments(node)
        if not self._is_map(x) or len(x.meta["val"].shape) != 4 or node.kwargs:
            return False
        h, w = x.meta["val"].shape[2:]
        rows = torch.arange(h).float()[:, None].expand(1, 1, h, w)
        columns = torch.arange(w).float().expand(1, 1, h, w)
        picked = node.target(rows, *how)[0, 0, :, 0], node.target(columns, *how)[0, 0, 0]  # type: ignore[operator]
        self._add(node, Pick(*(tuple(map(int, each.tolist())) for each in picked)), x)
        return True

    def _product(self, node: fx.Node) -> bool:
        """Maps times one number a channel, as of squeeze-and-excitation."""
        for x, gate in (_arguments(node), _arguments(node)[::-1]):
            gate = _unexpanded(gate)
            if not (self._is_map(x) and self._is_map(gate)) or node.kwargs:
                continue
            of_x, of_gate = x.meta["val"], gate.meta["val"]
            fits = of_x.dim() == 4 and of_gate.shape == (*of_x.shape[:2], 1, 1)
            if fits and of_x.dtype == of_gate.dtype and x is not gate:
                self._add(node, Affine(gate=True), x, gate)
                return True
        return False

    def _mean(self, node: fx.Node) -> bool:
        x, *rest = _arguments(node)
        if not self._is_map(x) or len(x.meta["val"].shape) != 4:
            return False
        if node.target is aten.mean.dim:
            if sorted(d % 4 for d in rest[0]) != [2, 3] or node.kwargs:
                return False
        elif tuple(x.meta["val"].shape[2:]) == _pair(rest[0]):
            self._names[node] = self._names[x]
            return True
        elif _pair(rest[0]) != (1, 1):
            return self._adaptive_pool(node, x, _pair(rest[0]))
        self._add(node, Mean(), x)
        return True

    def _adaptive_pool(self, node: fx.Node, x: fx.Node, to: tuple[int, int]) -> bool:
        """To as many windows, where they are all alike."""
        h, w = x.meta["val"].shape[2:]
        if h % to[0] or w % to[1]:
            return False
        window = h // to[0], w // to[1]
        self._add(node, AveragePool(window, window, (0, 0)), x)
        return True

    def _concat(self, node: fx.Node) -> bool:
        parts, dim = _with_defaults(node, (0,))
        if dim not in (1, -3) or not all(self._is_map(part) for part in parts):
            return False
        self._add(node, Concat(), *parts)
        return True


_READERS: dict[Any, Callable[[_Reader, fx.Node], bool]] = {
    aten.conv2d.default: _Reader._conv,
    aten.linear.default: _Reader._linear,
    aten._native_batch_norm_legit_no_training.default: _Reader._norm,
    aten.add.Tensor: _Reader._sum,
    aten.max_pool2d.default: _Reader._max_pool,
    aten.avg_pool2d.default: _Reader._average_pool,
    aten.upsample_nearest2d.vec: _Reader._nearest,
    aten.upsample_nearest2d.default: _Reader._nearest,
    aten.mul.Tensor: _Reader._product,
    aten.adaptive_avg_pool2d.default: _Reader._mean,
    aten.mean.dim: _Reader._mean,
    aten.cat.default: _Reader._concat,
    **dict.fromkeys(_ACTIVATIONS, _Reader._activation),
}


def _arguments(node: fx.Node) -> tuple[Any, ...]:
    """Those given by position; fx's own type for them has a dozen members."""
    return node.args


def _with_defaults(node: fx.Node, defaults: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments by position, `defaults` standing for the last ones where they are left out."""
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    given = list(node.args) + [node.kwargs[n] for n in names[len(node.args) :] if n in node.kwargs]
    return (*given, *defaults[len(defaults) - (len(names) - len(given)) :])


def _pair(given: Any) -> tuple[int, int]:
    first, *second = given if isinstance(given, list | tuple) else [given]
    return int(first), int(second[0] if second else first)


def _reshaped(arg: Any) -> Any:
    """What a view of it shows."""
    while isinstance(arg, fx.Node) and arg.target in (aten.view.default, aten.reshape.default):
        arg = arg.args[0]
    return arg


def _unexpanded(arg: Any) -> Any:
    """What is repeated in it."""
    while isinstance(arg, fx.Node) and arg.target in (aten.expand.default, *_SAME_VALUES):
        arg = arg.args[0]
    return arg


def _flattened(arg: Any) -> Any:
    """The map [N, C, H, W] that `arg` [N, C * H * W] is a flattened view of, or `arg` itself."""
    source = _reshaped(arg)
    while isinstance(source, fx.Node) and source.target in _SAME_VALUES:
        source = _reshaped(source.args[0])
    if not isinstance(source, fx.Node) or not isinstance(source.meta.get("val"), Tensor):
        return None
    shape = source.meta["val"].shape
    flat = (shape[0], shape[1:].numel())
    return source if len(shape) == 4 and tuple(arg.meta["val"].shape) == flat else arg
