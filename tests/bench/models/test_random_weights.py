"""Other people's networks with random weights: which are taken for such, and what they get."""

from pathlib import Path

import pytest
import torch
from torch import nn

from resfuse.bench.measuring import network
from resfuse.bench.models import random_weights
from resfuse.bench.models.model_builder import build, describe
from resfuse.bench.records.case import Case
from resfuse.bench.records.convolutions import convolutions
from resfuse.bench.studies.models import networks

NETS = """
from torch import nn


def fresh():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())


def trained():
    model = fresh()
    nn.init.constant_(model[1].running_mean, 0.25)
    return model
"""


def case_of(model: str, **more: object) -> Case:
    of = describe(model, asked=(3, 32, 32))
    made = Case(of.name, "eager", "inference", "cpu", "float32", "contiguous", 2, 32)
    return Case(**{**vars(made), "weights": of.weights, **more})


def test_a_network_is_fresh_until_a_norm_has_seen_an_image() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    assert random_weights.is_fresh(model)
    model(torch.randn(2, 3, 8, 8))
    assert not random_weights.is_fresh(model)
    assert not random_weights.is_fresh(nn.Conv2d(3, 4, 3))  # nothing tells


def test_a_function_s_trained_weights_are_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("nets.py").write_text(NETS)
    trained = network.master(case_of("./nets.py:trained"), 0)
    assert torch.equal(trained.get_buffer("1.running_mean"), torch.full((4,), 0.25))
    fresh = network.master(case_of("./nets.py:fresh"), 0)
    assert float(fresh.get_buffer("1.running_mean").abs().min()) > 0
    assert isinstance(fresh[1], nn.BatchNorm2d)
    assert fresh[1].momentum == 0.1


def test_seeded_weights_of_a_library_are_the_same_in_every_batch_size() -> None:
    small, large = (
        network.master(case_of("timm:resnet10t", batch_size=size), 3) for size in (1, 12)
    )
    for name, value in small.state_dict().items():
        assert torch.equal(value, large.state_dict()[name]), name
    last = "layer1.0.bn2.weight"  # timm starts with zeros there, which hide the branch
    assert not build("timm:resnet10t").state_dict()[last].any()
    assert bool(small.state_dict()[last].all())


def test_the_convolutions_of_a_library_s_resnet_are_those_of_ours() -> None:
    ours = convolutions(case_of("resnet18", batch_size=4))
    theirs = convolutions(case_of("torchvision:resnet18", batch_size=4))
    assert [(c.layer, c.count, c.problem) for c in theirs] == [
        (c.layer, c.count, c.problem) for c in ours
    ]
    assert sum(c.count for c in ours) == 20
    grouped = convolutions(case_of("timm:tf_mobilenetv3_small_minimal_100"))
    assert any(c.problem.groups > 1 and c.problem.padding == (0, 0) for c in grouped)  # F.pad's


def test_studies_take_networks_from_anywhere() -> None:
    found = networks.choose(["timm rep*_a0", "timm:resnet10*t", "resnet18"], ["resnet18"], "list")
    assert found == ["resnet18", "timm repvgg_a0", "timm:resnet10t"]
    assert networks.model_of("timm repvgg_a0") == "timm:repvgg_a0"
    assert networks.model_of("timm:resnet10t") == "timm:resnet10t"
