"""Fused models under torch.compile, torch.export and the ONNX exporter."""

import copy
from collections import Counter
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet

from graphs import error
from resfuse.kernels import FusedBottleneck, fuse
from resfuse.resnet_ref import create
from resfuse.resnet_ref.blocks import PreActBottleneck

pytestmark = pytest.mark.slow

BATCHES = (1, 2, 3, 8)


def network(name: str = "resnet18") -> nn.Module:
    torch.manual_seed(0)
    own = {"preact": preact, "short": short}
    model = own[name]() if name in own else create(name, num_classes=10)
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model


def preact() -> nn.Module:
    """Two pre-activation units, one with a projection."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1), PreActBottleneck(16, 8, 2), PreActBottleneck(32, 8),
        nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip


def short() -> nn.Module:
    """A block a stage: torch compiles it in half of ResNet-18's 20 CPU seconds."""
    return ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10)


def images(n: int = 2) -> Tensor:
    return torch.randn(n, 3, 64, 64, generator=torch.Generator().manual_seed(n))


@pytest.mark.parametrize("name", ["short", "preact"])
@torch.no_grad()
def test_compiles_whole(name: str) -> None:
    model = network(name)
    fused = fuse(model)
    torch._dynamo.reset()
    compiled = torch.compile(fused, fullgraph=True)
    assert error(compiled(images()), model(images())) < 1e-5
    for one in (model, fused):  # a compiled graph sees new weights, too
        next(one.parameters()).mul_(2)
    assert error(compiled(images()), model(images())) < 1e-5


@pytest.mark.parametrize("strict", [False, True])
@torch.no_grad()
def test_exports(strict: bool) -> None:
    model = network()
    fused = fuse(model)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(fused, (images(),), dynamic_shapes=({0: batch},), strict=strict)
    for n in BATCHES:
        assert error(program.module()(images(n)), model(images(n))) < 1e-5
    called = Counter(str(node.target) for node in program.graph.nodes)
    assert not any("resfuse" in target or "mkldnn" in target for target in called)
    if not strict:  # dynamo cannot tell whether folded weights are fresh, and takes the layers
        assert called["aten.conv2d.default"] == 20
        assert not any("norm" in target for target in called)


@pytest.mark.parametrize("run_before", [False, True])
@torch.no_grad()
def test_an_export_has_the_weights_of_now(run_before: bool) -> None:
    model = network()
    fused = fuse(model)
    if run_before:
        fused(images())
    for one in (model, fused):
        one.layer1[0].bn1.weight.mul_(3)
    program = torch.export.export(fused, (images(),))
    assert error(program.module()(images()), model(images())) < 1e-5


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "preact"])
@torch.no_grad()
def test_onnx_files_hold_standard_operators_only_and_agree(name: str, tmp_path: Path) -> None:
    model = network(name)
    fused = fuse(model)
    path = tmp_path / "fused.onnx"
    torch.onnx.export(
        fused, (images(),), path, dynamo=True, verbose=False,
        dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
    )  # fmt: skip
    graph = onnx.load(path).graph
    assert {node.domain for node in graph.node} <= {"", "ai.onnx"}
    operators = Counter(node.op_type for node in graph.node)
    assert operators["Conv"] == sum(isinstance(m, nn.Conv2d) for m in model.modules())
    if not name.startswith("preact"):
        assert operators["BatchNormalization"] == 0
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (source,) = session.get_inputs()
    for n in BATCHES:
        (got,) = session.run(None, {source.name: images(n).numpy()})
        assert error(torch.from_numpy(got), model(images(n))) < 1e-5


@torch.no_grad()
def test_a_fused_block_exports_by_itself() -> None:
    torch.manual_seed(0)
    block = FusedBottleneck(16, 4).eval()
    x = torch.randn(1, 16, 8, 8)
    program = torch.export.export(block, (x,))
    assert error(program.module()(x), copy.deepcopy(block)(x)) < 1e-5
