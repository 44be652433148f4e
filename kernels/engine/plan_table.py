"""Formats the table of Engine.explain: a line for each segment, a line more for each operation that
is fused with its first, and the total.
"""

from collections.abc import Sequence

import torch

from resfuse.kernels.engine.cost.ceilings import Ceilings
from resfuse.kernels.engine.cost.cost import cost_of
from resfuse.kernels.engine.ir.candidate import Candidate
from resfuse.kernels.engine.ir.chunks import inner_candidates
from resfuse.kernels.engine.ir.graph import (
    Affine,
    AveragePool,
    Concat,
    Conv,
    Convert,
    Graph,
    GroupNorm,
    LayerNorm,
    MaxPool,
    Mean,
    Node,
    Norm,
    Pick,
    SplitSoftmax,
    SplitSum,
    Torch,
)
from resfuse.kernels.engine.memory.arena_planner import MB
from resfuse.kernels.engine.planning.planner import Segment
from resfuse.kernels.engine.shapes.shape_plans import ShapePlans, written
from resfuse.kernels.ops.asked_precision import layer_name

_HEADINGS = (
    "segment", "tactic", "precision", "ms", "%", "floor, ms", "% of floor", "MB", "next best",
)  # fmt: skip


_NAMES = {
    MaxPool: "max-pool",
    AveragePool: "average pool",
    Pick: "picked pixels",
    Mean: "mean",
    Concat: "concat",
    LayerNorm: "layer norm",
    SplitSum: "sum of splits",
    SplitSoftmax: "softmax of splits",
}
_PRECISIONS = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.uint8: "int8",
    torch.int8: "int8",
}  # fmt: skip
_MEASURED = "Times were measured on this device, each segment by itself."


def summary(plans: ShapePlans, device: str, precision: str) -> str:
    """Returns a line with the input of an engine, the batch sizes or shapes that it has plans for,
    and the segments and the time of the largest."""
    largest = plans.find()
    takes = largest.graph.values[largest.graph.input]
    dtype = str(takes.dtype).removeprefix("torch.")
    if takes.quantization is not None:
        dtype += f" pixels, computed in {precision},"
    elif takes.dtype == torch.float32 and precision != "fp32":
        dtype += f", computed in {precision},"
    ms = sum(segment.ms for segment in largest.segments)
    took = f"{len(largest.segments)} segments, {ms:.3f} ms one by one at"
    if len(plans.images) > 1:
        shapes = ", ".join(map(written, plans))
        return f"{dtype} on {device}, shapes {shapes}; {took} {written(largest.shape)}"
    sizes = ", ".join(map(str, plans.batch_sizes()))
    return (
        f"N x {written(largest.shape[1:])} {dtype} on {device}, batch sizes {sizes}; "
        f"{took} batch {largest.shape[0]}"
    )


def table(
    graph: Graph,
    segments: Sequence[Segment],
    ceilings: Ceilings | None,
    times: str = _MEASURED,
) -> str:
    """Returns a table of segments with aligned columns; floors only if ceilings are given.

    Args:
        times: a sentence that says where the times are from.
    """
    if not segments:
        return "No segments: the outputs are the input."
    total = sum(segment.ms for segment in segments)
    rows = [_row(graph, segment, total, ceilings) for segment in segments]
    floor = sum(float(row[5]) for row in rows) if ceilings else None
    joined = [_joined(graph, segment.candidate) for segment in segments]
    widths = [max(len(row[i]) for row in [_HEADINGS, *rows]) for i in range(len(_HEADINGS))]
    widths[0] = max([widths[0], *(len(name) for names in joined for name in names)])
    lines = [_line(_HEADINGS, widths), _line(["-" * w for w in widths], widths)]
    for row, names in zip(rows, joined, strict=True):
        lines += [_line(row, widths), *names]
    lines.append("")
    batch = graph.batch_size
    lines.append(
        f"{len(segments)} segments, {total:.3f} ms one by one"
        + (f", {floor:.3f} ms at this device's ceilings" if floor else "")
        + f", for a batch of {batch}"
        + (f": {batch / total * 1e3:.0f} samples/s." if total else ".")
    )
    lines.append(times)
    if any(s.runner_up_ms is not None and s.runner_up_ms < s.ms for s in segments):
        lines.append(
            "Where the next best took less by itself, it would have needed more memory, or values "
            "would have crossed between native steps and torch."
        )
    if ceilings:
        lines.append(
            f"Ceilings: {ceilings.gflops:.0f} GFLOP/s, {ceilings.gb_per_s:.1f} GB/s copied. "
            "Winograd needs 2.25 times fewer multiplications than the floor counts."
        )
    opaque = [s for s in segments if any(isinstance(n.op, Torch) for n in _nodes(graph, s))]
    if opaque:
        operations = [n.op for s in opaque for n in _nodes(graph, s)]
        names = sorted({op.target for op in operations if isinstance(op, Torch)})
        lines.append(f"Run by torch, {len(opaque)} segments: {', '.join(names)}.")
    if graph.derived:
        lines.append(f"Computed once, from weights alone: {len(graph.derived)} operations.")
    if untimed := sum(segment.ms == 0 for segment in segments):
        lines.append(
            f"Neither timed nor checked: {untimed}, which torch alone computes, and not from any "
            "numbers: indices, probabilities or the like."
        )
    return "\n".join(lines)


