"""What a part of a graph computes and moves at the least: FLOPs of its convolutions, and each
tensor that it reads or leaves behind once, with its weights.
"""

from dataclasses import dataclass
from math import prod

from resfuse.kernels.engine.graph import Conv, Graph
from resfuse.kernels.problem import MATH_MODES


@dataclass(frozen=True)
class Cost:
    """Of one run."""

    flops: int
    moved: int  # bytes


def cost_of(part: Graph) -> Cost:
    """FLOPs as convolutions are defined; Winograd's needs fewer."""
    flops = weights = 0
    for node in part.nodes:
        if isinstance(node.op, Conv):
            problem = node.op.problem
            size = MATH_MODES[problem.math_mode][1]
            flops += problem.flops
            weights += size * problem.k * (problem.c // problem.groups * problem.r * problem.s + 1)
    names = {*(name for name in part.reads), *part.outputs}
    tensors = sum(prod(part.values[n].shape) * part.values[n].dtype.itemsize for n in names)
    return Cost(flops, weights + tensors)
