"""Weights from a file into any module, and the hash that a row names them by.

Nothing is executed: safetensors hold tensors alone, and checkpoints are read by
torch.load(weights_only=True).
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from resfuse.bench.common.errors import UsageError
from resfuse.resnet_ref.weights import fill, read_weights


def read_state(path: str | Path) -> dict[str, Tensor]:
    """The state dict of a file.

    Raises:
        UsageError: it is missing, corrupt, or holds anything but tensors.
    """
    try:
        return read_weights(path)
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error


def load_state(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Fills a model with all of a state dict or, on any error, with nothing.

    Raises:
        UsageError: keys or shapes are not the model's; names the first of them.
    """
    try:
        fill(model, state, f"weights file {source}")
    except ValueError as error:
        raise UsageError(str(error)) from error


def state_hash(model: nn.Module) -> str:
    """sha256 over names, dtypes, shapes and bytes of the state dict, by name."""
    digest = hashlib.sha256()
    state = model.state_dict()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
