"""A convolution fused on the CPU with the max-pool or convolution with windows that alone reads it,
strip by strip of the reader's rows: what a stem computes at full size, and what a bottleneck's
first 1x1 hands to a 3x3 with stride or in groups, never reaches memory. See fused_rows.h in
kernels/cpu/src.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from resfuse.kernels.cpu import conv_candidates
from resfuse.kernels.cpu.conv_candidates import NativeConfig
from resfuse.kernels.cpu.cpus import threads
from resfuse.kernels.cpu.program import Step, fused_run, local_pixels, whole_lines, whole_vectors
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
    line = 4 * problem.q * whole_vectors(problem.k)
    window = _window(behind)
    strips = sorted({window.rows(problem, size // line) for size in _STRIPS})
    offered = [
        (("form", config.form), ("block", min(config.block, pixels)), ("rows", rows))
        for config in _by_pixel(problem)
        for rows in strips
        for pixels in [local_pixels(_run(graph, at, config, rows))]
    ]
    for settings in dict.fromkeys(offered):
        yield Candidate("native_strips", at, at + 2, settings)


def scratch(graph: Graph, choice: Candidate) -> int:
    return 4 * threads() * _Parts(graph, choice).floats


def lower(graph: Graph, choice: Candidate, state: State, arena: Arena) -> Native:
    parts = _Parts(graph, choice)
    node, behind = graph.nodes[choice.start : choice.stop]
    pitches = {node.name: whole_vectors(parts.problem.k)}
    conv = native.conv_step(node, parts.config, state, arena, pitches)
    if parts.reader is None:
        reader = native.max_pool_step(graph, behind, arena, pitches)
    else:
        reader = native.conv_step(behind, parts.reader, state, arena, pitches)
    memory = arena.scratch(choice.start)
    conv.scratch, reader.scratch = memory, memory + 4 * parts.own
    conv.scratch_pitch = reader.scratch_pitch = parts.floats
    conv.y_local = reader.x_local = parts.own + parts.readers
    run = fused_run(
        "row_fused",
        [conv, reader],
        scratch=memory,
        scratch_pitch=parts.floats,
        rows=choice.settings["rows"],
    )
    return Native(run)


class _Parts:
    """A candidate's convolution and reader, and the scratch memory of a thread."""

    def __init__(self, graph: Graph, choice: Candidate) -> None:
        node, behind = graph.nodes[choice.start : choice.stop]
        assert isinstance(node.op, Conv)
        self.problem, rows = node.op.problem, choice.settings["rows"]
        self.config = NativeConfig(choice.settings["form"], False, choice.settings["block"])
        self.reader = _reader(behind, rows)
        # floats: what the convolution needs for itself, then its reader, then what lies between
        run = _run(graph, choice.start, self.config, rows)
        self.own, self.readers = (whole_lines(step.scratch_pitch) for step in run[1:])
        self.floats = self.own + self.readers + local_pixels(run) * whole_vectors(self.problem.k)


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


@dataclass(frozen=True)
class _Window:
    """A window down a column: its rows are `dilation` apart, the next window is `stride` below."""

    kernel: int
    stride: int
    dilation: int

    def rows(self, problem: ConvProblem, rows: int) -> int:
        """Returns the most rows of the reader that read at most `rows` of the convolution: at least
        one, and no more than a map has.
        """
        whole = -(-problem.p // self.stride)
        reach = (self.kernel - 1) * self.dilation
        return max(1, min(whole, (rows - 1 - reach) // self.stride + 1))


def _window(reader: Node) -> _Window:
    if isinstance(reader.op, MaxPool):
        return _Window(reader.op.kernel[0], reader.op.stride[0], reader.op.dilation[0])
    assert isinstance(reader.op, Conv)
    problem = reader.op.problem
    return _Window(problem.r, problem.stride[0], problem.dilation[0])


def _reads_in_windows(node: Node) -> bool:
    """Returns whether strips may pay for a reader: Winograd's form, where there is one, is worth
    more, and a 1x1 needs none.
    """
    if not isinstance(node.op, Conv):
        return isinstance(node.op, MaxPool)
    problem = node.op.problem
    return (
        problem.r * problem.s > 1
        and conv_candidates.refusal(problem) is None
        and "winograd" not in conv_candidates.forms(problem)
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
