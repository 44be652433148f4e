"""From the nodes of a file to a torch.fx.GraphModule.

Each operator (operators/) emits layers and functions; they run on tensors without data at once, so
every shape is known while the next node is read. Where the batch is free, three sizes of it are
followed side by side, and what is emitted must not depend on which.
"""

import keyword
import math
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.fx as fx
from torch import Tensor, nn

from resfuse.kernels.onnx_reader.reading.constants import Folding
from resfuse.kernels.onnx_reader.reading.model_file import (
    DOMAINS,
    Input,
    ModelFile,
    array_of,
    first_line,
)
from resfuse.kernels.onnx_reader.reading.node import OnnxNode, Operators, scalar
from resfuse.kernels.onnx_reader.reading.patterns import merge_patterns
from resfuse.kernels.onnx_reader.reading.values import (
    Computed,
    Constant,
    NeedsBatch,
    Quantized,
    Value,
)

DYNAMIC = ("Loop", "Scan", "SequenceMap")
BATCHES = (1, 2, 5)  # one is special (squeezing, broadcasting); two are special to nothing
MOST_ELEMENTS = 2**31  # of one value
# What may read the bytes of an input in uint8: what makes floats of them, or moves them. Arithmetic
# in 8 bits, resizing above all, is rounded differently by each runtime.
READ_BYTES = (
    "Cast", "DequantizeLinear", "Identity", "Transpose", "Reshape", "Flatten", "Squeeze",
    "Unsqueeze", "Slice", "Gather", "Split", "Concat", "DepthToSpace", "SpaceToDepth",
)  # fmt: skip
Shape = tuple[int | None, ...]


def read_graph(
    file: ModelFile, operators: Operators, input_shape: Sequence[int | None] | None = None
) -> fx.GraphModule:
    """Reads a file by what each operator is in torch; raises ValueError: see load_onnx."""
    shape = _input_shape(file, input_shape)
    asked = shape[0]
    free = file.input.shape[0] is None
    if free:
        try:
            return Reader(file, operators, (None, *shape[1:])).read()
        except NeedsBatch as needs:
            if asked is None:
                example = ", ".join(map(str, (1, *shape[1:])))
                raise ValueError(
                    f"{needs} needs the size of the batch; accepted: input_shape=({example}), or "
                    "another first size"
                ) from None
    return Reader(file, operators, shape).read()


def _input_shape(file: ModelFile, asked: Sequence[int | None] | None) -> Shape:
    given: Input = file.input
    told = tuple(given.shape if asked is None else asked)
    says = f"{file.path}: the input {given.name!r} is [{_text(given.shape)}]"
    wrong = [size for size in told if size is not None and not _is_size(size)]
    if wrong or len(told) != len(given.shape):
        raise ValueError(f"{says}, and input_shape {asked}; accepted: {len(given.shape)} sizes")
    if any(own is not None and size not in (own, None)
           for own, size in zip(given.shape, told, strict=True)):  # fmt: skip
        raise ValueError(f"{says}, and input_shape {asked}, which does not fit")
    shape = tuple(own or size for own, size in zip(given.shape, told, strict=True))
    if None in shape[1:]:
        raise ValueError(f"{says}; say the sizes that it leaves open by input_shape")
    if asked is not None and told[0] is None and shape[0] is not None:
        raise ValueError(f"{says}; input_shape {asked} asks for a free batch")
    return shape


def _is_size(size: object) -> bool:
    return isinstance(size, int) and not isinstance(size, bool) and 0 < size < 2**31


def _text(shape: Shape) -> str:
    return ", ".join("?" if size is None else str(size) for size in shape)


