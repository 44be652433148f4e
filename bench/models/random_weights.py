"""Makes other people's networks behave like trained ones where their weights are random: what is
constant is drawn anew, and batch norms get the statistics of photographs.
"""

import operator
from collections.abc import Iterator

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

# A channel that is zero in nearly all calibration images would be multiplied by up to
# 1 / sqrt(eps) = 316 where it is not: RepVGG-B0 amplified rounding 276 times, RepVGG-D2se to 0.7.
LEAST_VARIANCE = 0.1  # of the norm's mean
_SUMS = (operator.add, operator.iadd, torch.add, "add", "add_")


@torch.no_grad()
def spread(model: nn.Module) -> None:
    """Draws anew what starts constant: a last norm's scale of 0 or a layer scale of 1e-6 would
    hide whatever its branch computes, and a scale of 1 whatever is folded wrongly.
    """
    for parameter in model.parameters():
        if parameter.numel() and bool((parameter == parameter.flatten()[0]).all()):
            tiny = abs(float(parameter.flatten()[0])) < 0.1
            if tiny:
                parameter.normal_(std=0.2 if parameter.dim() < 2 else 0.02)
            else:
                parameter.mul_(torch.empty_like(parameter).uniform_(0.5, 1.5))


@torch.no_grad()
def shrink_branches(model: nn.Module, gain: float = 0.2) -> None:
    """Multiplies scale and shift of the last batch norm in every residual branch by `gain`, as
    resnet_ref's function of that name does for our own networks, and for the same reason: trained
    branches add little, and where they add as much as their shortcut, rounding errors grow with
    every block. Call it before `calibrate`.

    torchvision's MobileNetV2, seeded, on photographs of 224 pixels (relative L2 distance of the
    logits): bf16 is 0.10 from fp64, and one photograph 0.16 from another, which no check can tell
    apart; with a gain of 0.2 these are 0.033 and 0.16.

    A network that torch.fx cannot trace stays as it is, and so do sums of what no norm made.
    """
    try:
        graph = fx.symbolic_trace(model).graph
    except Exception:  # foreign forwards raise what they like under a tracer
        return
    for norm in dict.fromkeys(_last_norms(graph, model)):
        for parameter in (norm.weight, norm.bias):
            if parameter is not None:
                parameter.mul_(gain)


def _last_norms(graph: fx.Graph, model: nn.Module) -> Iterator[_BatchNorm]:
    """Yields for each sum the norm that one of its terms comes from: where both do, as behind a
    projection, that of the longer branch.
    """
    modules = dict(model.named_modules())
    depth: dict[fx.Node, int] = {}
    for node in graph.nodes:
        depth[node] = 1 + max((depth[read] for read in node.all_input_nodes), default=0)
        if node.target not in _SUMS:
            continue
        made = [_without_drops(term) for term in node.args if isinstance(term, fx.Node)]
        norms = [
            term
            for term in made
            if term.op == "call_module" and isinstance(modules[str(term.target)], _BatchNorm)
        ]
        if norms:
            norm = modules[str(max(norms, key=depth.__getitem__).target)]
            assert isinstance(norm, _BatchNorm)
            yield norm


def _without_drops(node: fx.Node) -> fx.Node:
    """Returns what a node computes before whole branches are dropped in training."""
    while getattr(node.target, "__name__", "") == "stochastic_depth":
        (node,) = node.all_input_nodes
    return node


@torch.no_grad()
def calibrate(model: nn.Module, images: Tensor) -> None:
    """Statistics of these images for every batch norm, so that roundings do not grow from layer to
    layer as they do in a network whose activations explode; the model is in eval mode afterwards.

    The images that are compared should be among them. Statistics of a few images, at two pixels a
    side, fit no others: without, activations of torchvision's EfficientNetV2-S grew 400 times, and
    eager's own error was 2e-3 instead of 9e-6.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.train()
        norm.reset_running_stats()
        norm.momentum = None  # the mean over what it sees
    model(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        if norm.running_var is not None:
            norm.running_var.clamp_(min=LEAST_VARIANCE * float(norm.running_var.mean()))
    model.eval()


def is_fresh(model: nn.Module) -> bool:
    """Whether there are batch norms and none has seen an image: statistics 0 and 1."""
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    zeros_and_ones = [(n.running_mean, n.running_var) for n in norms]
    return bool(norms) and not any(
        mean is None or var is None or bool(mean.any()) or bool((var - 1).any())
        for mean, var in zeros_and_ones
    )
