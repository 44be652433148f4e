"""The ImageNet networks against torchvision, timm and the papers' numbers."""

import math

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from resfuse.resnet_ref import MODELS, create, input_size
from resfuse.resnet_ref.resnet import plain, preact_resnet, resnet

pytestmark = pytest.mark.slow

IN_TORCHVISION = [
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
    "vgg19",
    "vgg19_bn",
]


def parameters(name: str) -> int:
    return sum(p.numel() for p in create(name, device="meta").parameters())


def gmacs(name: str) -> float:
    model = create(name, device="meta").eval()
    side = input_size(name)
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, side, side, device="meta"))
    return counter.get_total_flops() / 2e9


def theirs_with_random_weights(name: str) -> nn.Module:
    """torchvision's network with statistics and biases that a forward pass cannot ignore.

    Filled by hand because torchvision's own initialisation takes seconds for the large ones.
    """
    with torch.device("meta"):
        model = torchvision.models.get_model(name, weights=None)
    model.to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(0)
    for key, value in model.state_dict().items():
        if value.dim() > 1:
            fan_in = value[0].numel()
            value.normal_(0, math.sqrt(2 / fan_in), generator=generator)
        elif key.endswith(("running_var", "weight")):
            value.uniform_(0.5, 1.5, generator=generator)
        elif value.is_floating_point():
            value.normal_(0, 0.1, generator=generator)
    return model


