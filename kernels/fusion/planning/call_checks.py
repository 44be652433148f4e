"""What a rewritten forward needs to know of a call: what its arguments are, and who looks on."""

from typing import Any

import torch
from torch import Tensor
from torch._C import _len_torch_function_stack
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _len_torch_dispatch_stack

from resfuse.kernels.cpu.weight_origin import is_plain
from resfuse.kernels.observation.engine_capture import is_capturing


def is_watched() -> bool:
    """True where a tool wants to see the layers: FlopCounterMode, vmap, forward-mode autograd,
    torch.jit.trace, a mode that overrides torch's functions, hooks on all modules, ...
    """
    return bool(
        _len_torch_dispatch_stack() > 0
        or forward_ad._current_level >= 0
        or any(_GLOBAL_HOOKS)
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.jit.is_tracing()
        or (_len_torch_function_stack() > 0 and _functions_are_overridden())
    )


def _functions_are_overridden() -> bool:
    """A default device is a mode, too, but leaves alone what is done to tensors."""
    return any(type(mode) is not DeviceContext for mode in _get_current_function_mode_stack())


def are_plain(args: tuple[Any, ...]) -> bool:
    """Whether a graph of tensor operations takes the arguments: tensors that are memory and nothing
    else, but the first may be a list of them.
    """
    first, *others = args
    several = type(first) is list
    return all(
        isinstance(one, Tensor) and is_plain(one)
        for one in [*(first if several else (first,)), *others]
    )


_GLOBAL_HOOKS = (
    torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks,
    torch_module._global_backward_hooks, torch_module._global_backward_pre_hooks,
)  # fmt: skip


def are_traced(args: tuple[Any, ...]) -> bool:
    """Whether they are the stand-ins of torch.compile and torch.export for tensors, and the
    rewritten forward is what is wanted of them."""
    if is_capturing():
        return False
    return torch.compiler.is_compiling() and all(isinstance(a, Tensor) for a in args)


def is_on_cuda(args: tuple[Any, ...]) -> bool:
    first = args[0][0] if isinstance(args[0], list | tuple) else args[0]
    return isinstance(first, Tensor) and first.is_cuda
