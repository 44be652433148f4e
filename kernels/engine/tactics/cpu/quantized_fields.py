"""The fields of a native step that say how its quantised values are stored."""

from typing import Any

from resfuse.kernels.engine.ir.graph import Conv, Graph, Node


def quantized_fields(graph: Graph, node: Node) -> dict[str, Any]:
    """Returns those fields of a node's step; none where it has no quantised values."""
    x, y = (graph.values[name].quantization for name in (node.inputs[0], node.name))
    added = None if node.residual is None else graph.values[node.residual].quantization
    fields: dict[str, Any] = {}
    if x is not None:
        fields |= {"x_zero": x.zero_point, "x_scale": x.scale}
        if not isinstance(node.op, Conv):  # whose problem says so
            fields["y_fp32"] = y is None
    if y is not None:
        fields |= {"y_zero": y.zero_point, "y_inverse_scale": y.inverse_scale}
    if added is not None:
        fields |= {"residual_zero": added.zero_point, "residual_scale": added.scale}
    return fields
