"""MODELS and create: what holds for every network by name."""

import re

import pytest
import torch
from torch import nn

from resfuse.resnet_ref import MODELS, create, input_size, num_classes

pytestmark = pytest.mark.slow


def weighted_layers(model: nn.Module) -> int:
    """Convolutions and fully connected layers, projections of shortcuts not counted."""
    return sum(
        isinstance(module, nn.Conv2d | nn.Linear) and "downsample" not in name
        for name, module in model.named_modules()
    )


@pytest.mark.parametrize("name", MODELS)
def test_smoke_every_name_has_its_depth_output_and_maps(name):
    model = create(name, device="meta").eval()
    depth = int(re.search(r"\d+", name).group())
    # Wide ResNet's paper counts the convolutions, three projections included: 28 = 25 + 3.
    assert weighted_layers(model) == (depth - 3 + 1 if "wrn" in name else depth)

    side, batch = input_size(name), 2
    images = torch.empty(batch, 3, side, side, device="meta")
    assert model(images).shape == (batch, num_classes(name))

    backbone = create(name, features_only=True, device="meta").eval()
    expected = [1, 2, 4] if side == 32 else [4, 8, 16, 32]
    assert [info["reduction"] for info in backbone.feature_info] == expected
    assert [tuple(m.shape) for m in backbone(images)] == [
        (batch, info["num_chs"], side // info["reduction"], side // info["reduction"])
        for info in backbone.feature_info
    ]
    modules = dict(backbone.named_modules())
    assert all(info["module"] in modules for info in backbone.feature_info)


@pytest.mark.parametrize("name", ["resnet18", "cifar_preact164", "cifar_resnet20"])
@torch.no_grad()
def test_the_last_map_pools_to_the_logits(name):
    # So with one seed a backbone has the weights of the whole network, and the maps are its own.
    whole, backbone = create(name).eval(), create(name, features_only=True).eval()
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    logits = whole.fc(backbone(images)[-1].mean((2, 3)))
    torch.testing.assert_close(logits, whole(images))


def test_num_classes_replaces_the_default():
    assert create("resnet18", num_classes=7, device="meta").fc.out_features == 7
    with pytest.raises(ValueError, match="num_classes is 0; accepted: 1 or more"):
        create("resnet18", num_classes=0)


def test_the_seed_alone_decides_the_weights():
    first, again, other = (create("cifar_resnet20", seed=s).state_dict() for s in (1, 1, 2))
    for key, value in first.items():
        assert torch.equal(value, again[key]), key
    assert not torch.equal(first["conv1.weight"], other["conv1.weight"])


def test_create_leaves_the_callers_generator_alone():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    create("cifar_resnet20")
    assert torch.equal(torch.rand(4), expected)


def test_create_follows_the_default_device():
    with torch.device("meta"):
        assert create("cifar_resnet20").conv1.weight.is_meta
        assert not create("cifar_resnet20", device="cpu").conv1.weight.is_meta


def test_a_new_model_is_one_line(monkeypatch):
    # The factory needs none of our keywords until someone asks for what they do.
    monkeypatch.setitem(MODELS, "tiny", lambda: nn.Conv2d(3, 4, 1))
    assert isinstance(create("tiny"), nn.Conv2d)
    assert (input_size("tiny"), num_classes("tiny")) == (224, 1000)


@pytest.mark.parametrize("ask", [create, input_size, num_classes])
def test_an_unknown_name_lists_the_close_ones_first(ask):
    message = r"unknown model 'resnet_50'; did you mean resnet50, .*\? known: resnet18, "
    with pytest.raises(ValueError, match=message):
        ask("resnet_50")
