"""Tensors and modes for which torch computes no numbers here and now: nothing that reads memory can
serve them, and what records operations would keep one answer for ever."""

import torch
from torch import Tensor

_FAKE, _PROXY = torch._C._TorchDispatchModeKey.FAKE, torch._C._TorchDispatchModeKey.PROXY
_PLAIN = Tensor.__torch_dispatch__
_is_functorch = torch._C._functorch.is_functorch_wrapped_tensor
_tracing, _mode = torch._C._get_tracing_state, torch._C._get_dispatch_mode


def is_wrapper(tensor: Tensor) -> bool:
    """Whether the numbers are elsewhere, if anywhere: FakeTensor, DTensor and other classes with a
    dispatch of their own; and what vmap and torch.func.grad hand to a function."""
    return type(tensor).__torch_dispatch__ is not _PLAIN or _is_functorch(tensor)


def is_traced() -> bool:
    """Whether torch.jit.trace, make_fx, torch.export or FakeTensorMode is at work."""
    return _tracing() is not None or _mode(_FAKE) is not None or _mode(_PROXY) is not None
