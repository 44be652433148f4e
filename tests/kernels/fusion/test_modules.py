"""The blocks to build networks from."""

import pytest
import torch
from torch import nn
from torchvision.models import resnet

from resfuse.kernels import FusedBasicBlock, FusedBottleneck, FusedConvBNAct, explain, unfuse
from resfuse.kernels.fusion.planning.plan import plan_of
from resfuse.kernels.ops.activation import ACTIVATIONS


@pytest.mark.parametrize(
    "ours, theirs, options",
    [
        (FusedBasicBlock, resnet.BasicBlock, {}),
        (FusedBottleneck, resnet.Bottleneck, {}),
        (FusedBottleneck, resnet.Bottleneck, {"groups": 32, "width_per_group": 4}),
        (FusedBottleneck, resnet.Bottleneck, {"width_per_group": 128}),
        (FusedBottleneck, resnet.Bottleneck,
         {"replace_stride_with_dilation": [False, True, True]}),
    ],
)  # fmt: skip
def test_networks_of_our_blocks_are_torchvisions(ours, theirs, options) -> None:
    torch.manual_seed(0)
    plain = resnet.ResNet(theirs, [1, 1, 1, 1], num_classes=10, **options).eval()
    fused = resnet.ResNet(ours, [1, 1, 1, 1], num_classes=10, **options)
    fused.load_state_dict(plain.state_dict(), strict=True)
    plain.load_state_dict(fused.state_dict(), strict=True)
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        want, got = plain(x), fused.eval()(x)
    assert plan_of(fused.layer1[0]) is not None
    assert float((got - want).norm() / want.norm()) < 1e-5
    assert torch.equal(fused.train()(x), plain.train()(x))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("with_residual", [False, True])
def test_conv_bn_act(activation: str, with_residual: bool) -> None:
    torch.manual_seed(0)
    block = FusedConvBNAct(6, 8, 3, stride=1, activation=activation)
    nn.init.normal_(block.bn.running_mean)
    x, residual = torch.randn(2, 6, 9, 7), torch.randn(2, 8, 9, 7)
    inputs = (x, residual) if with_residual else (x,)
    with torch.inference_mode():
        got = block.eval()(*inputs)
        want = unfuse(block)(*inputs)
    assert float((got - want).abs().max()) < 1e-5
    assert list(block.state_dict())[:3] == ["conv.weight", "bn.weight", "bn.bias"]


def test_a_residual_is_fused_and_said() -> None:
    block = FusedConvBNAct(8, 8).eval()
    x = torch.randn(1, 8, 5, 5)
    assert explain(block, (x, x)).lines[0].how == "conv + bn + add + relu"


def test_a_subclass_with_more_layers_fuses_when_it_is_whole() -> None:
    class WithGate(FusedBottleneck):
        def __init__(self) -> None:
            super().__init__(16, 4)
            self.gate = nn.Conv2d(16, 16, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * self.gate(x).sigmoid()

    block = WithGate().eval()
    x = torch.randn(1, 16, 5, 5)
    with torch.inference_mode():
        got = block(x)
        want = unfuse(block)(x)
    assert float((got - want).abs().max()) < 1e-5


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: FusedConvBNAct(3, 8, activation="mish"), "argument activation: 'mish'; accepted"),
        (lambda: FusedBasicBlock(8, 8, groups=2), "argument groups: 2; accepted: 1"),
        (lambda: FusedBasicBlock(8, 8, dilation=2), "argument dilation: 2; accepted: 1"),
    ],
)
def test_bad_arguments(make, message: str) -> None:
    with pytest.raises(ValueError, match="accepted") as refusal:
        make()
    assert message in str(refusal.value)
