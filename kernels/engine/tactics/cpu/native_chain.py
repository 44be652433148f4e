"""Convolutions joined on the CPU, block by block of pixels: 3x3 -> 1x1 + residual, the projection
that is the residual, and the next block's first 1x1. What one writes the next reads from the
caches, and what nobody else reads never reaches memory. See kernels/cpu/src/fused_chain.h.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate

from resfuse.kernels.cpu import conv_candidates
from resfuse.kernels.cpu.conv_candidates import NativeConfig
from resfuse.kernels.cpu.cpus import threads
from resfuse.kernels.cpu.program import pixels, whole_vectors
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
_LINE = 16  # floats

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


def scratch(graph: Graph, choice: Candidate) -> int:
    return (
        4 * threads() * (_own_floats(_links(graph, choice)) + sum(_local(graph, choice).values()))
    )


def lower(graph: Graph, choice: Candidate, state: State, arena: Arena) -> Native:
    links = _links(graph, choice)
    own, local = _own_floats(links), _local(graph, choice)
    pitches = {name: whole_vectors(channels_of(graph, name)) for name in local}
    starts = dict(zip(local, accumulate(local.values(), initial=own), strict=False))
    steps = []
    for link in links:
        step = native.conv_step(link.node, link.config, state, arena, pitches)
        step.scratch = arena.scratch(choice.start)
        step.scratch_pitch = own + sum(local.values())
        x, residual = link.node.inputs[0], link.node.residual
        step.x_local, step.y_local = starts.get(x, 0), starts.get(link.node.name, 0)
        step.residual_local = starts.get(residual or "", 0)
        steps.append(step)
    steps[0].joined = len(steps) - 1
    return Native(steps)


def _is_chain(graph: Graph, at: int, stop: int) -> bool:
    """Whether nodes [at, stop) can go through blocks of the same pixels together: a convolution
    with a window, and 1x1 ones on maps of the size it makes.
    """
    nodes = graph.nodes[at:stop]
    problems = [node.op.problem for node in nodes if isinstance(node.op, Conv)]
    if len(problems) < len(nodes) or any(conv_candidates.refusal(p) is not None for p in problems):
        return False
    first, *others = problems
    return first.r * first.s > 1 and all(
        (p.r, p.s, p.padding, p.groups) == (1, 1, (0, 0), 1)
        and (p.n, p.p, p.q) == (first.n, first.p, first.q)
        for p in others
    )


def _reads(node: Node, others: Iterable[Node]) -> bool:
    return any(node.name in other.inputs for other in others)


def _first_configs(problem: ConvProblem, channels: int) -> Iterable[NativeConfig]:
    """Forms of the first convolution, each in blocks of several sizes."""
    forms = dict.fromkeys(config.form for config in conv_candidates.candidates(problem))
    for form in forms:
        unit, of_each = (-(-problem.q // 2), 4) if form == "winograd" else (pixels(), 1)
        count = conv_candidates.tiles_of if form == "winograd" else conv_candidates.pixels_of
        whole = -(-count(problem) // threads() // unit) * unit
        blocks = {
            min(max(1, budget // (4 * channels * of_each) // unit) * unit, whole)
            for budget in _BLOCKS
        }
        for block in sorted(blocks):
            yield NativeConfig(form, False, block)


def _links(graph: Graph, choice: Candidate) -> list[_Link]:
    first, *others = graph.nodes[choice.start : choice.stop]
    config = NativeConfig(by_channel=False, **choice.settings)
    block = _block_pixels(config)
    return [
        _Link(first, _problem(first), config),
        *(_Link(n, _problem(n), NativeConfig("direct", False, block)) for n in others),
    ]


def _block_pixels(config: NativeConfig) -> int:
    return 4 * config.block if config.form == "winograd" else config.block


def _own_floats(links: list[_Link]) -> int:
    """Scratch memory that each convolution has to itself while it runs: the most of any."""
    most = max(conv_candidates.scratch_floats(link.problem, link.config) for link in links)
    return -(-max(most, 1) // _LINE) * _LINE


def _local(graph: Graph, choice: Candidate) -> dict[str, int]:
    """What is read in the chain alone: floats of a block of each."""
    block = _block_pixels(NativeConfig(by_channel=False, **choice.settings))
    names = sorted(graph.inner(choice.start, choice.stop))
    return {name: block * whole_vectors(channels_of(graph, name)) for name in names}


def _problem(node: Node) -> ConvProblem:
    assert isinstance(node.op, Conv)
    return node.op.problem
