"""What public functions ask of their tensor arguments, and the memory format that kernels want."""

from collections.abc import Sequence

import torch
from torch import Tensor


def require_4d(name: str, tensor: Tensor) -> None:
    """Raises ValueError unless `tensor` is [N, C, H, W]."""
    if tensor.dim() != 4:
        raise ValueError(f"argument {name}: shape {tuple(tensor.shape)}; accepted: 4 dimensions")


def require_like(
    name: str, tensor: Tensor | None, shape: Sequence[int], like: Tensor, *, or_fp32: bool = False
) -> None:
    """Raises ValueError unless `tensor`, if it is one, is of `shape` and of like's device and dtype
    (or fp32 where that is as good)."""
    if tensor is None:
        return
    if list(tensor.shape) != list(shape):
        raise ValueError(f"argument {name}: shape {tuple(tensor.shape)}; accepted: {tuple(shape)}")
    dtypes = (like.dtype, torch.float32) if or_fp32 else (like.dtype,)
    if tensor.dtype not in dtypes:
        accepted = " or ".join(dict.fromkeys(str(dtype) for dtype in dtypes))
        raise ValueError(f"argument {name}: {tensor.dtype}; accepted: {accepted}")
    if tensor.device != like.device:
        raise ValueError(f"argument {name}: on {tensor.device}; accepted: {like.device}")


def channels_last(tensor: Tensor) -> Tensor:
    """`tensor` [N, C, H, W] as N, H, W, C in memory: itself if it lies so, else a copy."""
    return tensor.contiguous(memory_format=torch.channels_last)


def empty_channels_last(shape: Sequence[int], like: Tensor) -> Tensor:
    """An uninitialised tensor of `shape` in channels_last memory, of like's dtype and device."""
    return torch.empty(
        tuple(shape), dtype=like.dtype, device=like.device, memory_format=torch.channels_last
    )
