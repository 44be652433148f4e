"""fuse on the networks people run: how much of each is fused, and that its answers stay."""

import copy
import re
from collections.abc import Callable, Sequence

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
import torchvision.models as tv
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import zoo
from graphs import error
from resfuse.kernels import explain, fuse
from resfuse.kernels.ops.tolerance import EAGER_FACTOR, TOLERANCES
from resfuse.resnet_ref import MODELS, create

pytestmark = pytest.mark.slow

Factory = Callable[[], nn.Module]

# Odd in both directions, batch 1 and 3. None where a map of width 2 meets a 3x3 with stride 2:
# there torch 2.14.1's own convolution in bf16 and fp16 reads uninitialised memory (oneDNN 3.12).
SIZES = [(1, 3, 97, 131), (3, 3, 75, 70)]
FULL_SIZES = [(1, 3, 224, 224), (3, 3, 225, 225), (1, 3, 197, 301)]


def torchvision_model(name: str, **options: object) -> Factory:
    return lambda: getattr(tv, name)(weights=None, **options)


def timm_model(name: str) -> Factory:
    return lambda: timm.create_model(name, pretrained=False)


def detection_backbone(name: str) -> Factory:
    """Its batch norms are FrozenBatchNorm2d only with pretrained weights; we have none."""

    def make() -> nn.Module:
        backbone = getattr(tv.detection, name)(weights=None, weights_backbone=None).backbone
        freeze(backbone)
        return backbone

    return make


def freeze(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, torch_frozen(child))
        else:
            freeze(child)


def torch_frozen(bn: nn.BatchNorm2d) -> nn.Module:
    from torchvision.ops import FrozenBatchNorm2d

    return FrozenBatchNorm2d(bn.num_features, eps=bn.eps)


NETWORKS: dict[str, Factory] = {
    **{
        f"torchvision {name}": torchvision_model(name)
        for name in (
            "resnet18",
            "resnet34",
            "resnet50",
            "resnet152",
            "resnext50_32x4d",
            "wide_resnet50_2",
            "densenet121",
            "efficientnet_b0",
            "mobilenet_v3_large",
        )
    },
    "torchvision vgg19_bn": zoo.vgg19_bn,
    "torchvision googlenet": torchvision_model("googlenet", init_weights=False),
    **{
        f"timm {name}": timm_model(name)
        for name in (
            "resnet50d",
            "resnet26t",
            "seresnet50",
            "ecaresnet50t",
            "resnetv2_50",
            "resnetblur50",
            "resnest50d",
            "skresnet50",
            "regnety_016",
        )
    },
    "Faster R-CNN R50-FPN": detection_backbone("fasterrcnn_resnet50_fpn"),
    "RetinaNet": detection_backbone("retinanet_resnet50_fpn"),
    "DeepLabV3-R50": lambda: tv.segmentation.deeplabv3_resnet50(
        weights=None, weights_backbone=None
    ),
    "FCN-R50": lambda: tv.segmentation.fcn_resnet50(weights=None, weights_backbone=None),
    "Unet ResNet-34": lambda: smp.Unet("resnet34", encoder_weights=None),
    "FPN ResNet-34": lambda: smp.FPN("resnet34", encoder_weights=None),
    "ArcFace IResNet": zoo.IResNet,
    "Darknet-53 stages": zoo.Darknet,
    "YOLO C2f": zoo.C2f,
}
# It takes lists and adds to them: two lone convolutions, which nothing could be fused with anyway.
LEFT = {"RetinaNet": {"fpn.extra_blocks"}}
SIDES_OF_32 = ("Unet ResNet-34", "FPN ResNet-34")  # they refuse other sizes
# Their answers are those of ResNet-50 and DeepLabV3: the same blocks, more of them or wider.
BIG = ("torchvision resnet152", "torchvision wide_resnet50_2", "FCN-R50")


def made(factory: Factory) -> nn.Module:
    """A network whose batch norms are not the identity, in eval mode."""
    torch.manual_seed(0)
    model = factory().eval()
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        mean, var = getattr(module, "running_mean", None), getattr(module, "running_var", None)
        if mean is not None and var is not None:
            mean.normal_(std=0.1, generator=generator)
            var.uniform_(0.8, 1.25, generator=generator)
    return model


