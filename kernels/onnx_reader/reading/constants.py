"""What depends on shapes and on numbers in the file alone is computed while the file is read, by
onnx's own reference evaluator."""

import math
from collections.abc import Sequence

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator

from resfuse.kernels.onnx_reader.reading.node import OnnxNode, scalar
from resfuse.kernels.onnx_reader.reading.values import Computed, Constant, Value

# Of all that is computed so; shapes and masks need little, and a few nodes could ask for anything.
MOST_BYTES = 2**30
MOST_WEIGHTS = 2**31  # numbers that weights in integers stand for, of all nodes together
# Arithmetic on shapes, and what turns a number into a tensor. What is not here runs in the network.
FOLDED = {
    "Abs", "Add", "And", "Cast", "CastLike", "Ceil", "Clip", "Concat", "ConstantOfShape", "Cos",
    "Div", "Equal", "Erf", "Exp", "Expand", "Flatten", "Floor", "Gather", "Greater",
    "GreaterOrEqual", "Identity", "Less", "LessOrEqual", "Log", "Max", "Min", "Mod", "Mul",
    "Neg", "Not", "Or", "Pow", "Range", "Reciprocal", "ReduceMax", "ReduceMean", "ReduceMin",
    "ReduceProd", "ReduceSum", "Relu", "Reshape", "Round", "Sign", "Sin", "Slice", "Split",
    "Sqrt", "Squeeze", "Sub", "Sum", "Tile", "Transpose", "Unsqueeze", "Where",
}  # fmt: skip


class Folding:
    def __init__(self, opset: int, batches: int) -> None:
        self._opsets = [onnx.helper.make_opsetid("", opset)]
        self._batches = batches
        self._bytes = 0
        self._weights = 0

    def fold(self, node: OnnxNode, inputs: Sequence[Value | None]) -> tuple[Constant, ...] | None:
        """A node's outputs where they are known; None where the network computes them."""
        if node.op == "Constant":
            return (Constant(node.outputs[0], (self._constant(node),) * self._batches),)
        if node.op in ("Shape", "Size"):
            return self._shape(node, inputs[0])
        if node.op not in FOLDED or any(isinstance(value, Computed) for value in inputs):
            return None
        known = [value for value in inputs if isinstance(value, Constant)]
        if node.op == "Identity":
            return (Constant(node.outputs[0], known[0].arrays),)
        found: list[list[np.ndarray]] = []
        for i in range(self._batches):
            given = [value.arrays[i] if isinstance(value, Constant) else None for value in inputs]
            if i and all(value.arrays[i] is value.arrays[0] for value in known):
                found.append(found[0])
            else:
                self._charge(node, given)
                found.append(self._evaluate(node, given))
        return tuple(
            Constant(name, tuple(each[which] for each in found))
            for which, name in enumerate(node.outputs)
        )

    def charge_weights(self, count: int) -> None:
        """Raises ValueError before more numbers are unpacked than any network has weights: a weight
        of the file may be read by any number of nodes."""
        self._weights += count
        if self._weights > MOST_WEIGHTS:
            raise ValueError(f"more than {MOST_WEIGHTS} quantised weights would be unpacked")

    def _constant(self, node: OnnxNode) -> np.ndarray:
        for name in ("value", "value_float", "value_floats", "value_int", "value_ints"):
            if name in node:
                found = node.attribute(name)
                node.require_all_read()
                dtype = np.float32 if "float" in name else np.int64
                return found if isinstance(found, np.ndarray) else np.array(found, dtype)
        raise node.refusal("such a constant")

    def _shape(self, node: OnnxNode, value: Value | None) -> tuple[Constant, ...]:
        assert value is not None
        start, end = node.attribute("start", 0), node.attribute("end")
        node.require_all_read()
        if node.op == "Size":
            arrays = [np.array(math.prod(shape), np.int64) for shape in value.shapes]
        else:
            arrays = [np.array(shape[start:end], np.int64) for shape in value.shapes]
        return (Constant(node.outputs[0], tuple(arrays)),)

    def _evaluate(self, node: OnnxNode, given: Sequence[np.ndarray | None]) -> list[np.ndarray]:
        names = [name for name in dict.fromkeys(node.inputs) if name]
        function = onnx.helper.make_function(
            "", "fold", names, node.outputs, [node.proto], self._opsets
        )
        feeds = {name: a for name, a in zip(node.inputs, given, strict=True) if a is not None}
        with np.errstate(all="ignore"):
            found = ReferenceEvaluator(function).run(None, feeds, attributes={})
        return [np.asarray(each) for each in found]

    def _charge(self, node: OnnxNode, given: Sequence[np.ndarray | None]) -> None:
        """Raises ValueError before more is computed than anyone needs."""
        arrays = [array for array in given if array is not None]
        self._bytes += 8 * _elements(node, arrays)
        if self._bytes > MOST_BYTES:
            raise ValueError(f"constants of more than {MOST_BYTES} bytes would be computed")


def _elements(node: OnnxNode, arrays: Sequence[np.ndarray]) -> int:
    """How many numbers the outputs have at most."""
    if node.op == "ConstantOfShape":
        return math.prod(map(int, arrays[0].reshape(-1)))
    if node.op == "Expand":
        shape = [max(1, int(size)) for size in arrays[1].reshape(-1)]
        return max(1, arrays[0].size) * math.prod(shape)
    if node.op == "Tile":
        return arrays[0].size * math.prod(max(1, int(n)) for n in arrays[1].reshape(-1))
    if node.op == "Range":
        start, limit, delta = map(scalar, arrays)
        return max(0, math.ceil((limit - start) / delta)) if delta else 0
    if node.op == "Gather":
        return arrays[0].size * max(1, arrays[1].size)
    if node.op in ("Concat", "Split"):
        return sum(array.size for array in arrays)
    try:
        return math.prod(np.broadcast_shapes(*(array.shape for array in arrays)))
    except ValueError:  # operands that are not broadcast, such as a shape
        return max(array.size for array in arrays)
