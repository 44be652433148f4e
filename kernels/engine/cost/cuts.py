"""CUTS: ways to cut a network into kernels, and the least time of each on some device.

Each kernel reads and writes every tensor that it shares with others once, and does all of its
arithmetic or all of its traffic at the device's full rate, whichever takes longer. A cut is a limit
for every implementation that cuts that way, not a plan: such a kernel may be impossible to build.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from resfuse.kernels.engine.cost.cost import Cost, cost_of
from resfuse.kernels.engine.cost.gpus import Gpu
from resfuse.kernels.engine.ir.graph import Affine, Conv, Graph, MaxPool, Mean, Node

Kernels = list[list[Node]]


@dataclass(frozen=True)
class Cut:
    """A way to cut a network; `kernels(graph)` returns the nodes of each kernel."""

    kernels: Callable[[Graph], Kernels]
    does: str


@dataclass(frozen=True)
class Limit:
    """The least FLOPs, bytes and time of a network under one cut."""

    kernels: int
    flops: int
    moved: int  # bytes
    ms: float
    memory_ms: float  # of `ms`, in kernels that wait for memory

    @property
    def bound(self) -> str:
        """Returns whether most of the time goes to "bytes" or "FLOPs"."""
        return "bytes" if 2 * self.memory_ms > self.ms else "FLOPs"


def limit(graph: Graph, cut: str, device: Gpu, math_mode: str) -> Limit:
    """Returns the limit of a graph under a cut named in CUTS, at the device's peak rates."""
    costs = [kernel_cost(graph, nodes) for nodes in CUTS[cut].kernels(graph)]
    times = [device.ms(math_mode, cost.flops, cost.moved) for cost in costs]
    waiting = [
        ms
        for ms, cost in zip(times, costs, strict=True)
        if device.bound(math_mode, cost.flops, cost.moved) == "bytes"
    ]
    flops, moved = (
        sum(column) for column in zip(*((c.flops, c.moved) for c in costs), strict=True)
    )
    return Limit(len(costs), flops, moved, sum(times), sum(waiting))


def with_batch(graph: Graph, n: int) -> Graph:
    """Returns the graph for another batch size; the batch must be every value's first dimension."""

    def resized(node: Node) -> Node:
        if not isinstance(node.op, Conv):
            return node
        return replace(node, op=replace(node.op, problem=replace(node.op.problem, n=n)))

    values = {name: replace(v, shape=(n, *v.shape[1:])) for name, v in graph.values.items()}
    return replace(graph, nodes=tuple(map(resized, graph.nodes)), values=values)


def kernel_cost(graph: Graph, nodes: Sequence[Node]) -> Cost:
    """Returns the FLOPs and least bytes of some nodes as one kernel."""
    within = Counter(name for node in nodes for name in node.inputs)
    outputs = tuple(node.name for node in nodes if graph.readers[node.name] > within[node.name])
    computed = {node.name for node in nodes}
    names = dict.fromkeys([*(name for name in within if name not in computed), *computed])
    first = next(iter(names))
    return cost_of(Graph(first, outputs, tuple(nodes), {n: graph.values[n] for n in names}))


def _one_by_one(graph: Graph) -> Kernels:
    return [[node] for node in graph.nodes]


def _with_pixelwise(graph: Graph, most: int) -> Kernels:
    """Returns kernels in which a convolution larger than 1x1 takes in up to `most` 1x1 convolutions
    behind it, which need one pixel at a time. A projection is part of the kernel that adds it, as
    more channels to sum."""
    taken: set[str] = set()
    kernels = []
    for node in graph.nodes:
        if node.name not in taken and isinstance(node.op, Conv) and not _is_pixelwise(node):
            kernel = _followers(graph, node, most, taken)
            if len(kernel) > 1:
                kernels.append(kernel)
                taken.update(one.name for one in kernel)
    kernels += [[node] for node in graph.nodes if node.name not in taken]
    return _with_pools(graph, kernels)


def _with_pools(graph: Graph, kernels: Kernels) -> Kernels:
    """Moves pooling into the kernel that computes its input, unless that has another reader."""
    producers = {node.name: kernel for kernel in kernels for node in kernel}
    remaining = []
    for kernel in kernels:
        node = kernel[0]
        pools = isinstance(node.op, MaxPool | Mean) and graph.readers[node.inputs[0]] == 1
        producer = producers.get(node.inputs[0]) if pools and len(kernel) == 1 else None
        if producer is None:
            remaining.append(kernel)
        else:
            producer.append(node)
            producers[node.name] = producer
    return remaining


def _followers(graph: Graph, first: Node, most: int, taken: set[str]) -> list[Node]:
    kernel, convolutions = [first], 0
    while convolutions < most:
        behind = [
            node
            for node in graph.nodes
            if node.inputs[:1] == (kernel[-1].name,)
            and node.name not in taken
            and _is_pixelwise(node)
            and not _is_projection(graph, node)
        ]
        if not behind:
            break
        convolutions += isinstance(behind[0].op, Conv)
        kernel.append(behind[0])
    added = {node.residual for node in kernel}
    folded = [node for node in graph.nodes if node.name in added and _is_projection(graph, node)]
    return folded + kernel


def _blocks(graph: Graph) -> Kernels:
    """Returns kernels that reach from one point where a single value is live to the next: each
    residual block is one."""
    kernels: Kernels = [[]]
    live: set[str] = set()
    for at, node in enumerate(graph.nodes):
        kernels[-1].append(node)
        live.add(node.name)
        live = {name for name in live if graph.last_read[name] > at}
        reads_on = graph.input and graph.last_read[graph.input] > at
        if len(live) == 1 and not reads_on:
            kernels.append([])
    return _with_pools(graph, [nodes for nodes in kernels if nodes])


def _is_pixelwise(node: Node) -> bool:
    """Returns whether an output pixel depends on one pixel of each input only."""
    if isinstance(node.op, Affine):
        return True
    if not isinstance(node.op, Conv):
        return False
    p = node.op.problem
    return (p.r, p.s, p.stride, p.padding) == (1, 1, (1, 1), (0, 0))


def _is_projection(graph: Graph, node: Node) -> bool:
    """Returns whether a node is a 1x1 convolution whose only reader adds it."""
    p = node.op.problem if isinstance(node.op, Conv) else None
    only_read_once = graph.readers[node.name] == 1
    window = p is not None and (p.r, p.s) == (1, 1) and not p.residual
    return window and only_read_once and any(o.residual == node.name for o in graph.nodes)


CUTS: dict[str, Cut] = {
    "conv by conv": Cut(_one_by_one, "every convolution with its batch norm, activation and sum"),
    "back to back": Cut(
        lambda graph: _with_pixelwise(graph, 1),
        "a 3x3 and the 1x1 behind it in one kernel; projections and pooling in it, too",
    ),
    "chain": Cut(
        lambda graph: _with_pixelwise(graph, 2),
        "the same, and the 1x1 that begins the next block",
    ),
    "whole block": Cut(_blocks, "each residual block in one kernel"),
}
