"""The CIFAR networks and the blocks: papers' counts, and forward passes written out by hand."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from resfuse.resnet_ref import create
from resfuse.resnet_ref.blocks import (
    BasicBlock,
    Bottleneck,
    PaddedIdentity,
    PlainBlock,
    PreActBasicBlock,
    PreActBottleneck,
)
from resfuse.resnet_ref.cifar import cifar_preact, cifar_resnet, cifar_wrn
from resfuse.resnet_ref.resnet import preact_resnet


def parameters(name: str) -> int:
    return sum(p.numel() for p in create(name, device="meta").parameters())


@pytest.mark.parametrize(
    ("name", "paper_millions", "exact"),
    [
        # He et al. 2015, table 6.
        ("cifar_resnet20", 0.27, 269_722),
        ("cifar_resnet32", 0.46, 464_154),
        ("cifar_resnet44", 0.66, 658_586),
        ("cifar_resnet56", 0.85, 853_018),
        ("cifar_resnet110", 1.7, 1_727_962),
        ("cifar_resnet1202", 19.4, 19_421_274),
        # Without shortcuts nothing changes, for option A has no parameters; same paper, figure 6.
        ("cifar_plain20", 0.27, 269_722),
        ("cifar_plain32", 0.46, 464_154),
        ("cifar_plain44", 0.66, 658_586),
        ("cifar_plain56", 0.85, 853_018),
        ("cifar_plain110", 1.7, 1_727_962),
        # He et al. 2016, table 4. It prints 10.2 for 1001 layers, but the authors' own code
        # (KaimingHe/resnet-1k-layers) builds what this counts, 10.33, batch-norm included; its
        # convolutions and classifier alone are 10.18.
        ("cifar_preact164", 1.7, 1_703_258),
        ("cifar_preact1001", 10.2, 10_327_706),
        # Zagoruyko and Komodakis 2016, table 4; Xie et al. 2016, table 7.
        ("cifar_wrn28_10", 36.5, 36_479_194),
        ("cifar_resnext29_8x64d", 34.4, 34_426_698),
    ],
)
def test_parameters_are_the_papers(name, paper_millions, exact):
    model = create(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == exact
    counted = exact
    if name == "cifar_preact1001":
        counted = sum(
            p.numel() for key, p in model.named_parameters() if p.dim() > 1 or "fc" in key
        )
    decimals = 2 if paper_millions < 1 else 1
    truncated = math.floor(counted / 10 ** (6 - decimals)) / 10**decimals
    assert paper_millions in (round(counted / 1e6, decimals), truncated)


@pytest.mark.parametrize("depth", [20, 32, 44, 56, 110, 1202])
def test_shortcut_options_cost_what_they_should(depth):
    def projection(channels_in: int, channels_out: int) -> int:
        return channels_in * channels_out + 2 * channels_out  # 1x1, and the scale and bias of BN

    n = (depth - 2) // 6
    where_shapes_change = projection(16, 32) + projection(32, 64)
    elsewhere = n * projection(16, 16) + (n - 1) * (projection(32, 32) + projection(64, 64))
    option_a = parameters(f"cifar_resnet{depth}")
    assert parameters(f"cifar_resnet{depth}_b") == option_a + where_shapes_change
    assert parameters(f"cifar_resnet{depth}_c") == option_a + where_shapes_change + elsewhere


def test_option_a_is_a_projection_with_the_identity_as_weights():
    x = torch.randn(2, 5, 7, 7, generator=torch.Generator().manual_seed(0))
    weights = torch.eye(8, 5)[:, :, None, None]
    assert torch.equal(PaddedIdentity(2, extra_channels=3)(x), F.conv2d(x, weights, stride=2))


@torch.no_grad()
def test_plain_block_is_a_residual_block_whose_shortcut_gives_zero():
    torch.manual_seed(0)
    residual, unconnected = BasicBlock(4, 6, 2).eval(), PlainBlock(4, 6, 2).eval()
    residual.downsample[1].weight.zero_()
    unconnected.load_state_dict(
        {k: v for k, v in residual.state_dict().items() if not k.startswith("downsample")}
    )
    x = torch.randn(2, 4, 9, 9)
    assert torch.equal(unconnected(x), residual(x))


def preact_by_hand(state: dict[str, Tensor], x: Tensor, strides_in: int, imagenet: bool) -> Tensor:
    """He et al. 2016 on a state_dict: `strides_in` is the convolution of a block that strides."""

    def norm_relu(x: Tensor, key: str) -> Tensor:
        mean, var = state[f"{key}.running_mean"], state[f"{key}.running_var"]
        return F.batch_norm(x, mean, var, state[f"{key}.weight"], state[f"{key}.bias"]).relu()

    stem = state["conv1.weight"]
    x = F.conv2d(x, stem, stride=2 if imagenet else 1, padding=stem.shape[-1] // 2)
    if imagenet:
        x = F.max_pool2d(x, 3, 2, 1)
    for block in dict.fromkeys(key.rsplit(".", 2)[0] for key in state if ".conv" in key):
        stride = 2 if block.endswith(".0") and not block.startswith("layer1") else 1
        active = branch = norm_relu(x, f"{block}.bn1")
        index = 1
        while (weight := state.get(f"{block}.conv{index}.weight")) is not None:
            if index > 1:
                branch = norm_relu(branch, f"{block}.bn{index}")
            step = stride if index == strides_in else 1
            branch = F.conv2d(branch, weight, stride=step, padding=weight.shape[-1] // 2)
            index += 1
        projection = state.get(f"{block}.downsample.0.weight")
        x = branch + (x if projection is None else F.conv2d(active, projection, stride=stride))
    return F.linear(norm_relu(x, "norm").mean((2, 3)), state["fc.weight"], state["fc.bias"])


@pytest.mark.parametrize(
    ("build", "strides_in", "imagenet"),
    [
        (lambda: cifar_wrn(16, widen=2), 1, False),
        (lambda: cifar_preact(20), 1, False),
        (lambda: preact_resnet(50), 2, True),
    ],
    ids=["wide", "cifar bottleneck", "imagenet bottleneck"],
)
@torch.no_grad()
def test_preactivation_is_the_papers_by_hand(build, strides_in, imagenet):
    torch.manual_seed(0)
    model = build().eval()
    for key, value in model.state_dict().items():
        if key.endswith("running_var"):
            value.uniform_(0.5, 1.5)
        elif value.dim() == 1:
            value.add_(torch.randn_like(value), alpha=0.1)
    images = torch.randn(2, 3, 64, 64)
    by_hand = preact_by_hand(model.state_dict(), images, strides_in, imagenet)
    torch.testing.assert_close(model(images), by_hand, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("build", "channels"),
    [
        (partial(BasicBlock, 3, 4, 2, shortcut="A"), 3),
        (partial(BasicBlock, 3, 4, 2, shortcut="B"), 3),
        (partial(BasicBlock, 4, 4, 1, shortcut="C"), 4),
        (partial(BasicBlock, 4, 4), 4),
        (partial(Bottleneck, 8, 2), 8),
        (partial(Bottleneck, 4, 2, 2, stride_in_1x1=True), 4),
        (partial(Bottleneck, 4, 2, 2, groups=2), 4),
        (partial(PlainBlock, 3, 4, 2), 3),
        (partial(PreActBasicBlock, 4, 4), 4),
        (partial(PreActBasicBlock, 3, 4, 2), 3),
        (partial(PreActBottleneck, 8, 2), 8),
        (partial(PreActBottleneck, 3, 2, 2, stride_in_1x1=True), 3),
    ],
)
def test_gradients_are_right_in_training_mode(build, channels):
    # An addition or ReLU in place on a value the backward pass needs would show here.
    torch.manual_seed(0)
    block = build().double()
    x = torch.randn(2, channels, 5, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(block, (x,), fast_mode=True)


def test_depths_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match=r"depth is 21; accepted: 6n \+ 2, n >= 1"):
        cifar_resnet(21)
    with pytest.raises(ValueError, match=r"depth is 2; accepted: 9n \+ 2, n >= 1"):
        cifar_preact(2)
    with pytest.raises(ValueError, match=r"depth is 20; accepted: 6n \+ 4, n >= 1"):
        cifar_wrn(20, widen=1)