def answers(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return [leaf for leaf in tree_leaves(model(x)) if isinstance(leaf, Tensor)]


def require_same(model: nn.Module, fused: nn.Module, inputs: Sequence[Tensor], mode: str) -> None:
    """Within twice eager's error in the worse of both memory formats: we compute in channels_last,
    where torch sums in another order (Unet, fp32: 1.9e-6 in NCHW, 3.9e-6 in NHWC, fused 5.4e-6)."""
    nhwc = copy.deepcopy(model).to(memory_format=torch.channels_last)
    in_both = [
        (answers(model, x), answers(nhwc, x.to(memory_format=torch.channels_last))) for x in inputs
    ]
    exact = nhwc.double()
    for x, eager in zip(inputs, in_both, strict=True):
        reference = answers(exact, x.double())
        for plain, in_nhwc, got, want in zip(*eager, answers(fused, x), reference, strict=True):
            assert got.shape == plain.shape and got.dtype == plain.dtype
            allowed = EAGER_FACTOR * max(error(plain, want), error(in_nhwc, want))
            assert error(got, want) <= allowed + TOLERANCES[mode].rtol


@pytest.mark.parametrize("name", NETWORKS)
def test_everything_with_a_convolution_is_fused_and_answers_stay(name: str) -> None:
    model = made(NETWORKS[name])
    fused = fuse(model)
    said = explain(fused, torch.zeros(1, 3, 64, 64))
    assert said.share is not None and said.share >= 0.99, f"{said}"
    assert {line.name.rpartition(".")[0] for line in said.left()} == LEFT.get(name, set())
    if name in BIG:
        return
    shapes = [(1, 3, 96, 160)] if name in SIDES_OF_32 else SIZES
    # Torch's bfloat16 takes minutes where processors have none; several images are below.
    for dtype, mode, some in (
        (torch.float32, "ieee", shapes), (torch.bfloat16, "bf16", shapes[:1])
    ):  # fmt: skip
        model, fused = model.to(dtype), fused.to(dtype)
        inputs = [torch.randn(s, generator=torch.Generator().manual_seed(1)) for s in some]
        require_same(model, fused, [x.to(dtype) for x in inputs], mode)


@pytest.mark.parametrize("dtype, mode", [(torch.float32, "ieee"), (torch.bfloat16, "bf16")])
def test_answers_stay_at_full_size(dtype: torch.dtype, mode: str) -> None:
    model = made(NETWORKS["torchvision resnet50"]).to(dtype)
    require_same(model, fuse(model), [torch.randn(s).to(dtype) for s in FULL_SIZES], mode)


# CIFAR's networks repeat the blocks of their smallest one: of those between 20 and 110 layers
# there is nothing else to fuse, and cifar_resnet1202 stands for the depth.
DEEP_TWINS = ("cifar_resnet1202_b", "cifar_resnet1202_c", "cifar_preact1001")
BETWEEN = re.compile(r"cifar_\w+?(32|44|56)(_[bc])?$")


@pytest.mark.parametrize(
    "name", [name for name in MODELS if name not in DEEP_TWINS and not BETWEEN.match(name)]
)
def test_our_own_models_are_fused_whole(name: str) -> None:
    model = create(name).eval()
    said = explain(fuse(model, inplace=True), torch.zeros(1, 3, 32, 32))
    assert said.share is not None and said.share >= 0.99
    norms = [n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    folded = sum("bn" in line.how for line in said.lines)
    inside = sum(
        line.how == "projection inside" and _has_norm(model, line.name) for line in said.lines
    )
    assert folded + inside + len(said.norms) == len(norms)  # no batch norm is left by itself


def _has_norm(model: nn.Module, conv: str) -> bool:
    sequence = model.get_submodule(conv.rpartition(".")[0])
    return any(isinstance(layer, nn.BatchNorm2d) for layer in sequence.children())


@pytest.mark.parametrize(
    "name", ["resnet50", "preact_resnet200", "cifar_resnet20", "resnext50_32x4d"]
)
def test_our_own_answers_stay(name: str) -> None:
    model = made(lambda: create(name))
    require_same(model, fuse(model), [torch.randn(2, 3, 64, 64)], "ieee")


def test_frozen_backbones_really_are_frozen() -> None:
    names = {type(m).__name__ for m in NETWORKS["RetinaNet"]().modules()}
    assert "FrozenBatchNorm2d" in names and "BatchNorm2d" not in names
