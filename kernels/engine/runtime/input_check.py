"""Checks the input of an engine's call."""

import torch
from torch import Tensor, nn

from resfuse.kernels.engine.ir.graph import Value
from resfuse.kernels.engine.runtime.symbolic import is_traced, is_wrapper


def require_input(x: object, value: Value, device: torch.device) -> None:
    """Raises ValueError unless `x` is a plain tensor on `device` with the dtype of `value` and,
    apart from the batch, its shape, and torch is not tracing or transforming it."""
    if type(x) is not Tensor and type(x) is not nn.Parameter:
        raise ValueError(f"argument x: {type(x).__name__}; accepted: a tensor")
    if x.layout != torch.strided:
        raise ValueError(f"argument x: {x.layout}; accepted: torch.strided")
    shape = value.shape
    if x.dim() != len(shape) or tuple(x.shape[1:]) != shape[1:]:
        wanted = ", ".join(["N", *map(str, shape[1:])])
        raise ValueError(f"argument x: shape {tuple(x.shape)}; this engine takes [{wanted}]")
    if x.dtype != value.dtype:
        raise ValueError(f"argument x: {x.dtype}; this engine takes {value.dtype}")
    if x.device != device:
        raise ValueError(f"argument x: on {x.device}; this engine is on {device}")
    if is_wrapper(x) or is_traced():
        raise ValueError(
            "argument x: torch is tracing or transforming it (torch.func, torch.jit, make_fx, "
            "FakeTensorMode); accepted: a tensor of numbers"
        )
