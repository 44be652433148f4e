"""export_onnx: writes a graph in int8 as an ONNX file, in the form that all runtimes read."""

import os
import tempfile
from pathlib import Path
from typing import Literal

from resfuse.kernels.engine.ir.graph import Graph, State
from resfuse.kernels.engine.saving.onnx.onnx_builder import OnnxBuilder
from resfuse.kernels.engine.saving.onnx.onnx_operations import OPERATIONS

Activations = Literal["uint8", "int8"]


def export_onnx(graph: Graph, state: State, path: Path, activations: Activations) -> None:
    """Writes the file; on failure an earlier one stays as it was. See `Engine.export_onnx`.

    Raises:
        ValueError: `activations` is neither, or the graph has an operation that is not written.
        OSError: the file cannot be written.
    """
    if activations not in ("uint8", "int8"):
        raise ValueError(f"argument activations: {activations!r}; accepted: uint8, int8")
    build = OnnxBuilder(graph, state, signed=activations == "int8")
    for node in graph.nodes:
        build.begin(node)
        OPERATIONS[type(node.op)](build, node, node.op)
    content = build.model().SerializeToString()
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        Path(name).replace(path)
    finally:
        Path(name).unlink(missing_ok=True)
