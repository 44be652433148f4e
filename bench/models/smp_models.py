"""`smp:Unet?encoder_name=resnet34`: the decoders of segmentation_models_pytorch on its encoders."""

import inspect
from collections.abc import Sequence
from importlib import metadata

from torch import nn

from resfuse.bench.common.errors import UsageError
from resfuse.bench.models.source import Arguments, Shape, Source
from resfuse.bench.models.weights_file import load_state, read_state

SIDE = 224  # pixels: what its encoders' weights were trained at; the networks take multiples of 32


def names(where: str) -> Sequence[str]:
    import segmentation_models_pytorch as smp

    made = {name: getattr(smp, name) for name in dir(smp)}
    return [name for name, one in made.items() if inspect.isclass(one)]


def input_shape(name: str, arguments: Arguments) -> Shape:
    return int(arguments.get("in_channels", 3)), SIDE, SIDE


def build(name: str, arguments: Arguments) -> nn.Module:
    import segmentation_models_pytorch as smp

    # Without weights of the encoder, which it would download.
    made: nn.Module = getattr(smp, name)(**{**arguments, "encoder_weights": None})
    return made


def load_pretrained(model: nn.Module, name: str, arguments: Arguments) -> None:
    """Loads the encoder's ImageNet weights from the Hugging Face hub's cache; it has no others.

    Raises:
        UsageError: there are none, they are not there, or do not fit.
    """
    import segmentation_models_pytorch as smp
    from huggingface_hub import try_to_load_from_cache

    encoder = str(arguments.get("encoder_name", "resnet34"))
    known = smp.encoders.encoders.get(encoder, {}).get("pretrained_settings", {}).get("imagenet")
    if known is None or "repo_id" not in known:
        raise UsageError(f"smp has no ImageNet weights for the encoder {encoder}")
    repository, revision = known["repo_id"], known.get("revision")
    file = try_to_load_from_cache(repository, "model.safetensors", revision=revision)
    if not isinstance(file, str):
        raise UsageError(
            f"{repository} is not on this disk, and nothing is downloaded; get it with smp, or "
            "give --weights FILE"
        )
    load_state(model.get_submodule("encoder"), read_state(file), file)


SOURCE = Source(
    "decoders of segmentation_models_pytorch; ?encoder_name=resnet34 and its other arguments",
    names,
    input_shape,
    build,
    lambda name: f"segmentation_models_pytorch {metadata.version('segmentation_models_pytorch')}",
    load_pretrained,
)
