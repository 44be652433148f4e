"""The shapes of common layers' results on the meta device.

torch works most of them out in Python, and imports sympy or its whole compiler for it: 0.7 to 2 s
of a command that takes 15.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from resfuse.kernels.ops.conv_problem import Geometry


def result_on_meta(
    func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Tensor | None:
    """Returns what a function gives for tensors of the meta device, as __torch_function__ is
    handed it; None where the function, or a rarer use of it, is to be left to torch.
    """
    x = args[0] if args else None
    if not isinstance(x, Tensor) or not x.is_meta:
        return None
    if func is F.batch_norm:
        return x
    if func is Tensor.add_:
        return x if isinstance(args[1], Tensor) and args[1].shape == x.shape else None
    if func is F.max_pool2d:
        return _pooled(*args, **kwargs)
    if func is F.adaptive_avg_pool2d and isinstance(args[1], int):
        return x.new_empty((*x.shape[:2], args[1], args[1]))
    if func is F.conv2d and len(args) == 7 and not isinstance(args[4], str):
        _, weight, _, *geometry, _ = args
        return x.new_empty(Geometry(*geometry).output_shape(x.shape, weight.shape))
    if func is F.linear:
        return x.new_empty((*x.shape[:-1], args[1].shape[0]))
    return None


def _pooled(
    x: Tensor, window: Any, stride: Any = None, padding: Any = 0, *more: Any, **rest: Any
) -> Tensor | None:
    """Returns what a max pooling gives whose window, stride and padding are a number each."""
    stride = window if stride is None else stride
    asked = rest.get("ceil_mode") or rest.get("return_indices") or rest.get("dilation", 1) != 1
    if more or asked or not all(isinstance(n, int) for n in (window, stride, padding)):
        return None
    moves = Geometry((stride, stride), (padding, padding))
    return x.new_empty(moves.output_shape(x.shape, (x.shape[1], 1, window, window)))
