"""Checks the input of an engine's call."""

from collections.abc import Collection

import torch
from torch import Tensor, nn

from resfuse.kernels.engine.ir.graph import Value
from resfuse.kernels.engine.runtime.symbolic import is_traced, is_wrapper


def require_input(
    x: object,
    value: Value,
    device: torch.device,
    images: Collection[tuple[int, ...]] | None,
    note: str = "",
) -> None:
    """Raises ValueError unless `x` is a plain tensor on `device` with the dtype of `value`, and
    torch is not tracing or transforming it.

    Args:
        images: the shapes accepted apart from the batch; None for any of as many dimensions.
        note: the end of the sentence that refuses a shape.
    """
    if type(x) is not Tensor and type(x) is not nn.Parameter:
        raise ValueError(f"argument x: {type(x).__name__}; accepted: a tensor")
    if x.layout != torch.strided:
        raise ValueError(f"argument x: {x.layout}; accepted: torch.strided")
    known = images is None or tuple(x.shape[1:]) in images
    if x.dim() != len(value.shape) or not known:
        takes = [f"[{', '.join(['N', *map(str, image)])}]" for image in images or ()]
        raise ValueError(
            f"argument x: shape {tuple(x.shape)}; this engine takes "
            + (" or ".join(takes) or f"inputs of {len(value.shape)} dimensions")
            + note
        )
    if x.dtype != value.dtype:
        raise ValueError(f"argument x: {x.dtype}; this engine takes {value.dtype}")
    if x.device != device:
        raise ValueError(f"argument x: on {x.device}; this engine is on {device}")
    if is_wrapper(x) or is_traced():
        raise ValueError(
            "argument x: torch is tracing or transforming it (torch.func, torch.jit, make_fx, "
            "FakeTensorMode); accepted: a tensor of numbers"
        )
