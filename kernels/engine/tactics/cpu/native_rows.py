"""Fuses a convolution on the CPU with its only reader, a max-pool or a convolution larger than 1x1,
and computes both strip by strip of the reader's rows. So the full-size map of a stem, and the map
between a bottleneck's first 1x1 and a strided or grouped 3x3, never reach memory. See
kernels/cpu/src/fused_rows.h.
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


def scratch(graph: Graph, candidate: Candidate) -> int:
    return 4 * threads() * _Parts(graph, candidate).floats


def lower(graph: Graph, candidate: Candidate, state: State, arena: Arena) -> Native:
    parts = _Parts(graph, candidate)
    node, behind = graph.nodes[candidate.start : candidate.stop]
    pitches = {node.name: whole_vectors(parts.problem.k)}
    conv = native.conv_step(node, parts.config, state, arena, pitches)
    if parts.reader is None:
        reader = native.max_pool_step(graph, behind, arena, pitches)
    else:
        reader = native.conv_step(behind, parts.reader, state, arena, pitches)
    memory = arena.scratch(candidate.start)
    conv.scratch, reader.scratch = memory, memory + 4 * parts.own
    conv.scratch_pitch = reader.scratch_pitch = parts.floats
    conv.y_local = reader.x_local = parts.own + parts.readers
    run = fused_run(
        "row_fused",
        [conv, reader],
        scratch=memory,
        scratch_pitch=parts.floats,
        rows=candidate.settings["rows"],
    )
    return Native(run)


class _Parts:
    """The configurations of a candidate's convolution and reader, and a thread's scratch memory in
    floats."""

    def __init__(self, graph: Graph, candidate: Candidate) -> None:
        node, behind = graph.nodes[candidate.start : candidate.stop]
        assert isinstance(node.op, Conv)
        self.problem, rows = node.op.problem, candidate.settings["rows"]
        self.config = NativeConfig(candidate.settings["form"], False, candidate.settings["block"])
        self.reader = _reader(behind, rows)
        # Scratch memory in order: the convolution's own, its reader's, the map between them.
        run = _run(graph, candidate.start, self.config, rows)
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
    """The vertical extent of a window, in rows of its input."""

    kernel: int
    stride: int
    dilation: int

    def rows(self, problem: ConvProblem, rows: int) -> int:
        """Returns the largest number of reader rows that read at most `rows` rows of the
        convolution, between one and the height of the reader's map.
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
    """Returns whether fusing with this reader may pay: for a max-pool, and for a convolution larger
    than 1x1 without a Winograd form, which would gain more.
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
    """Returns a reader's configuration with blocks no larger than a strip, None for a max-pool."""
    if not isinstance(node.op, Conv):
        return None
    problem = node.op.problem
    every = list(_by_pixel(problem))
    first = next(config.form for config in every)  # "grouped" where the problem allows it
    of_form = [config for config in every if config.form == first]
    config = of_form[len(of_form) // 2]
    return NativeConfig(config.form, False, min(config.block, rows * problem.q))
