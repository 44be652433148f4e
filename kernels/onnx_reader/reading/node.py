"""One node of a file, as an operator reads it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto

from resfuse.kernels.onnx_reader.reading.model_file import array_of, first_line

_FLOATS = (AttributeProto.FLOAT, AttributeProto.FLOATS)
_KINDS = (
    AttributeProto.INT, AttributeProto.INTS, AttributeProto.STRING, AttributeProto.TENSOR, *_FLOATS,
)  # fmt: skip


# What reads an operator: a function of (reader, node, *inputs), see operators/.
Operators = dict[str, Callable[..., Any]]


class OnnxNode:
    """Attributes by name; those that no one asks for are found out, and refused.

    `says` is how a refusal names the node.
    """

    def __init__(self, proto: onnx.NodeProto, opset: int, path: Path) -> None:
        self.proto, self.op, self.opset, self.path = proto, proto.op_type, opset, path
        self.name = proto.name or next(iter(filter(None, proto.output)), "")
        self.inputs = list(proto.input)
        self.outputs = list(proto.output)
        # protobuf gives bytes that are no text as they are.
        if not all(
            isinstance(name, str) for name in (self.op, self.name, *proto.input, *proto.output)
        ):
            raise ValueError(f"{path}: a name in it is no text")
        op = self.op if self.op.isidentifier() else repr(self.op)
        self.says = f"{path}: node {self.name!r} ({op}, opset {opset})"
        self._attributes = {attribute.name: attribute for attribute in proto.attribute}
        self._read: set[str] = set()

    def __contains__(self, attribute: str) -> bool:
        return attribute in self._attributes

    def attribute(self, name: str, default: Any = None) -> Any:
        """An int, float, str, list or array, or `default`. Floats are those of float32."""
        self._read.add(name)
        found = self._attributes.get(name)
        if found is None:
            return default
        if found.type not in _KINDS:
            raise ValueError(f"{self.says}: the attribute {name} is of a kind that is not read")
        if found.type == AttributeProto.TENSOR:
            return array_of(found.t, self.path, f"the attribute {name} of node {self.name!r}")
        try:
            value = onnx.helper.get_attribute_value(found)
            return value.decode() if isinstance(value, bytes) else value
        except Exception as error:
            raise ValueError(f"{self.says}: {name}: {first_line(error)}") from error

    def graph(self, name: str) -> onnx.GraphProto:
        """A branch."""
        found = self._attributes.get(name)
        if found is None or found.type != AttributeProto.GRAPH:
            raise self.refusal(f"no {name}")
        branch: onnx.GraphProto = found.g
        return branch

    def ints(self, name: str, default: Any = None) -> Any:
        found = self.attribute(name)
        return default if found is None else [int(each) for each in found]

    def require(self, name: str, default: Any, *accepted: Any) -> None:
        """Raises ValueError where an attribute is neither its default nor accepted."""
        found = self.attribute(name, default)
        if found != default and found not in accepted:
            raise self.refusal(f"{name}={found!r}")

    def require_all_read(self) -> None:
        for name in self._attributes:
            if name not in self._read:
                raise self.refusal(f"the attribute {name}")

    def refusal(self, what: str) -> ValueError:
        return ValueError(f"{self.says}: {what} is not read")


def scalar(array: np.ndarray) -> float | int | bool:
    """The only number in an array."""
    found: float | int | bool = array.reshape(()).item()
    return found
