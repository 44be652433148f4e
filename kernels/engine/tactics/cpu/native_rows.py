"""A convolution fused on the CPU with the max-pool or convolution with windows that alone reads it,
strip by strip of the reader's rows, and with the 1x1 convolution that alone reads the reader: what
a stem computes at full size, what a bottleneck's first 1x1 hands to a 3x3 with stride or in groups,
and what that hands to the last 1x1, never reaches memory. See fused_rows.h in kernels/cpu/src.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate

from resfuse.kernels.cpu import conv_candidates
from resfuse.kernels.cpu.conv_candidates import NativeConfig
from resfuse.kernels.cpu.cpus import threads
from resfuse.kernels.cpu.program import (
    ABSENT,
    Step,
    fused_run,
    local_pixels,
    whole_lines,
    whole_vectors,
)
from resfuse.kernels.engine.ir.candidate import Candidate
from resfuse.kernels.engine.ir.graph import Conv, Graph, MaxPool, Node, State
from resfuse.kernels.engine.ir.lowered import Native
from resfuse.kernels.engine.memory.aliasing import channels_of
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
    for stop in range(at + 2, _end(graph, at) + 1):
        for settings in dict.fromkeys(offered):
            yield Candidate("native_strips", at, stop, settings)


def scratch(graph: Graph, choice: Candidate) -> int:
    return 4 * threads() * _Parts(graph, choice).floats


def lower(graph: Graph, choice: Candidate, state: State, arena: Arena) -> Native:
    parts = _Parts(graph, choice)
    node, behind, *rest = graph.nodes[choice.start : choice.stop]
    conv = native.conv_step(node, parts.config, state, arena, parts.pitches)
    if parts.reader is None:
        reader = native.max_pool_step(graph, behind, arena, parts.pitches)
    else:
        reader = native.conv_step(behind, parts.reader, state, arena, parts.pitches)
    following = [
        native.conv_step(one, parts.following, state, arena, parts.pitches) for one in rest
    ]
    memory = arena.scratch(choice.start)
    steps = [conv, reader, *following]
    for one, step, own in zip([node, behind, *rest], steps, parts.own, strict=True):
        step.scratch, step.scratch_pitch = memory + 4 * own, parts.floats
        step.x_local, step.y_local = parts.offset(one.inputs[0]), parts.offset(one.name)
    run = fused_run(
        "row_fused",
        steps,
        scratch=memory,
        scratch_pitch=parts.floats,
        rows=choice.settings["rows"],
    )
    return Native(run)


class _Parts:
    """The configurations of a candidate's steps, and the scratch memory of a thread: what each step
    needs for itself comes first, then the values that only the run reads.
    """

    def __init__(self, graph: Graph, choice: Candidate) -> None:
        nodes = graph.nodes[choice.start : choice.stop]
        rows = choice.settings["rows"]
        self.config = NativeConfig(choice.settings["form"], False, choice.settings["block"])
        self.reader = _reader(nodes[1], rows)
        run = _run(graph, choice.start, self.config, rows)
        pixels = local_pixels(run)
        self.following = NativeConfig("direct", False, pixels)
        needed = [step.scratch_pitch for step in run[1:]]
        for node in nodes[2:]:
            assert isinstance(node.op, Conv)
            needed.append(conv_candidates.scratch_floats(node.op.problem, self.following))
        *self.own, values = accumulate(map(whole_lines, needed), initial=0)
        self.pitches = {
            node.name: whole_vectors(channels_of(graph, node.name)) for node in nodes[:-1]
        }
        ends = accumulate((pixels * pitch for pitch in self.pitches.values()), initial=values)
        *offsets, self.floats = ends
        self._offsets = dict(zip(self.pitches, offsets, strict=True))

    def offset(self, name: str) -> int:
        """Returns the offset of a value that only the run reads, and ABSENT for others."""
        return self._offsets.get(name, ABSENT)


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
    pointwise = (problem.r, problem.s, problem.stride, problem.padding, problem.groups)
    if pointwise != (1, 1, (1, 1), (0, 0), 1) or conv_candidates.refusal(problem) is not None:
        return at + 2
    return at + 3


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
