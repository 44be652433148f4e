"""Cross-layer equalisation: weights of neighbouring convolutions are scaled against each other, so
that channels have similar ranges, and the network computes the same.

Markus Nagel, Mart van Baalen, Tijmen Blankevoort, Max Welling, "Data-free quantization through
weight equalization and bias correction", ICCV 2019, section 4.1. If act(s * x) = s * act(x) for
positive s, an output channel of the first convolution may be divided by s and the weights of the
second that read it be multiplied by s.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from resfuse.kernels.engine.ir.folded_weights import conv_weights
from resfuse.kernels.engine.ir.graph import Conv, Graph, Node, State, node_state

# ReLU6 clips at six whatever the scale, so it is none of them; nor are SiLU, GELU and the like.
_HOMOGENEOUS = ("identity", "relu", "leaky_relu", "prelu")
_ROUNDS = 20  # over all pairs: chains converge, in MobileNetV2 after six
_CLOSE = 1e-3  # relative change of a scale below which a round counts as no change


@dataclass(frozen=True)
class Pair:
    """Two convolutions, the second of which alone reads the first."""

    first: Node
    second: Node


def pairs(graph: Graph, state: State) -> list[Pair]:
    """Returns the pairs that can be equalised, in order: the value between them has one reader and
    no residual, its activation is positively homogeneous, and the tensors to be scaled belong to
    these layers alone."""
    uses = Counter(name for node in graph.nodes for name in node_state(node))
    producers = {node.name: node for node in graph.nodes}
    found = []
    for second in graph.nodes:
        if not isinstance(second.op, Conv):
            continue
        name = second.inputs[0]
        first = producers.get(name)
        if first is None or not isinstance(first.op, Conv) or graph.readers[name] != 1:
            continue
        op, then = first.op, second.op
        fits = op.problem.k == then.problem.c and not op.problem.residual
        fits = fits and all(state[name].numel() % op.problem.k == 0 for name in _scaled(op))
        scaled = [*_scaled(op), then.weight]
        own = all(
            uses[tensor] == 1
            and tensor not in graph.constants
            and state[tensor].dtype == torch.float32
            for tensor in scaled
        )
        if fits and own and _scaled(op) and op.activation in _HOMOGENEOUS:
            found.append(Pair(first, second))
    return found


def _scaled(op: Conv) -> list[str]:
    """Returns the names of the tensors that scale with a convolution's output, none where no
    tensor does: a norm without a weight."""
    if op.norm is None:
        return [op.weight, *filter(None, [op.bias])]
    if op.norm.weight is None:
        return []
    return [op.norm.weight, *filter(None, [op.norm.bias])]


def equalised(graph: Graph, state: State) -> dict[str, Tensor]:
    """Returns the state of a network that computes the same, but for the rounding of float32, with
    channels of more equal ranges. Ranges must be found anew for it.

    Each channel between two layers is divided by s = sqrt(r1 / r2), where r1 is the largest weight
    that makes it and r2 the largest that reads it, folded; channels that nothing makes or reads
    stay. Chains are gone over until no scale changes by more than 0.1 %.
    """
    new = {name: tensor.detach() for name, tensor in state.items()}
    found = pairs(graph, state)
    exact = {name: new[name].double() for name in _names(found)}
    for _ in range(_ROUNDS):
        changes = [_equalise(pair, {**new, **exact}, exact) for pair in found]
        if max(changes, default=0.0) < _CLOSE:
            break
    return {**new, **{name: tensor.to(new[name].dtype) for name, tensor in exact.items()}}


def _names(found: list[Pair]) -> Iterator[str]:
    for pair in found:
        assert isinstance(pair.first.op, Conv) and isinstance(pair.second.op, Conv)
        yield from (*_scaled(pair.first.op), pair.second.op.weight)


def _equalise(pair: Pair, state: State, exact: dict[str, Tensor]) -> float:
    """Scales the tensors of one pair in `exact`, and returns the largest relative change."""
    op, then = pair.first.op, pair.second.op
    assert isinstance(op, Conv) and isinstance(then, Conv)
    first, _ = conv_weights(op, state, torch.float64)
    second, _ = conv_weights(then, state, torch.float64)
    made, read = first.abs().amax((1, 2, 3)), _by_input(second.abs(), then).amax(-1)
    usable = (made > 0) & (read > 0)
    s = torch.where(usable, (made / read).sqrt(), torch.ones_like(made))
    for name in _scaled(op):
        tensor = exact[name]
        exact[name] = (tensor.reshape(len(s), -1) / s[:, None]).reshape(tensor.shape)
    weight = exact[then.weight]
    groups, each = then.problem.groups, then.problem.c // then.problem.groups
    by_group = weight.reshape(groups, then.problem.k // groups, each, -1)
    exact[then.weight] = (by_group * s.view(groups, 1, each, 1)).reshape(weight.shape)
    return float((s - 1).abs().max())


def _by_input(weight: Tensor, op: Conv) -> Tensor:
    """Returns a weight [K, C / groups, R, S] by input channel: [C, K / groups * R * S]."""
    groups, each = op.problem.groups, op.problem.c // op.problem.groups
    split = weight.reshape(groups, op.problem.k // groups, each, -1)
    return split.transpose(1, 2).reshape(op.problem.c, -1)
