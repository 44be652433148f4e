"""Formats the table of Engine.quantization: a line for each convolution and linear layer."""

from collections.abc import Collection, Mapping

from resfuse.kernels.engine.ir.graph import Conv, Graph, Node
from resfuse.kernels.engine.quantization.sensitivity import LayerError
from resfuse.kernels.ops.asked_precision import layer_name

_HEADINGS = (
    "layer", "precision", "reads: scale", "zero", "stores: scale", "zero", "clipped, %", "SQNR, dB",
    "kept in fp32",
)  # fmt: skip
_EXPLANATION = (
    "A number q stands for scale * (q - zero). SQNR: of the layer's output by itself, from exact "
    "inputs quantised. Clipped: the share of its output's numbers beyond the range."
)


def quantization_table(
    graph: Graph, errors: Mapping[str, LayerError], asked: Collection[str]
) -> str:
    """Returns a table of how each layer is quantised.

    Args:
        errors: what quantisation does to each layer, by its weight's name, where it was measured.
        asked: the names of the weights that the caller has asked to keep in float32.
    """
    nodes = [node for node in graph.nodes if isinstance(node.op, Conv)]
    rows = [_HEADINGS, *(_row(graph, node, errors, asked) for node in nodes)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, tuple("-" * width for width in widths))
    lines = [
        "  ".join(
            cell.rjust(width) if 2 <= i <= 7 else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([*lines, "", _EXPLANATION])


def _row(
    graph: Graph, node: Node, errors: Mapping[str, LayerError], asked: Collection[str]
) -> tuple[str, ...]:
    assert isinstance(node.op, Conv)
    weight = node.op.weight
    error = errors.get(weight)
    stored = [graph.values[name].quantization for name in (node.inputs[0], node.name)]
    scales = [
        cell
        for each in stored
        for cell in ((f"{each.scale:.4g}", str(each.zero_point)) if each else ("", ""))
    ]
    why = ""
    if stored[0] is None:
        why = "asked for" if weight in asked else "max_error" * (error is not None)
    return (
        layer_name(weight),
        "fp32" if stored[0] is None else "int8",
        *scales,
        f"{100 * error.clipped:.3f}" if error else "",
        f"{error.sqnr_db:.1f}" if error else "",
        why,
    )
