"""A convolution fused on the CPU with the max-pool or convolution with windows that alone reads it,
strip by strip of the reader's rows, and with the 1x1 convolution that alone reads the reader: what
a stem computes at full size, what a bottleneck's first 1x1 hands to a 3x3 with stride or in groups,
and what that hands to the last 1x1, never reaches memory. See fused_rows.h in kernels/cpu/src.
"""

from collections.abc import Iterable, Iterator

from resfuse.kernels.cpu import conv_candidates
from resfuse.kernels.cpu.conv_candidates import NativeConfig
from resfuse.kernels.cpu.cpus import threads
from resfuse.kernels.cpu.program import VALUE_BYTES, Step, fused_run, local_pixels, whole_vectors
from resfuse.kernels.cpu.row_fusion import RowLayout, is_pointwise, rows_within
from resfuse.kernels.engine.ir.candidate import Candidate
from resfuse.kernels.engine.ir.graph import Conv, Graph, MaxPool, Node, State
from resfuse.kernels.engine.ir.lowered import Native
from resfuse.kernels.engine.memory.buffers import Arena
from resfuse.kernels.engine.tactics.cpu import native
from resfuse.kernels.ops.conv_problem import ConvProblem

# Bytes of the convolution's rows in a strip: from a quarter of a second-level cache on.
_STRIPS = (1 << 18, 1 << 19, 1 << 20)

refusal = native.refusal


def segments(graph: Graph, at: int) -> Iterable[Candidate]:
    if at + 1 >= len(graph.nodes):
        return
    node, behind = graph.nodes[at : at + 2]
    if not isinstance(node.op, Conv) or not _reads_in_windows(behind):
        return
    problem = node.op.problem
    if behind.inputs[0] != node.name or graph.readers[node.name] != 1 or problem.residual:
        return
    if conv_candidates.refusal(problem) is not None:
        return
    line = VALUE_BYTES[conv_candidates.storage_of(problem)] * problem.q * whole_vectors(problem.k)
    strips = sorted({_rows_within(size // line, problem, behind) for size in _STRIPS})
    offered = [
        (("form", config.form), ("block", min(config.block, pixels)), ("rows", rows))
        for config in _by_pixel(problem)
        for rows in strips
        for pixels in [local_pixels(_run(graph, at, config, rows))]
    ]
    for stop in range(at + 2, _end(graph, at) + 1):
        for settings in dict.fromkeys(offered):
            yield Candidate("native_strips", at, stop, settings)


def scratch(graph: Graph, choice: Candidate) -> int:
    return 4 * threads() * _layout(graph, choice).floats


def lower(graph: Graph, choice: Candidate, state: State, arena: Arena) -> Native:
    layout = _layout(graph, choice)
    nodes = graph.nodes[choice.start : choice.stop]
    names = [node.name for node in nodes[:-1]]
    pitches = dict(zip(names, layout.pitches, strict=True))
    reader = _reader(nodes[1], layout.rows)
    configs = [_config(choice), reader, *(layout.following for _ in nodes[2:])]
    steps = [
        native.max_pool_step(graph, node, arena, pitches)
        if config is None
        else native.conv_step(graph, node, config, state, arena, pitches)
        for node, config in zip(nodes, configs, strict=True)
    ]
    return Native(layout.fuse(steps, arena.scratch(choice.start)))


def _config(choice: Candidate) -> NativeConfig:
    return NativeConfig(choice.settings["form"], False, choice.settings["block"])


def _layout(graph: Graph, choice: Candidate) -> RowLayout:
    rows = choice.settings["rows"]
    _, conv, reader = _run(graph, choice.start, _config(choice), rows)
    rest = [node.op for node in graph.nodes[choice.start + 2 : choice.stop]]
    return RowLayout(conv, reader, [op.problem for op in rest if isinstance(op, Conv)], rows)


def _run(graph: Graph, at: int, config: NativeConfig, rows: int) -> list[Step]:
    """Returns the steps of a convolution and its reader in strips of `rows`, without addresses."""
    node, behind = graph.nodes[at : at + 2]
    assert isinstance(node.op, Conv)
    conv = conv_candidates.conv_step(node.op.problem, config)
    reader_config = _reader(behind, rows)
    if reader_config is None:
        reader = native.max_pool_step(graph, behind, None)
    else:
        assert isinstance(behind.op, Conv)
        reader = conv_candidates.conv_step(behind.op.problem, reader_config)
    return fused_run("row_fused", [conv, reader], rows=rows)


def _end(graph: Graph, at: int) -> int:
    """Returns where the longest run ends that begins at a node with a reader behind it."""
    _, reader, *rest = graph.nodes[at : at + 3]
    if not rest or not isinstance(reader.op, Conv) or graph.readers[reader.name] != 1:
        return at + 2
    (last,) = rest
    if not isinstance(last.op, Conv) or last.inputs[0] != reader.name:
        return at + 2
    problem = last.op.problem
    return at + 3 if is_pointwise(problem) and conv_candidates.refusal(problem) is None else at + 2


def _rows_within(rows: int, problem: ConvProblem, reader: Node) -> int:
    """Returns the most rows of the reader that read at most `rows` of the convolution."""
    if isinstance(reader.op, MaxPool):
        (kernel, _), (stride, _), (dilation, _) = (
            reader.op.kernel,
            reader.op.stride,
            reader.op.dilation,
        )
        return rows_within(rows, problem, kernel, stride, dilation)
    assert isinstance(reader.op, Conv)
    windows = reader.op.problem
    return rows_within(rows, problem, windows.r, windows.stride[0], windows.dilation[0])


def _reads_in_windows(node: Node) -> bool:
    """Returns whether strips may pay for a reader: Winograd's form, where there is one and no
    groups, is worth more, and a 1x1 needs none.
    """
    if not isinstance(node.op, Conv):
        return isinstance(node.op, MaxPool)
    problem = node.op.problem
    return (
        problem.r * problem.s > 1
        and conv_candidates.refusal(problem) is None
        and (problem.groups > 1 or "winograd" not in conv_candidates.forms(problem))
    )


def _by_pixel(problem: ConvProblem) -> Iterator[NativeConfig]:
    """Yields the configurations that compute any range of pixels."""
    for form in conv_candidates.forms(problem):
        if form in ("direct", "grouped"):
            for config in conv_candidates.configs(form, problem):
                if not config.by_channel:
                    yield config


def _reader(node: Node, rows: int) -> NativeConfig | None:
    """Returns a reader's configuration, in blocks no larger than a strip; None for a max-pool."""
    if not isinstance(node.op, Conv):
        return None
    problem = node.op.problem
    every = list(_by_pixel(problem))
    first = next(config.form for config in every)  # grouped, where it can be
    of_form = [config for config in every if config.form == first]
    config = of_form[len(of_form) // 2]
    return NativeConfig(config.form, False, min(config.block, rows * problem.q))
