"""Tensors and modes for which torch computes no numbers here and now: nothing that reads memory can
serve them, and what records operations would keep one answer for ever."""

import torch
from torch import Tensor

_KEYS = torch._C._TorchDispatchModeKey


def is_wrapper(tensor: Tensor) -> bool:
    """Whether the numbers are elsewhere, if anywhere: FakeTensor, DTensor and other classes with a
    dispatch of their own; and what vmap and torch.func.grad hand to a function."""
    own = type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__
    return own or torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def is_traced() -> bool:
    """Whether torch.jit.trace, make_fx, torch.export or FakeTensorMode is at work."""
    return (
        torch._C._get_tracing_state() is not None
        or torch._C._get_dispatch_mode(_KEYS.FAKE) is not None
        or torch._C._get_dispatch_mode(_KEYS.PROXY) is not None
    )