def name_of(node: Node) -> str:
    """Returns a name such as `layer1.0.conv1 1x64x56x56 k64 3x3 relu`."""
    op = node.op
    if isinstance(op, Conv):
        words = [layer_name(op.weight), op.problem.label()]
        words += ["+ residual"] * op.problem.residual
        return " ".join([*words, *([op.activation] * (op.activation != "identity"))])
    if isinstance(op, Affine):
        words = [_norm_name(op.norm)] if op.norm is not None else []
        words += ["gate"] * op.gate + ["+ residual"] * op.residual
        return " ".join([*words, *([op.activation] * (op.activation != "identity"))])
    if isinstance(op, GroupNorm):
        words = [layer_name(op.weight)] if op.weight else []
        words += ["group norm", *(["+ residual"] * op.residual)]
        return " ".join([*words, *([op.activation] * (op.activation != "identity"))])
    if isinstance(op, SplitSum) and op.gate:
        return f"gate + {_NAMES[SplitSum]}"
    if isinstance(op, Torch):
        return op.target
    if isinstance(op, Convert):
        return f"to {op.dtype}"
    words = [layer_name(op.weight)] if isinstance(op, LayerNorm) and op.weight else []
    return " ".join([*words, _NAMES[type(op)]])


def _norm_name(norm: Norm) -> str:
    """Returns the layer's name, or what it does where its factor is a number in the forward."""
    name = (norm.mean or norm.weight or norm.bias or "").partition(":")[0]
    plain = "shift" if norm.weight is None else "scale"
    return plain if name.startswith("aten.") else name.removesuffix(".running_mean")


def _row(
    graph: Graph, segment: Segment, total: float, ceilings: Ceilings | None
) -> tuple[str, ...]:
    cost = cost_of(graph.part(segment.candidate.start, segment.candidate.stop))
    floor = ceilings.floor_ms(cost.flops, cost.moved) if ceilings else None
    runner_up = (
        f"{segment.runner_up_ms:.3f} {segment.runner_up.label()}" if segment.runner_up else ""
    )
    return (
        name_of(_nodes(graph, segment)[0]),
        segment.candidate.label(),
        _precision(graph, segment),
        f"{segment.ms:.3f}" if segment.ms else "",
        f"{100 * segment.ms / total:.1f}" if segment.ms else "",
        f"{floor:.3f}" if floor is not None else "",
        f"{100 * floor / segment.ms:.0f}" if floor is not None and segment.ms else "",
        f"{cost.moved / MB:.2f}",
        runner_up,
    )


def _precision(graph: Graph, segment: Segment) -> str:
    """Returns the precision of a segment, that of its convolutions if it has any; several where its
    operations differ."""
    nodes = _nodes(graph, segment)
    convolutions = [node for node in nodes if isinstance(node.op, Conv)]
    dtypes = dict.fromkeys(
        node.op.problem.dtypes.input if isinstance(node.op, Conv) else graph.values[node.name].dtype
        for node in convolutions or nodes
    )
    return " + ".join(_PRECISIONS.get(dtype, "") for dtype in dtypes)


def _joined(graph: Graph, candidate: Candidate) -> list[str]:
    """Returns lines for the operations fused with a segment's first; for chunks, lines for all,
    with their tactics."""
    names = [name_of(node) for node in graph.nodes[candidate.start : candidate.stop]]
    if "inner" not in candidate.settings:
        return [f"+ {name}" for name in names[1:]]
    tactics = {inner.start: inner.label() for inner in inner_candidates(candidate)}
    return [f"+ {name}{': ' * (i in tactics)}{tactics.get(i, '')}" for i, name in enumerate(names)]


def _nodes(graph: Graph, segment: Segment) -> tuple[Node, ...]:
    return graph.nodes[segment.candidate.start : segment.candidate.stop]


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    """Returns a row of cells padded to the widths, numbers to the right, words to the left."""
    aligned = [
        cell.rjust(width) if 3 <= i <= 7 else cell.ljust(width)
        for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return "  ".join(aligned).rstrip()
