"""Recognises tensors and modes under which torch computes no numbers: an engine cannot read such a
tensor's memory, and a recorder of operations would store one answer for ever.
"""

import torch
from torch import Tensor

_FAKE, _PROXY = torch._C._TorchDispatchModeKey.FAKE, torch._C._TorchDispatchModeKey.PROXY
_PLAIN = Tensor.__torch_dispatch__
_is_functorch = torch._C._functorch.is_functorch_wrapped_tensor
_tracing, _mode = torch._C._get_tracing_state, torch._C._get_dispatch_mode


def is_wrapper(tensor: Tensor) -> bool:
    """Returns whether a tensor has no memory of its own numbers: FakeTensor, DTensor and other
    classes with their own dispatch, and the wrappers of vmap and torch.func.grad."""
    return type(tensor).__torch_dispatch__ is not _PLAIN or _is_functorch(tensor)


def is_traced() -> bool:
    """Returns whether torch.jit.trace, make_fx, torch.export or FakeTensorMode is active."""
    return _tracing() is not None or _mode(_FAKE) is not None or _mode(_PROXY) is not None
