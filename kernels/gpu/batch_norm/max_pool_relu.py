"""y = relu(max_pool(x)), which is max_pool(relu(x)), since a ReLU keeps the order of values; with
the gradient of the latter, bit by bit.

x [N, C, H, W] -> y [N, C, P, Q], in any memory format. For the backward pass eager torch keeps the
ReLU's output, H x W pixels of it, and the index of every pooled value in 8 bytes. Here it is y,
which the next layer keeps anyway, and indices in 2 bytes (4 in planes of more than 2**15 pixels):
of a ResNet's stem in fp32, 2 bytes for 24 of every pooled value. The ReLU has a quarter of the
work, too.
"""

from typing import Any

import torch
from torch import Tensor, nn

_SHORT = 1 << 15  # pixels of a plane whose indices fit into 16 bits


class _MaxPoolReLU(torch.autograd.Function):
    """Its backward pass is made of operations that have gradients, and so has one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *window: Any) -> Tensor:
        y, indices = torch.ops.aten.max_pool2d_with_indices(x, *window)
        y = y.relu_()
        narrow = torch.int16 if x.shape[2] * x.shape[3] <= _SHORT else torch.int32
        ctx.save_for_backward(y, indices.to(narrow))
        ctx.window, ctx.shape = window, x.shape
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, indices = ctx.saved_tensors
        grad = torch.ops.aten.threshold_backward(grad, y, 0)
        # The pool's backward pass asks its input for a shape and a format, and for nothing in it:
        # this memory is never touched.
        like = torch.empty(
            ctx.shape, dtype=grad.dtype, device=grad.device, memory_format=_format_of(y)
        )
        grad_x = torch.ops.aten.max_pool2d_with_indices_backward(
            grad, like, *ctx.window, indices.long()
        )
        return grad_x, *(None,) * len(ctx.window)


def _format_of(y: Tensor) -> torch.memory_format:
    last = y.is_contiguous(memory_format=torch.channels_last) and not y.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def max_pool_relu(x: Tensor, pool: nn.MaxPool2d) -> Tensor:
    """relu(pool(x)) for x [N, C, H, W]; errors are the pool's own."""
    window = (pool.kernel_size, pool.stride, pool.padding, pool.dilation)
    lists = [[size, size] if isinstance(size, int) else list(size) for size in window]
    return _MaxPoolReLU.apply(x, *lists, pool.ceil_mode)
