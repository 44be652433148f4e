"""RooflineCost: predicts the time of candidates from a GPU's data sheet.

Every kernel is assumed to reach the GPU's peak in FLOPs or bytes, whichever takes longer. So times
are too short, and equal for all configurations of a tactic; they differ by how often tensors go
through memory, where tactics for several nodes win.
"""

from math import prod

from resfuse.kernels.engine.cost.cost import cost_of
from resfuse.kernels.engine.cost.gpus import Gpu
from resfuse.kernels.engine.ir.candidate import Candidate
from resfuse.kernels.engine.ir.graph import Conv, Finished, Graph, GroupNorm, Node
from resfuse.kernels.engine.tactics import TACTICS
from resfuse.kernels.engine.tactics.quantized_eager import is_quantized
from resfuse.kernels.ops.conv_problem import math_mode_of

# What torch takes for a node on quantised values, in uint8, float64 and float32 by turns: about so
# many kernels, each of which reads or writes eight bytes an element.
_QUANTISED_PASSES, _WIDE = 10, 8
LAUNCH_US = 1.3  # from one kernel of a CUDA graph to the next on Hopper; read, not measured


class RooflineCost:
    """Predicts the ms of candidates, for `planner.plan`."""

    def __init__(self, graph: Graph, gpu: Gpu, launch_us: float = LAUNCH_US) -> None:
        self._graph, self._gpu, self._launch_us = graph, gpu, launch_us

    def __call__(self, candidate: Candidate) -> float:
        kernels = getattr(TACTICS[candidate.tactic].load(), "kernels", None)
        if kernels is not None:
            return sum(map(self._kernel_ms, kernels(self._graph, candidate)))
        part = self._graph.part(candidate.start, candidate.stop)
        return self._kernel_ms(part) + self._passes_ms(candidate.tactic, part)

    def _kernel_ms(self, part: Graph) -> float:
        cost = cost_of(part)
        return self._launch_us / 1e3 + self._gpu.ms(self._mode(part), cost.flops, cost.moved)

    def _passes_ms(self, tactic: str, part: Graph) -> float:
        """Returns the ms of the elementwise kernels after the first, which read and write its
        result."""
        ms = 0.0
        for node in part.nodes:
            value = part.values[node.name]
            if tactic == "eager" and is_quantized(node, part.values):
                shapes = [part.values[name].shape for name in (node.name, *node.inputs)]
                one = self._gpu.ms("ieee", 0, 2 * _WIDE * max(map(prod, shapes)))
                ms += _QUANTISED_PASSES * (self._launch_us / 1e3 + one)
                continue
            moved = 2 * prod(value.shape) * value.dtype.itemsize
            one = self._launch_us / 1e3 + self._gpu.ms(self._math_mode, 0, moved)
            ms += _passes(tactic, node) * one
        return ms

    def _mode(self, part: Graph) -> str:
        """Returns how a part multiplies."""
        quantised = any(isinstance(n.op, Conv) and n.op.problem.is_quantized for n in part.nodes)
        return "int8" if quantised else self._math_mode

    @property
    def _math_mode(self) -> str:
        dtype = self._graph.values[self._graph.input].dtype
        return math_mode_of(dtype)


def _passes(tactic: str, node: Node) -> int:
    """Returns the number of elementwise operations that follow in kernels of their own."""
    op = node.op
    if tactic == "cudnn":  # its fused operations take a bias only with a ReLU
        return int(isinstance(op, Conv) and op.activation == "identity")
    if tactic != "eager" or not isinstance(op, Finished):
        return 0
    ending = (op.activation != "identity") + (node.residual is not None)
    if isinstance(op, Conv | GroupNorm):
        return 1 + ending  # the bias; what normalises, behind what takes the moments
    return max(2 * (op.norm is not None) + ending - 1, 0)
