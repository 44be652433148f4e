"""The engine on networks people run: what is captured of each, and that its answers are right."""

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
import torchvision.models as tv
from torch import nn
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d

import zoo
from engine_models import AS_FUSED, images, leaves, made
from graphs import error
from resfuse.kernels import fuse
from resfuse.kernels.cpu.conv_candidates import choose
from resfuse.kernels.engine.frontend.export import capture
from resfuse.kernels.engine.ir.candidate import Candidate
from resfuse.kernels.engine.ir.graph import Conv, Graph, Torch
from resfuse.kernels.engine.runtime.executor import Executor
from resfuse.kernels.engine.tactics.cpu import native, onednn_conv
from resfuse.kernels.ops.tolerance import EAGER_FACTOR, TOLERANCES
from resfuse.resnet_ref import create

pytestmark = pytest.mark.slow

RESNET50 = {"Conv": 54, "MaxPool": 1, "Mean": 1}  # 53 convolutions and the linear layer
ZOO: dict[str, tuple[Callable[[], nn.Module], dict[str, int]]] = {
    "resnet18": (lambda: create("resnet18"), {"Conv": 21, "MaxPool": 1, "Mean": 1}),
    "resnet50": (lambda: create("resnet50"), RESNET50),
    "resnext50_32x4d": (lambda: create("resnext50_32x4d"), RESNET50),
    # of the shortcuts, two halve and pad
    "cifar_resnet20": (lambda: create("cifar_resnet20"), {"Conv": 20, "Mean": 1, "Pick": 2}),
    "vgg19_bn": (
        zoo.vgg19_bn,
        {"Conv": 19, "MaxPool": 5, "aten.adaptive_avg_pool2d.default": 1},  # windows of two sizes
    ),
    # its last norm and activation, and those in front of each 1x1, follow a concatenation
    "densenet121": (
        lambda: tv.densenet121(weights=None),
        {
            "Conv": 121, "MaxPool": 1, "Mean": 1, "Concat": 62, "Affine": 62,
            "AveragePool": 3,
        },
    ),
    "mobilenet_v2": (lambda: tv.mobilenet_v2(weights=None), {"Conv": 53, "Mean": 1}),
    "googlenet": (
        lambda: tv.googlenet(weights=None, init_weights=False),
        {"Conv": 58, "Mean": 1, "Concat": 9, "MaxPool": 13},
    ),
    "timm resnet50d": (
        lambda: timm.create_model("resnet50d"),
        {"Conv": 56, "MaxPool": 1, "Mean": 1, "AveragePool": 3},
    ),
    # 16 gates: a mean, two 1x1, a sigmoid, a product that takes in the sum; a projection adds first
    "timm seresnet50": (
        lambda: timm.create_model("seresnet50"),
        {"Conv": 86, "MaxPool": 1, "Mean": 17, "Affine": 16},
    ),
    "efficientnet_b0": (
        lambda: tv.efficientnet_b0(weights=None),
        {"Conv": 82, "Mean": 17, "Affine": 16},
    ),
    # a unit's shuffle and the next one's split are one pick for each half
    "shufflenet_v2_x1_0": (
        lambda: tv.shufflenet_v2_x1_0(weights=None),
        {"Conv": 57, "MaxPool": 1, "Concat": 16, "Pick": 29, "Mean": 1},
    ),
    "timm resnet18, five outputs": (
        lambda: timm.create_model("resnet18", features_only=True),
        {"Conv": 20, "MaxPool": 1},
    ),
    "Unet ResNet-18": (
        lambda: smp.Unet("resnet18", encoder_weights=None),
        {"Conv": 31, "MaxPool": 1, "Concat": 4, "Pick": 5},
    ),
    "a detector's backbone": (
        lambda: resnet_fpn_backbone(
            backbone_name="resnet50", weights=None, norm_layer=FrozenBatchNorm2d
        ),
        {"Conv": 61, "MaxPool": 2, "Pick": 3},
    ),
    "timm ecaresnet26t": (
        lambda: timm.create_model("ecaresnet26t"),
        {
            "Conv": 32, "MaxPool": 1, "Mean": 9, "AveragePool": 3, "Affine": 8,
            "aten.reshape.default": 16, "aten.conv1d.default": 8, "aten.sigmoid.default": 8,
        },
    ),
    # its pool is behind a padding with zeros, and the answers are a map of one pixel
    "timm resnetv2_50x1_bit": (
        lambda: timm.create_model("resnetv2_50x1_bit"),
        {
            "Conv": 54, "GroupNorm": 49, "MaxPool": 1, "Mean": 1, "Pick": 1,
            "aten.reshape.default": 1,
        },
    ),
    "FCN-R50, a dict": (
        lambda: tv.segmentation.fcn_resnet50(weights=None, weights_backbone=None),
        {"Conv": 55, "MaxPool": 1, "aten.upsample_bilinear2d.vec": 1},
    ),
}  # fmt: skip


# Here roundings grow from layer to layer: eager itself is up to 6e-6 from fp64, BiT 3e-5, and so is
# `fused`.
AMPLIFYING = (
    "resnet50", "vgg19_bn", "Unet ResNet-18", "FCN-R50, a dict", "a detector's backbone",
    "timm resnetv2_50x1_bit",
)  # fmt: skip


def chosen_unmeasured(graph: Graph) -> list[Candidate]:
    """Native steps wherever there are any, of convolutions the ones expected to be fastest."""
    candidates = []
    for at, node in enumerate(graph.nodes):
        offered = [*native.segments(graph, at), *onednn_conv.segments(graph, at)]
        if offered and offered[0].tactic == "native" and isinstance(node.op, Conv):
            config = asdict(choose(node.op.problem))
            candidates.append(Candidate("native", at, at + 1, tuple(config.items())))
        else:
            candidates.append(offered[0] if offered else Candidate("eager", at, at + 1))
    return candidates


# Of batch 1 those that have, between them, every op with a step of ours: capturing takes seconds.
AT_BATCH_1 = ("cifar_resnet20", "mobilenet_v2", "Unet ResNet-18", "timm ecaresnet26t")


@pytest.mark.parametrize(
    ("name", "batch"), [*((name, 3) for name in ZOO), *((name, 1) for name in AT_BATCH_1)]
)
def test_networks_are_captured_whole_and_answer_as_fused(name: str, batch: int) -> None:
    factory, counts = ZOO[name]
    model = made(factory)
    # odd in both directions, where the network takes it
    sizes = (64, 96) if batch == 1 or name == "Unet ResNet-18" else (75, 61)
    x = images(batch, 3, *sizes)
    graph, state = capture(model, x)
    kinds = (n.op.target if isinstance(n.op, Torch) else type(n.op).__name__ for n in graph.nodes)
    assert Counter(kinds) == counts
    executor = Executor(graph, chosen_unmeasured(graph), state)
    got = [y.clone() for y in executor(x)]
    fused = leaves(fuse(model), x)
    nhwc = copy.deepcopy(model).to(memory_format=torch.channels_last)
    eager = leaves(model, x), leaves(nhwc, x.contiguous(memory_format=torch.channels_last))
    exact = leaves(model.double(), x.double())
    for y, own, plain, in_nhwc, want in zip(got, fused, *eager, exact, strict=True):
        assert y.shape == own.shape and y.dtype == own.dtype
        if name not in AMPLIFYING:
            assert error(y, own) <= AS_FUSED
        allowed = EAGER_FACTOR * max(error(plain, want), error(in_nhwc, want))
        assert error(y, want) <= allowed + TOLERANCES["ieee"].rtol
