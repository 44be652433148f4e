"""`torchvision:NAME`: the networks for classification and segmentation.

Its detectors take lists of images and its video networks clips: those are not among them.
"""

import re
from collections.abc import Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from resfuse.bench.common.errors import UsageError
from resfuse.bench.models.source import Arguments, Shape, Source
from resfuse.bench.models.weights_file import load_state, read_state

# What some take besides `weights`: they would draw their numbers for a minute.
_OPTIONS: dict[str, dict[str, Any]] = {
    "googlenet": {"init_weights": False},
    "inception_v3": {"init_weights": False},
}
# DenseNets of before torch 0.4 are published with keys that a module may not have any more.
_OLD_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12])\.")


@cache
def names(where: str) -> Sequence[str]:
    import torchvision

    models = torchvision.models
    of_segmentation: list[str] = models.list_models(module=models.segmentation)
    return [*models.list_models(module=models), *of_segmentation]


def input_shape(name: str, arguments: Arguments) -> Shape:
    """What the published weights are evaluated at."""
    transforms = _published(name).transforms.keywords
    size = transforms.get("crop_size", transforms.get("resize_size"))
    side = int(size[0] if isinstance(size, list | tuple) else size)
    return 3, side, side


def build(name: str, arguments: Arguments) -> nn.Module:
    import torchvision

    options = dict(_OPTIONS.get(name, {}))
    if name in torchvision.models.list_models(module=torchvision.models.segmentation):
        options["weights_backbone"] = None  # or it would be downloaded
    options |= arguments
    made: nn.Module = torchvision.models.get_model(name, weights=None, **options)
    return made


def load_pretrained(model: nn.Module, name: str, arguments: Arguments) -> None:
    """Loads the default weights from the folder that torchvision downloads them to.

    Raises:
        UsageError: they are not there, or do not fit.
    """
    published = _published(name)
    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(published.url).name
    if not file.exists():
        raise UsageError(
            f"torchvision's {published} are not on this disk ({file}), and nothing is downloaded; "
            f"get {published.url}, or give --weights FILE"
        )
    state = {_OLD_DENSENET.sub(r"\1\2.", key): t for key, t in read_state(file).items()}
    load_state(model, state, str(file))


def _published(name: str) -> Any:
    import torchvision

    return torchvision.models.get_model_weights(name).DEFAULT


SOURCE = Source(
    "torchvision's networks for classification and segmentation",
    names,
    input_shape,
    build,
    lambda name: f"torchvision {metadata.version('torchvision')}",
    load_pretrained,
)
