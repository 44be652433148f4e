"""OnnxBuilder: the nodes and constants of an ONNX file while a graph is written, node by node."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from resfuse.kernels.engine.ir.graph import Graph, Node, State, Value
from resfuse.kernels.ops.quantization import Quantization

LEAST_OPSET = 13  # the first with a scale for each channel


class OnnxBuilder:
    """Collects nodes that compute in real numbers, with QuantizeLinear and DequantizeLinear behind
    each value that the graph quantises.

    Attributes:
        graph, state: what is written.
        names: for each value of the graph written so far, the tensor with its real numbers.
        opset: the lowest operator set that has everything used.
        any_batch: whether the file computes other batches likewise.
    """

    def __init__(self, graph: Graph, state: State, signed: bool) -> None:
        self.graph, self.state = graph, state
        self.names = {graph.input: graph.input}
        self.opset, self.any_batch = LEAST_OPSET, True
        self._signed = signed
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[str, np.ndarray] = {}
        self._used = {graph.input}
        self._at = graph.input
        pixels = self.value(graph.input).quantization
        if pixels is not None:
            scale, zero = np.float32(pixels.scale), np.uint8(pixels.zero_point)
            stored = [self.constant(scale, "scale"), self.constant(zero, "zero_point")]
            self.names[graph.input] = self.add("DequantizeLinear", [graph.input, *stored])

    def begin(self, node: Node) -> None:
        """What is added from here on belongs to `node`, and is named after it."""
        self._at = node.name

    def value(self, name: str) -> Value:
        return self.graph.values[name]

    def add(
        self,
        op: str,
        inputs: Sequence[str],
        *,
        opset: int = LEAST_OPSET,
        **attributes: Any,
    ) -> str:
        """Adds an operator with one output, which has come with `opset`; returns its name."""
        self.opset = max(self.opset, opset)
        name = self._unique(f"{self._at}/{op}")
        self._nodes.append(helper.make_node(op, list(inputs), [name], name=name, **attributes))
        return name

    def constant(self, what: Any, name: str) -> str:
        """Adds a tensor of numbers; returns its name."""
        name = self._unique(f"{self._at}/{name}")
        array = what.detach().cpu().contiguous().numpy() if isinstance(what, Tensor) else what
        self._constants[name] = np.asarray(array)
        return name

    def weight(self, narrow: Tensor, scale: Tensor) -> str:
        """Adds a weight in int8 with a scale for each index of its first dimension; returns the
        name of the real numbers.

        Args:
            scale: [K], float64.
        """
        zeros = np.zeros(scale.numel(), np.int8)
        tensors = (narrow, "weight"), (scale.float(), "weight_scale"), (zeros, "weight_zero_point")
        return self.add("DequantizeLinear", [self.constant(*each) for each in tensors], axis=0)

    def quantized(self, x: str, to: Quantization) -> str:
        """Adds the pair that rounds `x` to what `to` can store; returns the name of the result."""
        scale = self.constant(np.float32(to.scale), "scale")
        shifted = np.int8(to.zero_point - 128) if self._signed else np.uint8(to.zero_point)
        zero_point = self.constant(shifted, "zero_point")
        narrow = self.add("QuantizeLinear", [x, scale, zero_point])
        return self.add("DequantizeLinear", [narrow, scale, zero_point])

    def store(self, node: Node, y: str) -> None:
        """Makes `y` the result of `node`, quantised as the graph has it."""
        quantization = self.value(node.name).quantization
        self.names[node.name] = y if quantization is None else self.quantized(y, quantization)

    def model(self) -> onnx.ModelProto:
        """Returns the file."""
        outputs = [self._output(at) for at in range(len(self.graph.outputs))]
        graph = helper.make_graph(
            self._nodes,
            "resfuse",
            [self._described(self.graph.input, self.graph.input)],
            [
                self._described(name, of)
                for name, of in zip(outputs, self.graph.outputs, strict=True)
            ],
            [numpy_helper.from_array(array, name) for name, array in self._constants.items()],
        )
        opsets = [helper.make_opsetid("", self.opset)]
        return helper.make_model(
            graph,
            opset_imports=opsets,
            ir_version=helper.find_min_ir_version_for(opsets),
            producer_name="resfuse",
        )

    def _output(self, at: int) -> str:
        """Returns the name of an output, a tensor of its own: two may be one value."""
        self._at = "output" if len(self.graph.outputs) == 1 else f"output_{at}"
        return self.add("Identity", [self.names[self.graph.outputs[at]]])

    def _described(self, name: str, of: str) -> onnx.ValueInfoProto:
        value = self.value(of)
        pixels = name == self.graph.input and value.quantization is not None
        if value.dtype != torch.float32 and not pixels:
            raise ValueError(f"{of!r} is {value.dtype}; an ONNX file takes and returns float32")
        first = "N" if self.any_batch else value.shape[0]
        dtype = TensorProto.UINT8 if pixels else TensorProto.FLOAT
        return helper.make_tensor_value_info(name, dtype, [first, *value.shape[1:]])

    def _unique(self, name: str) -> str:
        unique, n = name, 1
        while unique in self._used:
            n += 1
            unique = f"{name}_{n}"
        self._used.add(unique)
        return unique
