"""A convolution and the max-pool behind it on the CPU, strip by strip of the pool's rows: what a
network's stem computes at full size, its largest value, never reaches memory. See
kernels/native/pooled.h.
"""

from collections.abc import Iterable

from resfuse.kernels.engine.choice import Choice
from resfuse.kernels.engine.graph import Conv, Graph, MaxPool, State
from resfuse.kernels.engine.room import Room
from resfuse.kernels.engine.tactics import native
from resfuse.kernels.engine.work import Native
from resfuse.kernels.native import convolution
from resfuse.kernels.native.convolution import NativeConfig
from resfuse.kernels.native.step import threads, whole_vectors
from resfuse.kernels.problem import ConvProblem

# Bytes of the convolution's rows in a strip: from a quarter of a second-level cache on.
_STRIPS = (1 << 18, 1 << 19, 1 << 20)
_LINE = 16  # floats

refusal = native.refusal


def segments(graph: Graph, at: int) -> Iterable[Choice]:
    if at + 1 >= len(graph.nodes):
        return
    node, behind = graph.nodes[at : at + 2]
    if not isinstance(node.op, Conv) or not isinstance(behind.op, MaxPool):
        return
    problem = node.op.problem
    if behind.inputs != (node.name,) or graph.readers[node.name] != 1 or problem.residual:
        return
    if convolution.refusal(problem) is not None:
        return
    line = 4 * problem.q * whole_vectors(problem.k)
    strips = sorted({_rows_of_pool(behind.op, problem, size // line) for size in _STRIPS})
    offered = [
        (
            ("form", form),
            ("block", min(config.block, _pixels(behind.op, problem, rows))),
            ("rows", rows),
        )
        for form in convolution.forms(problem)
        if form in ("direct", "grouped")
        for config in convolution.configs(form, problem)
        if not config.by_channel
        for rows in strips
    ]
    for settings in dict.fromkeys(offered):
        yield Choice("native_pooled", at, at + 2, settings)


def scratch(graph: Graph, choice: Choice) -> int:
    problem, pool = _parts(graph, choice)
    own, local = _floats(problem, pool, choice)
    return 4 * threads() * (own + local)


def lower(graph: Graph, choice: Choice, state: State, room: Room) -> Native:
    node, behind = graph.nodes[choice.start : choice.stop]
    problem, pool = _parts(graph, choice)
    own, local = _floats(problem, pool, choice)
    pitches = {node.name: whole_vectors(problem.k)}
    conv = native.conv_step(node, _config(choice), state, room, pitches)
    conv.scratch, conv.scratch_pitch = room.scratch(choice.start), own + local
    conv.y_local, conv.joined = own, 1
    last = native.max_pool_step(graph, behind, room, pitches)
    last.block = choice.settings["rows"]
    return Native([conv, last])


def _parts(graph: Graph, choice: Choice) -> tuple[ConvProblem, MaxPool]:
    node, behind = graph.nodes[choice.start : choice.stop]
    assert isinstance(node.op, Conv) and isinstance(behind.op, MaxPool)
    return node.op.problem, behind.op


def _config(choice: Choice) -> NativeConfig:
    return NativeConfig(choice.settings["form"], False, choice.settings["block"])


def _floats(problem: ConvProblem, pool: MaxPool, choice: Choice) -> tuple[int, int]:
    """Scratch memory of a thread: the convolution's own, and the rows of a strip."""
    own = -(-convolution.scratch_floats(problem, _config(choice)) // _LINE) * _LINE
    pixels = _pixels(pool, problem, choice.settings["rows"])
    # never at 0, which says that a step's output is not local
    return max(own, _LINE), pixels * whole_vectors(problem.k)


def _pixels(pool: MaxPool, problem: ConvProblem, rows: int) -> int:
    """Of the convolution, that so many of the pool's rows read."""
    reach = (rows - 1) * pool.stride[0] + (pool.kernel[0] - 1) * pool.dilation[0] + 1
    return problem.q * min(reach, problem.p)


def _rows_of_pool(pool: MaxPool, problem: ConvProblem, rows: int) -> int:
    """The most rows of the pool that read no more than so many, at least one; no more than a whole
    map has."""
    whole = -(-problem.p // pool.stride[0])
    reach = (pool.kernel[0] - 1) * pool.dilation[0]
    return max(1, min(whole, (rows - 1 - reach) // pool.stride[0] + 1))
