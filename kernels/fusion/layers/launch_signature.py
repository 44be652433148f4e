"""What a launch depends on, of the tensors that a fused layer is called with; and whether it may be
launched without telling torch. In front of every launch of a fused forward, so each line counts.
"""

from collections.abc import Hashable

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _len_torch_dispatch_stack

from resfuse.kernels.ops.conv_problem import math_mode_of
from resfuse.kernels.tuning_cache.timing_cache import known

ALIGNMENT = 16  # bytes; Triton compiles one kernel for addresses that are multiples, one for others


def is_unseen(x: Tensor, other: Tensor | None) -> bool:
    """True where only the answer is wanted: no compiler, mode, subclass or gradient looks on, all
    of which know our kernels as ops of torch's."""
    if torch.compiler.is_compiling():
        return False
    if _len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return False
    if forward_ad._current_level >= 0:
        return False
    return _is_plain(x) and (other is None or _is_plain(other))


def _is_plain(x: Tensor) -> bool:
    return (
        type(x) is Tensor
        and not x.is_neg()  # torch's lazy minus: what is in memory is not what it means
        and not (x.requires_grad and torch.is_grad_enabled())
    )


def signature_of(x: Tensor, other: Tensor | None) -> tuple[Hashable, ...]:
    """Two calls of equal signature launch the same kernel with the same numbers, at addresses that
    are aligned alike."""
    mode = math_mode_of(x.dtype, x.device) if x.dtype == torch.float32 else x.dtype
    barred = known(x.device)
    autocasts = torch._C._is_any_autocast_enabled()
    if other is None:
        return (mode, barred, autocasts, x.get_device(), *_layout(x))
    return (
        mode,
        barred,
        autocasts,
        x.get_device(),
        *_layout(x),
        other.dtype,
        other.get_device(),
        *_layout(other),
    )


def _layout(x: Tensor) -> tuple[Hashable, ...]:
    return x.shape, x.stride(), x.data_ptr() % ALIGNMENT == 0
