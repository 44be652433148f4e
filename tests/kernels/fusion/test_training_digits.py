"""ResNet-20 learns scikit-learn's handwritten digits, fused and not, from the same seeds."""

import copy
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from resfuse.kernels import fuse, unfuse
from resfuse.kernels.fusion.training.training_mode import operations_anywhere
from resfuse.resnet_ref import create

pytestmark = pytest.mark.slow

EPOCHS = 3


@cache
def digits() -> tuple[Tensor, Tensor]:
    """1,797 images [N, 3, 8, 8] of grey levels from 0 to 1, and what they show."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    return images.expand(-1, 3, -1, -1).contiguous(), torch.tensor(data.target)


def train(
    model: nn.Module, seed: int, batch_size: int = 64, most: int = 1000
) -> tuple[Tensor, float]:
    """Loss of every step, and the accuracy on the last 297 images, which it has not seen.

    Args:
        most: steps, after which there is no accuracy.
    """
    images, labels = digits()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)
    falling = torch.optim.lr_scheduler.PolynomialLR(optimizer, EPOCHS * -(-1500 // batch_size))
    generator = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    model.train()
    for _ in range(EPOCHS):
        for batch in torch.randperm(1500, generator=generator).split(batch_size):
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            falling.step()
            losses.append(float(loss.detach()))
            if len(losses) == most:
                return torch.tensor(losses), 0.0
    model.eval()
    with torch.no_grad():
        right = model(images[1500:]).argmax(1) == labels[1500:]
    return torch.tensor(losses), float(right.float().mean())


def resnet20(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return create("cifar_resnet20")


def test_fused_training_follows_the_same_curve() -> None:
    """Closer than another seed does by far: on a CPU the numbers are torch's own."""
    plain, accuracy = train(resnet20(0), 0)
    fused_model = fuse(resnet20(0), training=True)
    fused, fused_accuracy = train(fused_model, 0)
    other, _ = train(resnet20(1), 1)
    spread = (plain - other).abs().mean()
    assert (plain - fused).abs().mean() < 0.01 * spread
    assert accuracy > 0.8 and abs(fused_accuracy - accuracy) < 0.01
    assert plain[-3:].mean() < 0.5 * plain[:3].mean()
    # What was trained fused is a network like any other.
    images, labels = digits()
    with torch.no_grad():
        right = unfuse(fused_model)(images[1500:]).argmax(1) == labels[1500:]
    assert abs(float(right.float().mean()) - fused_accuracy) < 0.01


def test_kernels_follow_the_same_curve() -> None:
    """The first steps of a narrow network on our kernels, interpreted where there is no GPU."""
    torch.manual_seed(0)
    narrow = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    )  # fmt: skip
    fused = fuse(copy.deepcopy(narrow), training=True)
    torch.manual_seed(1)
    another = copy.deepcopy(narrow)
    nn.init.kaiming_normal_(another[0].weight)
    with operations_anywhere():
        curves = [train(model, 0, 16, 5)[0] for model in (narrow, fused, another)]
    assert curves[0][-1] < curves[0][0]
    assert (curves[0] - curves[1]).abs().max() < 1e-4
    assert (curves[0] - curves[2]).abs().max() > 1e-2
