"""Fuses a chain of convolutions on the CPU and computes it block by block of pixels: 3x3 -> 1x1 +
residual, the projection that is the residual, and the next block's first 1x1. Each reads from the
caches what the one before has written, and values that only the chain reads never reach memory. See
kernels/cpu/src/fused_chain.h.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate

from resfuse.kernels.cpu import conv_candidates
from resfuse.kernels.cpu.conv_candidates import NativeConfig
from resfuse.kernels.cpu.cpus import threads
from resfuse.kernels.cpu.program import (
    ABSENT,
    VALUE_BYTES,
    fused_run,
    local_floats,
    local_pixels,
    mr,
    whole_lines,
    whole_vectors,
)
from resfuse.kernels.engine.ir.candidate import Candidate
from resfuse.kernels.engine.ir.graph import Conv, Graph, Node, State
from resfuse.kernels.engine.ir.lowered import Native
from resfuse.kernels.engine.memory.aliasing import channels_of
from resfuse.kernels.engine.memory.buffers import Arena
from resfuse.kernels.engine.tactics.cpu import native
from resfuse.kernels.ops.conv_problem import ConvProblem

_LONGEST = 4  # a 3x3, a projection, the 1x1 that adds it, the next block's 1x1
# Bytes that a block's values take: from a first-level cache to half of a second-level one.
_BLOCKS = (1 << 17, 1 << 18, 1 << 19, 1 << 20)

refusal = native.refusal


@dataclass(frozen=True)
class _Link:
    """A convolution of the chain and its configuration."""

    node: Node
    problem: ConvProblem
    config: NativeConfig


def segments(graph: Graph, at: int) -> Iterable[Candidate]:
    for stop in range(at + 2, min(at + _LONGEST, len(graph.nodes)) + 1):
        if not _is_chain(graph, at, stop):
            return
        first = _problem(graph.nodes[at])
        if all(_reads(graph.nodes[i], graph.nodes[i + 1 : stop]) for i in range(at, stop - 1)):
            channels = first.c + sum(_problem(node).k for node in graph.nodes[at:stop])
            for config in _first_configs(first, channels):
                settings = (("form", config.form), ("block", config.block))
                yield Candidate("native_chain", at, stop, settings)


def scratch(graph: Graph, candidate: Candidate) -> int:
    return 4 * threads() * _Layout(graph, candidate).floats


def lower(graph: Graph, candidate: Candidate, state: State, arena: Arena) -> Native:
    layout = _Layout(graph, candidate)
    memory = arena.scratch(candidate.start) if layout.floats else 0
    steps = []
    for link in layout.links:
        step = native.conv_step(graph, link.node, link.config, state, arena, layout.pitches)
        step.scratch, step.scratch_pitch = memory, layout.floats
        step.x_local = layout.offset(link.node.inputs[0])
        step.y_local = layout.offset(link.node.name)
        step.residual_local = layout.offset(link.node.residual)
        steps.append(step)
    return Native(fused_run("chain", steps, scratch=memory, scratch_pitch=layout.floats))


def _is_chain(graph: Graph, at: int, stop: int) -> bool:
    """Returns whether nodes [at, stop) can be computed in blocks of the same pixels: a convolution
    with a window, and 1x1 convolutions on maps of the size of its output.
    """
    nodes = graph.nodes[at:stop]
    problems = [node.op.problem for node in nodes if isinstance(node.op, Conv)]
    if len(problems) < len(nodes) or any(conv_candidates.refusal(p) is not None for p in problems):
        return False
    first, *others = problems
    if any(p.dtypes != first.dtypes for p in others):
        return False
    return first.r * first.s > 1 and all(
        (p.r, p.s, p.padding, p.groups) == (1, 1, (0, 0), 1)
        and (p.n, p.p, p.q) == (first.n, first.p, first.q)
        for p in others
    )


def _reads(node: Node, others: Iterable[Node]) -> bool:
    return any(node.name in other.inputs for other in others)


def _first_configs(problem: ConvProblem, channels: int) -> Iterable[NativeConfig]:
    """Yields the forms of the first convolution, each in blocks of several sizes."""
    forms = dict.fromkeys(config.form for config in conv_candidates.candidates(problem))
    for form in forms:
        unit, of_each = (-(-problem.q // 2), 4) if form == "winograd" else (mr(), 1)
        count = conv_candidates.tiles_of if form == "winograd" else conv_candidates.pixels_of
        whole = -(-count(problem) // threads() // unit) * unit
        value = VALUE_BYTES[conv_candidates.storage_of(problem)]
        blocks = {
            min(max(1, budget // (value * channels * of_each) // unit) * unit, whole)
            for budget in _BLOCKS
        }
        for block in sorted(blocks):
            yield NativeConfig(form, False, block)


class _Layout:
    """The convolutions of a chain, and the offsets in a thread's scratch memory, in floats, of the
    values that only the chain reads."""

    def __init__(self, graph: Graph, candidate: Candidate) -> None:
        first, *others = graph.nodes[candidate.start : candidate.stop]
        config = NativeConfig(by_channel=False, **candidate.settings)
        head = conv_candidates.conv_step(_problem(first), config)
        pixels = local_pixels(fused_run("chain", [head]))
        following = NativeConfig("direct", False, pixels)
        self.links = [
            _Link(first, _problem(first), config),
            *(_Link(node, _problem(node), following) for node in others),
        ]
        # First comes the scratch memory of one convolution at a time: as much as any of them needs.
        own = whole_lines(
            max(conv_candidates.scratch_floats(link.problem, link.config) for link in self.links)
        )
        names = sorted(graph.inner(candidate.start, candidate.stop))
        self.pitches = {name: whole_vectors(channels_of(graph, name)) for name in names}
        sizes = (local_floats(head, pixels * self.pitches[name]) for name in names)
        ends = [*accumulate(sizes, initial=own)]
        self._offsets = dict(zip(names, ends, strict=False))
        self.floats = ends[-1]

    def offset(self, name: str | None) -> int:
        """Returns the offset of a value that only the chain reads, ABSENT for any other."""
        return ABSENT if name is None else self._offsets.get(name, ABSENT)


def _problem(node: Node) -> ConvProblem:
    assert isinstance(node.op, Conv)
    return node.op.problem
