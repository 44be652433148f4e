"""Our own networks, `resnet50`: the models of resnet_ref."""

from collections.abc import Sequence

import torch
from torch import nn

from resfuse.bench.common.errors import UsageError
from resfuse.bench.models import torchvision_models
from resfuse.bench.models.model_name import parse
from resfuse.bench.models.source import Arguments, Shape, Source
from resfuse.resnet_ref import MODELS, create, input_size


def _names(where: str) -> Sequence[str]:
    return list(MODELS)


def _input_shape(name: str, arguments: Arguments) -> Shape:
    return 3, input_size(name), input_size(name)


def _build(name: str, arguments: Arguments) -> nn.Module:
    # `create` draws from a generator of its own, which is to be seeded as torch's is.
    return create(name, seed=torch.initial_seed(), **arguments)


def on_meta(model: str) -> nn.Module:
    """One of our networks without numbers, in eval mode: for what asks about shapes alone."""
    given = parse(model)
    return create(given.text, device="meta", **given.arguments()).eval()


def _load_pretrained(model: nn.Module, name: str, arguments: Arguments) -> None:
    """torchvision's weights fit those of our networks that torchvision has, too."""
    if name not in torchvision_models.names(""):
        raise UsageError(f"torchvision has no pretrained weights for {name!r}")
    torchvision_models.load_pretrained(model, name, arguments)


SOURCE = Source(
    "our own networks",
    _names,
    _input_shape,
    _build,
    lambda name: "resfuse",
    _load_pretrained,
)
