"""Weights from a file, or torchvision's pretrained ones. No code that a file may hold is run."""

import argparse
import re
from collections.abc import Mapping
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor, nn

from resfuse.resnet_ref.models import MODELS

_LFS_POINTER = b"version https://git-lfs"
# What DistributedDataParallel, torch.compile and both around each other put before every key.
_PREFIXES = ("module.", "_orig_mod.")
# timm's VGG has convolutions for the first two large layers, and calls the last one a head.
TIMM_VGG = {
    "pre_logits.fc1.": "classifier.0.",
    "pre_logits.fc2.": "classifier.3.",
    "head.fc.": "classifier.6.",
}


def load_weights(model: nn.Module, path: str | PathLike[str]) -> None:
    """Loads a file into `model`: all of it or, on any error, nothing.

    Reads .safetensors (by suffix) and torch checkpoints, with the keys of torchvision or timm, bare
    or under "state_dict" or "model", and with the prefixes that DistributedDataParallel and
    torch.compile leave, in any order. Values are cast to the model's dtype. A network built with
    `features_only` ignores the classifier.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is corrupt, holds anything but tensors, or has keys or shapes that are
            not the model's, or weights that are not dense and finite; the sentence names the file
            and the first of them.
    """
    fill(model, read_weights(path), f"weights file {path}")


def read_weights(path: str | PathLike[str]) -> dict[str, Tensor]:
    """The state dict of a file; raises as `load_weights` does where there is none."""
    path = Path(path)
    source = f"weights file {path}"
    if not path.exists():
        raise FileNotFoundError(f"{source} does not exist")
    if not path.is_file():
        raise ValueError(f"{source} is not a file")
    with path.open("rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise ValueError(
                f"{source} is a Git LFS pointer, not the file; `git lfs pull` fetches it"
            )
    read = _read_safetensors if path.suffix == ".safetensors" else _read_checkpoint
    return _find_state(read(path, source), source)


def load_pretrained(name: str, model: nn.Module) -> None:
    """Loads torchvision's default pretrained weights, from its cache or the network.

    Raises:
        ValueError: torchvision has none for `name`, or `model` has other keys or shapes than they
            (another num_classes).
        RuntimeError: torchvision is not installed, or the weights could not be fetched.
    """
    try:
        import torchvision
    except ImportError as error:
        raise RuntimeError(
            "pretrained weights need torchvision, which is not installed; --weights FILE does not"
        ) from error
    published = torchvision.models.list_models(module=torchvision.models)
    if name not in published:
        offered = ", ".join(known for known in MODELS if known in published)
        raise ValueError(f"torchvision has no pretrained weights for {name!r}; it has: {offered}")
    weights = torchvision.models.get_model_weights(name).DEFAULT
    try:
        state = weights.get_state_dict(progress=False, check_hash=True)
    except Exception as error:  # network, disk, hash and unpickling have errors of their own each
        raise RuntimeError(
            f"pretrained weights of {name} could not be fetched from {weights.url} ({error});"
            " --weights FILE needs no network"
        ) from error
    fill(model, state, f"torchvision's {weights}")


def _read_safetensors(path: Path, source: str) -> object:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise ValueError(f"{source} needs the safetensors package") from error
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{source} is not a readable safetensors file ({error})") from error


def _read_checkpoint(path: Path, source: str) -> object:
    try:
        # The training scripts of torchvision and timm save their arguments, an inert Namespace.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a corrupt pickle can raise anything
        foreign = re.search(r"GLOBAL (\S+)", str(error))
        if foreign:
            raise ValueError(
                f"{source} holds a Python object ({foreign[1]}) besides tensors, refused because"
                " reading it could run code; save the state_dict alone"
            ) from error
        raise ValueError(
            f"{source} is corrupt or no torch checkpoint ({type(error).__name__} on reading it)"
        ) from error


def _find_state(content: object, source: str) -> dict[str, Tensor]:
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping):
        raise ValueError(f"{source} holds no state_dict but a {type(content).__name__}")
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ValueError(
                f"{source} holds no state_dict: {key!r} is a {type(value).__name__}, not a tensor"
            )
    return dict(content)


def fill(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Gives a model all of a state dict or, on any error, nothing; keys as `load_weights` has them.

    Raises:
        ValueError: as `load_weights` does; `source` is what the sentence calls the state dict.
    """
    own = model.state_dict()
    if not state.keys() <= own.keys():
        state = _without_prefixes(state)
    if not state.keys() <= own.keys():
        state = _torchvision_layout(state)
    if getattr(model, "features_only", False):
        state = {k: v for k, v in state.items() if not k.startswith(("fc.", "classifier."))}
    # Checkpoints from before torch 0.4.1 lack the counters, which evaluation does not read.
    missing = [k for k in own if k not in state and not k.endswith("num_batches_tracked")]
    unexpected = [k for k in state if k not in own]
    if missing or unexpected:
        problems = [f"lacks {_shorten(missing)}"] if missing else []
        problems += [f"adds {_shorten(unexpected)}"] if unexpected else []
        raise ValueError(f"{source} has other keys than the model: it {' and '.join(problems)}")
    wrong = [
        f"{k} is {list(v.shape)}, the model's {list(own[k].shape)}"
        for k, v in state.items()
        if v.shape != own[k].shape
    ]
    if wrong:
        raise ValueError(f"{source} has other shapes than the model: {'; '.join(wrong[:3])}")
    for key, value in state.items():
        if (broken := _broken(value, own[key])) is not None:
            raise ValueError(f"{source} cannot be used: {key} {broken}")
    model.load_state_dict(own | dict(state))


def _broken(value: Tensor, own: Tensor) -> str | None:
    """Why a tensor is no weight, if it is none."""
    if value.is_quantized:
        return f"is quantized ({value.dtype}); accepted: floating-point weights"
    if value.layout != torch.strided:
        return f"is {value.layout}; accepted: dense tensors"
    if value.is_meta:
        return "is on meta and has no numbers"
    if value.is_complex():
        return f"is {value.dtype}; accepted: {own.dtype}"
    if value.is_floating_point() and not value.to(own.dtype).isfinite().all():
        return "holds values that are not finite"
    return None


def _without_prefixes(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    while prefix := next(
        (p for p in _PREFIXES if state and all(k.startswith(p) for k in state)), ""
    ):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _torchvision_layout(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """timm's VGG by torchvision's names."""
    converted = {}
    for key, value in state.items():
        for theirs, ours in TIMM_VGG.items():
            if key.startswith(theirs):
                key = ours + key.removeprefix(theirs)
                value = value.flatten(1) if value.dim() == 4 else value
        converted[key] = value
    return converted


def _shorten(keys: list[str]) -> str:
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return ", ".join(keys[:3]) + more
