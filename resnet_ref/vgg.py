"""VGG-19 (Simonyan and Zisserman 2014, arXiv:1409.1556), the network He et al. compare with."""

import torch
from torch import Tensor, nn

# Convolutions of each stage, and their channels: configuration E of the paper's table 1.
STAGES = ((2, 64), (2, 128), (4, 256), (4, 512), (4, 512))


class VGG(nn.Module):
    """Sixteen 3x3 convolutions in five stages, each ended by 2x2 pooling, and three large layers.

    [N, 3, H, W] -> [N, num_classes], or with `features_only` the list of the maps at strides 4, 8,
    16 and 32, each the last of its size, as `feature_info` lists them (timm's keys and maps).
    Layout, names and initialisation are torchvision's, draw for draw.

    Args:
        batch_norm: a batch-norm after each convolution, as torchvision's vgg19_bn; the paper has
            none.
        num_classes: outputs of the last layer.
        features_only: return the maps and have no classifier.
    """

    def __init__(
        self, batch_norm: bool = False, num_classes: int = 1000, features_only: bool = False
    ) -> None:
        super().__init__()
        self.features_only = features_only
        self.feature_info: list[dict[str, int | str]] = []

        layers: list[nn.Module] = []
        channels, reduction = 3, 1
        for count, width in STAGES:
            for _ in range(count):
                layers.append(nn.Conv2d(channels, width, 3, padding=1))
                if batch_norm:
                    layers.append(nn.BatchNorm2d(width))
                layers.append(nn.ReLU(inplace=True))
                channels = width
            self._note_map(channels, reduction, len(layers) - 1)
            layers.append(nn.MaxPool2d(2, 2))
            reduction *= 2
        self._note_map(channels, reduction, len(layers) - 1)

        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(7)
        self.classifier = nn.Sequential(
            nn.Linear(512 * 7 * 7, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(0.5),
            nn.Linear(4096, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(0.5),
            nn.Linear(4096, num_classes),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                assert module.bias is not None
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0, 0.01)
                nn.init.zeros_(module.bias)
        if features_only:
            del self.avgpool, self.classifier

    def _note_map(self, channels: int, reduction: int, index: int) -> None:
        if reduction >= 4:
            self.feature_info.append(
                {"num_chs": channels, "reduction": reduction, "module": f"features.{index}"}
            )

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        if self.features_only:
            return self._maps(x)
        x = self.avgpool(self.features(x))
        return self.classifier(torch.flatten(x, 1))

    def _maps(self, x: Tensor) -> list[Tensor]:
        wanted = {info["module"] for info in self.feature_info}
        maps = []
        for name, layer in self.features.named_children():
            x = layer(x)
            if f"features.{name}" in wanted:
                maps.append(x)
        return maps