def random_images(side: int) -> Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize("name", IN_TORCHVISION)
@torch.no_grad()
def test_is_torchvisions_network(name):
    theirs = theirs_with_random_weights(name)
    ours = create(name, device="meta").eval()
    # assign: the large networks share their memory instead of being copied.
    ours.load_state_dict(theirs.state_dict(), strict=True, assign=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    # 64 pixels leave 2x2 in the last stage: enough that a wrong stride or padding shows.
    images = random_images(64)
    assert relative_error(ours(images), theirs(images)) <= 1e-5


@pytest.mark.parametrize("name", IN_TORCHVISION)
def test_counts_are_those_torchvision_publishes(name):
    published = torchvision.models.get_model_weights(name).DEFAULT.meta
    assert parameters(name) == published["num_params"]
    # Published with three decimals ("GFLOPS", meaning multiply-adds).
    assert gmacs(name) == pytest.approx(published["_ops"], abs=6e-4)


@pytest.mark.parametrize("name", ["resnet18", "resnext50_32x4d"])
def test_a_seed_draws_torchvisions_weights(name):
    torch.manual_seed(7)
    theirs = torchvision.models.get_model(name, weights=None).state_dict()
    for key, value in create(name, seed=7).state_dict().items():
        assert torch.equal(value, theirs[key]), key


def test_a_seed_draws_torchvisions_vgg():
    torch.manual_seed(7)
    theirs = torchvision.models.vgg19().state_dict()
    ours = create("vgg19", seed=7).state_dict()
    # The last layer is drawn after all others, so the first and it cover those between.
    for key in ("features.0.weight", "classifier.6.weight", "classifier.6.bias"):
        assert torch.equal(ours[key], theirs[key]), key


@pytest.mark.parametrize(
    ("name", "paper", "exact"),
    [
        # He et al. 2015, table 1, "FLOPs" in multiply-adds; it truncates 3.664 and 3.858 to 3.6
        # and 3.8, and has rounded the rest.
        ("resnet18_v1", 1.8, 1.814),
        ("resnet34_v1", 3.6, 3.664),
        ("resnet50_v1", 3.8, 3.858),
        ("resnet101_v1", 7.6, 7.570),
        ("resnet152_v1", 11.3, 11.282),
        # The same paper, figure 3: VGG-19 19.6, 34-layer plain and residual (option A) 3.6.
        ("vgg19", 19.6, 19.632),
        ("plain34", 3.6, 3.644),
        ("resnet34_a", 3.6, 3.644),
        ("plain18", 1.8, 1.795),
    ],
)
def test_gmacs_are_the_papers(name, paper, exact):
    counted = gmacs(name)
    assert counted == pytest.approx(exact, abs=6e-4)
    assert paper in (round(counted, 1), math.floor(counted * 10) / 10)


@pytest.mark.parametrize("depth", [50, 101])
@torch.no_grad()
def test_v1_is_torchvisions_with_the_stride_moved(depth):
    theirs = theirs_with_random_weights(f"resnet{depth}")
    for block in theirs.modules():
        if isinstance(block, torchvision.models.resnet.Bottleneck):
            block.conv1.stride, block.conv2.stride = block.conv2.stride, (1, 1)
    ours = create(f"resnet{depth}_v1", device="meta").eval()
    ours.load_state_dict(theirs.state_dict(), assign=True)
    images = random_images(64)
    assert relative_error(ours(images), theirs(images)) <= 1e-5


@pytest.mark.parametrize(("depth", "blocks"), [(18, (2, 2, 2, 2)), (34, (3, 4, 6, 3))])
def test_shortcut_options_cost_what_they_should(depth, blocks):
    def projection(channels_in: int, channels_out: int) -> int:
        return channels_in * channels_out + 2 * channels_out  # 1x1, and the scale and bias of BN

    where_shapes_change = projection(64, 128) + projection(128, 256) + projection(256, 512)
    elsewhere = (blocks[0]) * projection(64, 64)
    for count, width in zip(blocks[1:], (128, 256, 512), strict=True):
        elsewhere += (count - 1) * projection(width, width)

    option_a = parameters(f"resnet{depth}_a")
    assert option_a == parameters(f"plain{depth}")
    assert parameters(f"resnet{depth}") == option_a + where_shapes_change
    assert parameters(f"resnet{depth}_c") == option_a + where_shapes_change + elsewhere


def test_preact200_is_resnet152_with_16_more_blocks_at_28_pixels():
    # He et al. 2016, section 5. The paper prints no parameter count for it; this is the exact one.
    deeper, shallower = (
        create("preact_resnet200", device="meta"),
        create("resnet152", device="meta"),
    )
    for stage, more in (("layer1", 0), ("layer2", 16), ("layer3", 0), ("layer4", 0)):
        assert len(getattr(deeper, stage)) == len(getattr(shallower, stage)) + more
    assert deeper.feature_info[1]["reduction"] == 224 // 28
    assert parameters("preact_resnet200") == 64_666_152
    assert gmacs("preact_resnet200") == pytest.approx(15.007, abs=6e-4)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d", "vgg19_bn"])
@torch.no_grad()
def test_feature_maps_are_timms(name):
    last_four = (2, 3, 4, 5) if name.startswith("vgg") else (1, 2, 3, 4)
    with torch.device("meta"):
        theirs = timm.create_model(name, features_only=True, out_indices=last_four)
    ours = create(name, features_only=True).eval()
    assert [info["num_chs"] for info in ours.feature_info] == theirs.feature_info.channels()
    assert [info["reduction"] for info in ours.feature_info] == theirs.feature_info.reduction()
    # timm flattens VGG's "features.8" into "features_8".
    state = {key.replace("features.", "features_"): v for key, v in ours.state_dict().items()}
    theirs.load_state_dict(state, assign=True)
    images = random_images(64)
    for mine, other in zip(ours(images), theirs.eval()(images), strict=True):
        assert relative_error(mine, other) <= 1e-5


def test_wrong_depths_are_refused():
    with pytest.raises(ValueError, match="depth is 51; accepted: 18, 34, 50, 101, 152, 200"):
        resnet(51)
    with pytest.raises(ValueError, match="depth is 50; accepted: 18, 34"):
        plain(50)
    with pytest.raises(ValueError, match="depth is 18; accepted: 50"):
        preact_resnet(18)
    with pytest.raises(ValueError, match="need depth >= 50, not 18"):
        resnet(18, groups=32)
    with pytest.raises(ValueError, match="shortcut is 'D'; accepted: 'A', 'B', 'C'"):
        resnet(18, shortcut="D")  # type: ignore[arg-type]


def test_every_torchvision_name_in_the_registry_is_compared():
    assert sorted(IN_TORCHVISION) == sorted(set(MODELS) & set(torchvision.models.list_models()))
