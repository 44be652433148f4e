"""bias_correction: what a convolution's bias takes in so that rounding its weights does not move
the mean of its outputs.

Markus Nagel, Mart van Baalen, Tijmen Blankevoort, Max Welling, "Data-free quantization through
weight equalization and bias correction", ICCV 2019, section 4.2, with the means of the inputs that
calibration has seen.
"""

import torch
from torch import Tensor

from resfuse.kernels.engine.ir.folded_weights import conv_weights
from resfuse.kernels.engine.ir.graph import Conv, Graph, State
from resfuse.kernels.engine.quantization.ranges import Ranges
from resfuse.kernels.ops.quantization import quantize_weights


def bias_correction(graph: Graph, state: State, ranges: Ranges, name: str) -> Tensor:
    """Returns what to add to the bias [K] of a convolution or linear layer, float64: minus the sum
    over its window of (quantised weight - weight) * mean of the input's channel.

    A window that reaches over the edge reads zeros there, which this leaves out of account, as the
    paper does.

    Args:
        state: the weights by name; they are folded with their norm in float64 and then quantised.
        name: of the convolution's node.

    Raises:
        ValueError: it is no convolution of this graph, or its input has no means in `ranges`.
    """
    node = next((node for node in graph.nodes if node.name == name), None)
    if node is None or not isinstance(node.op, Conv):
        raise ValueError(f"argument name: {name!r} is no convolution or linear layer of the graph")
    problem = node.op.problem
    found = ranges.values.get(node.inputs[0])
    if found is None or found.means is None or len(found.means) != problem.c:
        raise ValueError(
            f"argument ranges: {node.inputs[0]} has no means of {problem.c} channels; accepted: "
            "ranges of this model"
        )
    if state[node.op.weight].is_meta:  # a network without numbers
        return torch.empty(problem.k, dtype=torch.float64, device="meta")
    weight, _ = conv_weights(node.op, state, torch.float64)
    means = torch.tensor(found.means, dtype=torch.float64, device=weight.device)
    return -mean_shift(weight, means, problem.groups)


def mean_shift(weight: Tensor, means: Tensor, groups: int) -> Tensor:
    """Returns how far quantising a weight moves the mean of each output channel, [K], float64.

    Args:
        weight: [K, C / groups, R, S], float64.
        means: [C], float64, of the input's channels.
    """
    quantised, scale = quantize_weights(weight)
    error = (quantised.double() * scale.view(-1, 1, 1, 1) - weight).sum((2, 3))  # [K, C / groups]
    by_group = error.view(groups, -1, error.shape[1])
    return torch.einsum("gkc,gc->gk", by_group, means.view(groups, -1)).reshape(-1)
