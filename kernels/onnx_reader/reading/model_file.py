"""An ONNX file as it comes from a stranger: read without trusting a word of it.

Everything that is wrong with it is a ValueError of one sentence that names the file.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import TensorProto, inliner, numpy_helper

# A protobuf cannot be larger; weights beyond it are external data.
MOST_FILE_BYTES = 2**31 - 1
MOST_NODES = 100_000  # after functions are written out
OPSETS = range(7, onnx.defs.onnx_opset_version() + 1)  # broadcasting is numpy's from 7 on
DOMAINS = ("", "ai.onnx")
# What torch has as well.
TYPES = {
    TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BOOL, TensorProto.UINT8,
    TensorProto.INT8, TensorProto.INT16, TensorProto.INT32, TensorProto.INT64,
}  # fmt: skip
INPUT_TYPES = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.UINT8)


@dataclass(frozen=True)
class Input:
    name: str
    dtype: np.dtype
    shape: tuple[int | None, ...]  # None where the file leaves it open


@dataclass(frozen=True)
class ModelFile:
    path: Path
    opset: int
    input: Input
    outputs: tuple[str, ...]
    nodes: tuple[onnx.NodeProto, ...]
    constants: dict[str, np.ndarray]


def read_model(path: Path) -> ModelFile:
    """Raises ValueError: see load_onnx."""
    model = _parsed(path)
    opset = _opset(model, path)
    model = _without_functions(model, path)
    graph = model.graph
    if graph.sparse_initializer:
        raise ValueError(f"{path}: sparse weights are not read; accepted: dense ones")
    constants = {}
    for tensor in graph.initializer:
        if tensor.name in constants:
            raise ValueError(f"{path}: two weights are called {tensor.name!r}")
        constants[tensor.name] = array_of(tensor, path, f"weight {tensor.name!r}")
    inputs = [value for value in graph.input if value.name not in constants]
    if len(inputs) != 1:
        names = ", ".join(f"{value.name!r}" for value in inputs[:5]) or "none"
        raise ValueError(f"{path}: it has {len(inputs)} inputs ({names}); accepted: one")
    outputs = tuple(value.name for value in graph.output)
    if not outputs:
        raise ValueError(f"{path}: it has no output")
    return ModelFile(path, opset, _input(inputs[0], path), outputs, tuple(graph.node), constants)


def array_of(tensor: TensorProto, path: Path, what: str) -> np.ndarray:
    """A tensor of the file; external data is read from the file's folder."""
    if tensor.data_type not in TYPES:
        known = tensor.data_type in TensorProto.DataType.values()
        name = TensorProto.DataType.Name(tensor.data_type) if known else str(tensor.data_type)
        raise ValueError(f"{path}: {what} is of type {name}, which is not read")
    if any(size < 0 for size in tensor.dims):
        raise ValueError(f"{path}: {what} has a negative size: {list(tensor.dims)}")
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    size = math.prod(tensor.dims) * dtype.itemsize
    try:
        if tensor.data_location == TensorProto.EXTERNAL:
            _load_external(tensor, path, size)
        found = numpy_helper.to_array(tensor)
    except Exception as error:  # onnx raises whatever it meets
        raise ValueError(f"{path}: {what} cannot be read: {first_line(error)}") from error
    if found.nbytes != size:
        raise ValueError(f"{path}: {what} holds {found.nbytes} bytes, but its shape says {size}")
    return found


def first_line(error: BaseException) -> str:
    """The first line of what an exception says, short enough for a sentence."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300].rstrip(".") if lines else type(error).__name__


def _parsed(path: Path) -> onnx.ModelProto:
    try:
        size = path.stat().st_size
        if size > MOST_FILE_BYTES:
            raise ValueError(f"{path}: {size} bytes; an ONNX file has at most {MOST_FILE_BYTES}")
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    model = onnx.ModelProto()
    try:
        model.ParseFromString(content)
    except DecodeError as error:
        raise ValueError(f"{path} is no ONNX file, or is truncated") from error
    if not model.graph.node and not model.graph.output:
        raise ValueError(f"{path} is no ONNX file: it holds no graph")
    return model


def _opset(model: onnx.ModelProto, path: Path) -> int:
    versions = [entry.version for entry in model.opset_import if entry.domain in DOMAINS]
    if len(versions) != 1 or versions[0] not in OPSETS:
        told = ", ".join(map(str, versions)) or "none"
        raise ValueError(
            f"{path}: operator set {told}; accepted: {OPSETS.start} to {OPSETS.stop - 1}"
        )
    return int(versions[0])


def _without_functions(model: onnx.ModelProto, path: Path) -> onnx.ModelProto:
    """The file's own functions written out where they are called; nested ones grow without bound,
    so their nodes are counted before."""
    functions = {(f.domain, f.name): f for f in model.functions}
    sizes: dict[tuple[str, str], int] = {}

    def count(nodes: "onnx.GraphProto | onnx.FunctionProto", inside: tuple[object, ...]) -> int:
        total = 0
        for node in nodes.node:
            key = (node.domain, node.op_type)
            if key in inside or len(inside) > 50:
                raise ValueError(f"{path}: the function {node.op_type!r} calls itself")
            if key in functions and key not in sizes:
                sizes[key] = count(functions[key], (*inside, key))
            total = min(total + sizes.get(key, 1), MOST_NODES + 1)
        return total

    if count(model.graph, ()) > MOST_NODES:
        raise ValueError(f"{path}: it has more than {MOST_NODES} nodes")
    if not functions:
        return model
    try:
        return inliner.inline_local_functions(model)
    except Exception as error:
        raise ValueError(f"{path}: its functions cannot be read: {first_line(error)}") from error


def _input(value: onnx.ValueInfoProto, path: Path) -> Input:
    if not value.type.HasField("tensor_type"):
        raise ValueError(f"{path}: the input {value.name!r} is no tensor")
    type_ = value.type.tensor_type
    if type_.elem_type not in INPUT_TYPES:
        known = type_.elem_type in TensorProto.DataType.values()
        name = TensorProto.DataType.Name(type_.elem_type) if known else str(type_.elem_type)
        accepted = ", ".join(map(TensorProto.DataType.Name, INPUT_TYPES))
        raise ValueError(
            f"{path}: the input {value.name!r} is of type {name}; accepted: {accepted}"
        )
    if not type_.HasField("shape") or not type_.shape.dim:
        raise ValueError(f"{path}: the input {value.name!r} has no shape")
    shape = tuple(
        dim.dim_value if dim.HasField("dim_value") and dim.dim_value > 0 else None
        for dim in type_.shape.dim
    )
    return Input(value.name, onnx.helper.tensor_dtype_to_np_dtype(type_.elem_type), shape)


def _load_external(tensor: TensorProto, path: Path, size: int) -> None:
    """Raises ValueError unless the data is a piece of a regular file in the folder of `path`."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    folder = path.resolve().parent
    file = (folder / location).resolve()
    if not location or not file.is_relative_to(folder):
        raise ValueError(f"its external data {location!r} is not in the folder of the file")
    if not file.is_file():
        raise ValueError(f"its external data {location!r} is missing")
    offset = int(entries.get("offset") or 0)
    length = int(entries.get("length") or size)
    if length != size or offset < 0 or offset + size > file.stat().st_size:
        raise ValueError(
            f"its external data is {length} bytes at {offset} of {location!r}, which has "
            f"{file.stat().st_size}; its shape says {size}"
        )
    with file.open("rb") as stream:
        stream.seek(offset)
        tensor.raw_data = stream.read(size)
    tensor.data_location = TensorProto.DEFAULT
