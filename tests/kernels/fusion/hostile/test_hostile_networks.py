"""What people do with the networks of timm and torchvision, done to fused and to plain ones."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import densenet121, vgg11_bn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.resnet import BasicBlock, ResNet

from hostile import images, is_fused, require_alike, require_same, spread
from resfuse.kernels import fuse

pytestmark = pytest.mark.slow

PICTURE = (2, 3, 32, 32)


def pair(make: Callable[[], nn.Module]) -> tuple[Any, Any]:
    """A plain network and a fused one with weights of its own, which has run."""
    torch.manual_seed(0)
    plain = spread(make())
    fused = fuse(copy.deepcopy(plain))
    require_alike(plain, fused, images(shape=PICTURE))
    assert is_fused(fused)
    return plain, fused


def resnet() -> nn.Module:
    """ResNet-18 with one block in all stages but the third."""
    return ResNet(BasicBlock, [1, 1, 2, 1], num_classes=4)


@pytest.fixture(scope="module")
def resnets() -> tuple[Any, Any]:
    """A pair that no test changes."""
    return pair(resnet)


@pytest.mark.parametrize("first", range(1, 9))
def test_children_made_into_a_sequence(first: int, resnets: tuple[Any, Any]) -> None:
    plain, fused = resnets
    wanted = nn.Sequential(*list(plain.children())[:first])
    cut = nn.Sequential(*list(fused.children())[:first])
    require_alike(wanted, cut, images(shape=PICTURE))
    require_alike(wanted, fuse(cut.eval()), images(shape=PICTURE))


def test_layers_of_a_sequence_called_one_by_one() -> None:
    plain, fused = pair(lambda: vgg11_bn(num_classes=4))
    x = y = images(shape=PICTURE)
    for cut in (1, 2, 3, 7, 14):
        require_alike(plain.features[:cut], fused.features[:cut], images(shape=PICTURE))
    with torch.no_grad():
        for layer, own in zip(plain.features, fused.features, strict=True):
            x, y = layer(x), own(y)
            require_same(y, x)
            assert y.stride() == x.stride()


@pytest.mark.parametrize("make", [vgg11_bn, densenet121])
def test_features_are_viewed(make: Callable[[], nn.Module]) -> None:
    plain, fused = pair(make)
    x = images(shape=(2, 3, 64, 64))
    with torch.no_grad():
        require_same(fused.features(x).view(2, -1), plain.features(x).view(2, -1))


def test_activations_read_by_hooks() -> None:
    read: list[list[Tensor]] = []
    for model in pair(lambda: vgg11_bn(num_classes=4)):
        own: list[Tensor] = []
        hooks = [
            layer.register_forward_hook(lambda m, i, o, to=own: to.append(o.clone()))
            for layer in model.features if isinstance(layer, nn.ReLU)
        ]  # fmt: skip
        with torch.no_grad():
            model(images(shape=PICTURE))
        for hook in hooks:
            hook.remove()
        read.append(own)
    assert len(read[0]) == 8
    require_same(read[1], read[0])


def test_gradients_of_an_activation(resnets: tuple[Any, Any]) -> None:
    """Grad-CAM."""
    found = []
    for model in resnets:
        kept: list[Tensor] = []
        hook = model.layer4[-1].register_forward_hook(lambda m, i, o, to=kept: to.append(o))
        (gradient,) = torch.autograd.grad(model(images(shape=PICTURE))[:, 3].sum(), kept)
        hook.remove()
        found.append(gradient)
    require_same(found[1], found[0])


def test_intermediate_layers_are_got(resnets: tuple[Any, Any]) -> None:
    plain, fused = resnets
    layers = {"layer1": "a", "layer3": "b"}
    require_alike(
        IntermediateLayerGetter(plain, layers), IntermediateLayerGetter(fused, layers),
        images(shape=PICTURE),
    )  # fmt: skip


class Adapted(nn.Module):
    """LoRA: a convolution and a small one beside it."""

    def __init__(self, base: nn.Conv2d) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Conv2d(base.in_channels, 2, 3, base.stride, 1, bias=False)
        self.up = nn.Conv2d(2, base.out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def _adapt(model: Any) -> None:
    torch.manual_seed(4)
    for block in (model.layer1[0], model.layer3[1]):
        block.conv2 = Adapted(block.conv2)


def _new_stem(model: Any) -> None:
    torch.manual_seed(4)
    model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    model.fc = nn.Linear(512, 3)


def _fold_the_stem(model: Any) -> None:
    model.conv1 = nn.utils.fusion.fuse_conv_bn_eval(model.conv1, model.bn1)
    model.bn1 = nn.Identity()


def _drop_a_stage(model: Any) -> None:
    model.layer4, model.fc = nn.Identity(), nn.Flatten()


def _dilate(model: Any) -> None:
    for module in model.layer4.modules():
        if isinstance(module, nn.Conv2d):
            module.stride = (1, 1)
            if module.kernel_size == (3, 3):
                module.dilation = module.padding = (2, 2)


def _synchronize(model: Any) -> None:
    nn.SyncBatchNorm.convert_sync_batchnorm(model)


def _train_with_frozen_norms(model: Any) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, fused=True)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    for _ in range(3):
        optimizer.zero_grad()
        model(images(shape=PICTURE)).square().mean().backward()
        optimizer.step()
    model.eval()


OPERATIONS = [
    _adapt, _new_stem, _fold_the_stem, _drop_a_stage, _dilate, _synchronize,
    _train_with_frozen_norms,
]  # fmt: skip


@pytest.mark.parametrize("change", OPERATIONS, ids=lambda change: change.__name__)
def test_surgery(change: Callable[[Any], None]) -> None:
    plain, fused = pair(resnet)
    for model in (plain, fused):
        change(model)
    require_alike(plain, fused, images(shape=PICTURE))
    require_alike(plain, fuse(fused), images(shape=PICTURE))


@pytest.mark.parametrize("name", ["resnet18", "regnetx_002", "efficientnet_b0"])
def test_features_of_timms_networks(name: str) -> None:
    timm = pytest.importorskip("timm")
    plain, fused = pair(lambda: timm.create_model(name, features_only=True))
    require_alike(plain, fused, images(shape=(1, 3, 64, 48)))


def test_parts_of_timms_networks() -> None:
    timm = pytest.importorskip("timm")
    plain, fused = pair(lambda: timm.create_model("resnet18", num_classes=0, output_stride=16))
    x = images(shape=PICTURE)
    with torch.no_grad():
        require_same(fused.forward_features(x), plain.forward_features(x))
        require_same(fused.forward_intermediates(x), plain.forward_intermediates(x))
    for model in (plain, fused):
        torch.manual_seed(3)
        model.reset_classifier(7)
        model.set_grad_checkpointing(True)
    require_alike(plain, fused, x)


def branched(name: str) -> nn.Module:
    """The first two blocks of each stage of one of timm's networks."""
    import timm

    if name == "fastvit_t8":
        return timm.create_model(name, num_classes=4, layers=(2, 1, 1, 1))
    whole = timm.models.byobnet.model_cfgs[name]
    stages = [stage if isinstance(stage, list) else [stage] for stage in whole.blocks]
    short = [[replace(block, d=min(block.d, 2)) for block in stage[:2]] for stage in stages]
    return timm.models.byobnet.ByobNet(replace(whole, blocks=short), num_classes=4)


@pytest.mark.parametrize("name", ["mobileone_s0", "repvgg_a0", "fastvit_t8"])
def test_branches_are_merged_after_fuse(name: str) -> None:
    timm = pytest.importorskip("timm")
    plain, fused = pair(lambda: branched(name))
    merged = timm.utils.model.reparameterize_model(plain)
    require_alike(merged, fuse(merged), images(shape=PICTURE))
    require_alike(merged, timm.utils.model.reparameterize_model(fused), images(shape=PICTURE))