class Reader:
    """Reads one file for one shape of its input; what operators emit through."""

    def __init__(self, file: ModelFile, operators: Operators, shape: Shape) -> None:
        self.file = file
        self._operators = operators
        self.graph = fx.Graph()
        self.root = nn.Module()
        self._shape = shape
        self._takes_bytes = file.input.dtype == np.uint8
        self._batches = BATCHES if shape[0] is None else (shape[0],)
        self.folding = Folding(file.opset, len(self._batches))
        self._values: dict[str, Value | Missing] = {
            name: Constant(name, (array,) * len(self._batches))
            for name, array in file.constants.items()
        }
        self._buffers: dict[tuple[int, Any], str] = {}

    def read(self) -> fx.GraphModule:
        self._values[self.file.input.name] = self._input()
        for proto in self.file.nodes:
            self._node(OnnxNode(proto, self.file.opset, self.file.path), proto.domain)
        outputs = [self._output(name) for name in self.file.outputs]
        self.graph.output(outputs[0] if len(outputs) == 1 else tuple(outputs))
        module = fx.GraphModule(self.root, self.graph, "OnnxModule")
        merge_patterns(module)
        module.delete_all_unused_submodules()
        module.graph.lint()
        module.recompile()
        # In `meta`, which copies of a graph module keep.
        module.meta.update(batch_size=self._shape[0], input_shape=self._shape)
        return module.eval()

    def _input(self) -> Computed:
        """The input, and a check of its shape, as all shapes behind it were read for this one, and
        of its dtype where that is uint8."""
        shape, dtype = self._shape, _meta(np.empty(0, self.file.input.dtype)).dtype
        self._require_bounded((self._batches[-1], *(size or 1 for size in shape[1:])), "the input")
        x = self.graph.placeholder("x")  # what the file calls it may be no name in Python
        asked = self.graph.call_function(getattr, (x, "shape"))
        if shape[0] is None:
            asked = self.graph.call_function(operator.getitem, (asked, slice(1, None)))
        known = tuple(shape[1:] if shape[0] is None else shape)
        same = self.graph.call_function(operator.eq, (asked, known))
        says = f"the network was read for inputs of [{_text(shape)}]; load_onnx reads it for others"
        self.graph.call_function(torch._assert, (same, says))
        if self._takes_bytes:  # floats would be read without a sign that they are no pixels
            given = self.graph.call_function(getattr, (x, "dtype"))
            same = self.graph.call_function(operator.eq, (given, dtype))
            says = "the network takes images in torch.uint8, as its file says"
            self.graph.call_function(torch._assert, (same, says))
        sizes = [tuple(n if size is None else size for size in shape) for n in self._batches]
        return Computed(x, tuple(torch.empty(s, dtype=dtype, device="meta") for s in sizes))

    def _output(self, name: str) -> fx.Node:
        if name not in self._values:
            raise ValueError(f"{self.file.path}: no node computes the output {name!r}")
        value = self._values[name]
        if isinstance(value, Missing):
            raise ValueError(f"{value.node.says}: its output {name!r} is not read")
        if isinstance(value, Quantized):
            raise ValueError(
                f"{self.file.path}: the output {name!r} is quantised; accepted: real numbers, "
                "behind a DequantizeLinear"
            )
        try:
            return self.operand(value)
        except NeedsBatch:
            raise NeedsBatch(f"{self.file.path}: the output {name!r}") from None

    def _node(self, node: OnnxNode, domain: str) -> None:
        if domain not in DOMAINS:
            raise ValueError(
                f"{self.file.path}: node {node.name!r} ({domain}.{node.op}) is of the domain "
                f"{domain!r}; accepted: operators of ONNX's own"
            )
        if node.op in DYNAMIC:
            raise ValueError(f"{node.says} is dynamic control flow, which is not read")
        inputs = [self._value(name, node) for name in node.inputs]
        try:
            found = self._read_node(node, inputs)
        except NeedsBatch:
            raise NeedsBatch(node.says) from None
        except ValueError as error:
            if str(error).startswith(str(self.file.path)):
                raise
            raise ValueError(f"{node.says}: {first_line(error)}") from error
        except Exception as error:  # torch and onnx raise whatever they meet
            raise ValueError(f"{node.says}: {first_line(error)}") from error
        for name, value in zip(node.outputs, found, strict=False):
            if name:
                if name in self._values:
                    raise ValueError(f"{node.says}: {name!r} is computed twice")
                self._values[name] = value
        for name in node.outputs[len(found) :]:
            if name:
                self._values[name] = Missing(name, node)

    def _value(self, name: str, node: OnnxNode) -> Value | None:
        if not name:
            return None
        if name not in self._values:
            raise ValueError(f"{node.says} reads {name!r}, which nothing before it computes")
        value = self._values[name]
        if isinstance(value, Missing):
            raise ValueError(f"{value.node.says}: its output {name!r} is not read")
        return value

    def _read_node(self, node: OnnxNode, inputs: list[Value | None]) -> Sequence[Value]:
        if node.op == "If":
            return self._branch(node, inputs[0])
        folded = self.folding.fold(node, inputs)
        if folded is not None:
            return folded
        read = self._operators.get(node.op)
        if read is None:
            raise ValueError(f"{node.says} is an operator that is not read")
        if node.op != "DequantizeLinear" and any(isinstance(x, Quantized) for x in inputs):
            raise node.refusal("a quantised activation without a DequantizeLinear before it")
        if self._takes_bytes and node.op not in READ_BYTES and any(map(_is_bytes, inputs)):
            raise node.refusal(
                f"an operator on numbers in uint8 other than {', '.join(READ_BYTES)}"
            )
        found = read(self, node, *inputs)
        node.require_all_read()
        return found if isinstance(found, tuple) else (found,)

    def _branch(self, node: OnnxNode, condition: Value | None) -> list[Value]:
        """What an If returns whose condition is known while the file is read: exporters ask about
        shapes."""
        if not isinstance(condition, Constant):
            raise ValueError(f"{node.says} is dynamic control flow, which is not read")
        graph = node.graph("then_branch" if scalar(condition.array) else "else_branch")
        for tensor in graph.initializer:
            array = array_of(tensor, self.file.path, f"weight {tensor.name!r}")
            self._values[tensor.name] = self.constant(tensor.name, array)
        for proto in graph.node:
            self._node(OnnxNode(proto, self.file.opset, self.file.path), proto.domain)
        found = [self._value(output.name, node) for output in graph.output]
        return [value for value in found if value is not None]

    # What operators emit.

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Computed:
        """A call of a function; values among `args`, also in lists, become nodes."""
        node = self.graph.call_function(target, self._nodes(list(args)), kwargs)
        made = [target(*self._at(list(args), i), **kwargs) for i in range(len(self._batches))]
        return self._computed(node, made)

    def method(self, name: str, x: Value, *args: Any) -> Computed:
        """A call of a tensor's method."""
        x = self.computed(x)
        node = self.graph.call_method(name, (x.node, *args))
        return self._computed(node, [getattr(meta, name)(*args) for meta in x.metas])

    def calls(self, count: int, target: Callable[..., Any], *args: Any) -> tuple[Computed, ...]:
        """A function that returns several tensors: each."""
        node = self.graph.call_function(target, self._nodes(list(args)))
        made = [target(*self._at(list(args), i)) for i in range(len(self._batches))]
        return tuple(
            self._computed(
                self.graph.call_function(operator.getitem, (node, which)),
                [each[which] for each in made],
            )
            for which in range(count)
        )

    def layer(
        self,
        node: OnnxNode,
        make: Callable[[], nn.Module],
        x: Computed,
        **tensors: np.ndarray | Tensor | None,
    ) -> Computed:
        """A torch.nn module, called with `x`.

        Args:
            make: the module; runs on the meta device, so that its weights take no memory.
            tensors: its parameters and buffers.
        """
        with torch.device("meta"):
            module = make().eval()
        made = []
        for meta in x.metas:
            with torch.no_grad():
                made.append(module.to(meta.dtype)(meta))
        for name, tensor in tensors.items():
            own: Any = getattr(module, name)
            if tensor is None:
                continue
            if tuple(own.shape) != tuple(tensor.shape):
                raise ValueError(f"{name} is {list(tensor.shape)}; expected {list(own.shape)}")
            given = tensor if isinstance(tensor, Tensor) else torch.from_numpy(tensor.copy())
            is_parameter = isinstance(own, nn.Parameter)
            setattr(module, name, nn.Parameter(given.contiguous()) if is_parameter else given)
        rest = [name for name, t in module.named_parameters() if t.is_meta]
        assert not rest, f"{node.op} leaves {rest} without data"
        for name, buffer in module.named_buffers():
            if buffer.is_meta:  # of batch norm: how many batches it has seen
                setattr(module, name, torch.zeros(buffer.shape, dtype=buffer.dtype))
        name = self._name(node.name, node.op.lower())
        self.root.add_module(name, module)
        return self._computed(self.graph.call_module(name, (x.node,)), made)

    def operand(self, value: Value) -> fx.Node:
        """The node of a value; a constant becomes a buffer."""
        if isinstance(value, Computed):
            return value.node
        return self._buffer(value)

    def computed(self, value: Value) -> Computed:
        """The value as a node of the graph."""
        if isinstance(value, Computed):
            return value
        metas = tuple(map(_meta, value.arrays))
        return Computed(self._buffer(value), metas)

    def constant(self, name: str, array: np.ndarray) -> Constant:
        """A tensor that an operator brings along."""
        return Constant(name, (array,) * len(self._batches))

    def _buffer(self, constant: Constant) -> fx.Node:
        array = constant.array
        key = (id(array), array.shape)
        if key not in self._buffers:
            name = self._name(constant.name, "constant")
            self.root.register_buffer(name, torch.from_numpy(array.copy()))
            self._buffers[key] = name
        return self.graph.get_attr(self._buffers[key])

    def _computed(self, node: fx.Node, made: list[Tensor]) -> Computed:
        for meta in made:
            self._require_bounded(meta.shape, f"{node.name!r}")
        return Computed(node, tuple(made))

    def _require_bounded(self, shape: Sequence[int], what: str) -> None:
        if math.prod(shape) > MOST_ELEMENTS:
            raise ValueError(f"{self.file.path}: {what} would have {math.prod(shape)} numbers")

    def _node_of(self, arg: Any) -> Any:
        if isinstance(arg, Constant | Computed):
            return self.operand(arg)
        return [self._node_of(each) for each in arg] if isinstance(arg, list) else arg

    def _nodes(self, args: list[Any]) -> tuple[Any, ...]:
        return tuple(self._node_of(arg) for arg in args)

    def _at(self, arg: Any, i: int) -> Any:
        """An argument as it is for the i-th batch size, on the meta device."""
        if isinstance(arg, Constant):
            return _meta(arg.arrays[i])
        if isinstance(arg, Computed):
            return arg.metas[i]
        return [self._at(each, i) for each in arg] if isinstance(arg, list) else arg

    def _name(self, given: str, otherwise: str) -> str:
        """An identifier that nothing else in the module has."""
        name = re.sub(r"\W+", "_", str(given), flags=re.ASCII).strip("_")[:80] or otherwise
        if name[0].isdigit() or keyword.iskeyword(name) or name == "self":
            name = f"{otherwise}_{name}"
        unique, n = name, 1
        while hasattr(self.root, unique) or hasattr(fx.GraphModule, unique) or unique == "meta":
            n += 1
            unique = f"{name}_{n}"
        return unique


def _is_bytes(value: Value | None) -> bool:
    return isinstance(value, Computed) and value.metas[0].dtype == torch.uint8


def _meta(array: np.ndarray) -> Tensor:
    """A tensor of its shape and dtype, without its data."""
    dtype = torch.from_numpy(np.empty(0, array.dtype)).dtype
    return torch.empty(array.shape, dtype=dtype, device="meta")


class Missing:
    """An output of a node that its operator does not give."""

    def __init__(self, name: str, node: OnnxNode) -> None:
        self.name, self.node = name, node
