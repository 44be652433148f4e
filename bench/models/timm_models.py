"""`timm:NAME` or `timm:NAME.TAG`: every network that timm has."""

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

_FILES = ("model.safetensors", "pytorch_model.bin")  # what a repository of the hub holds


@cache
def names(where: str) -> Sequence[str]:
    """Those without a tag first; then each with every tag that there are weights for."""
    import timm

    return [*timm.list_models(), *timm.list_pretrained()]


def input_shape(name: str, arguments: Arguments) -> Shape | None:
    """What its `pretrained_cfg` says, with the channels and size of the arguments."""
    config = _config(name)
    if config is None or not config.input_size:
        return None
    channels, height, width = config.input_size
    size = arguments.get("img_size", (height, width))
    height, width = (size, size) if isinstance(size, int) else size
    return int(arguments.get("in_chans", channels)), int(height), int(width)


def build(name: str, arguments: Arguments) -> nn.Module:
    import timm

    made: nn.Module = timm.create_model(name, pretrained=False, **arguments)
    return made


def load_pretrained(model: nn.Module, name: str, arguments: Arguments) -> None:
    """Loads what the Hugging Face hub's cache or torch's holds, as timm would convert it.

    Raises:
        UsageError: neither does, or the weights do not fit.
    """
    import timm

    config = _config(name)
    file = _cached(config) if config is not None else None
    if config is None or file is None:
        where = (config.hf_hub_id or config.url) if config is not None else None
        said = f"{where} is" if where else "weights of it are"
        raise UsageError(
            f"{said} not on this disk, and nothing is downloaded; get it with timm, or give "
            "--weights FILE"
        )
    # timm renames keys and adapts the first convolution and the classifier to the arguments.
    filled = timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay={"state_dict": read_state(file)}, **arguments
    )
    load_state(model, filled.state_dict(), str(file))


def _cached(config: Any) -> Path | None:
    if config.hf_hub_id:
        from huggingface_hub import try_to_load_from_cache

        for file in _FILES:
            found = try_to_load_from_cache(config.hf_hub_id, config.hf_hub_filename or file)
            if isinstance(found, str):
                return Path(found)
    if config.url:
        by_url = Path(torch.hub.get_dir()) / "checkpoints" / Path(config.url).name
        return by_url if by_url.exists() else None
    return None


def _config(name: str) -> Any:
    import timm

    return timm.get_pretrained_cfg(name)


SOURCE = Source(
    "every network that timm has; NAME or NAME.TAG",
    names,
    input_shape,
    build,
    lambda name: f"timm {metadata.version('timm')}",
    load_pretrained,
)
