"""Networks to train fused and unfused, and whether both learn the same."""

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import resnet

from resfuse.kernels.fusion.training.training_plan import training_plan_of


def network(block: Any = resnet.BasicBlock, **options: Any) -> nn.Module:
    return resnet.ResNet(block, [2, 1, 1, 1], num_classes=10, **options).train()


def images(batch: int = 2, size: int = 48) -> Tensor:
    return torch.randn(batch, 3, size, size)


def steps_in(model: nn.Module) -> list[str]:
    plans = [plan for m in model.modules() if (plan := training_plan_of(m)) is not None]
    return [step.chain for plan in plans for step in plan.steps.values()]


def train_step(model: nn.Module, x: Tensor) -> Tensor:
    y = model(x)
    y.float().square().mean().backward()
    return y.detach()


def require_same_training(model: nn.Module, fused: nn.Module, *inputs: Any) -> None:
    """Bit by bit: answers, gradients, buffers, after two steps; what fuse did is at work."""
    assert steps_in(fused), "nothing was fused"
    inputs = inputs or (images(),)
    for _ in range(2):
        a, b = model(*inputs), fused(*inputs)
        assert torch.equal(a, b)
        a.square().mean().backward()
        b.square().mean().backward()
    for (name, p), q in zip(model.named_parameters(), fused.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        assert p.grad is None or torch.equal(p.grad, q.grad), name  # type: ignore[arg-type]
    for (name, p), q in zip(model.named_buffers(), fused.buffers(), strict=True):
        assert torch.equal(p, q), name


class Pair(nn.Module):
    """A convolution, a norm of some kind, an activation of some kind; x is added."""

    def __init__(self, norm: nn.Module, act: nn.Module | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.act = norm, act or nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)) + x)
