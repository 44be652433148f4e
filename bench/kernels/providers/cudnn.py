"""cuDNN's convolution with bias and ReLU in its epilogue, through torch's own op."""

from collections.abc import Callable

import torch
from torch import Tensor

from resfuse.bench.errors import Unavailable
from resfuse.bench.kernels.layer import ConvRelu


def build(layer: ConvRelu, example: Tensor) -> Callable[[Tensor], Tensor]:
    """One call of torch.cudnn_convolution_relu, weight in channels_last.

    Raises:
        Unavailable: no CUDA device.
    """
    if not example.is_cuda:
        raise Unavailable("torch's fused convolution ops are cuDNN's and need an NVIDIA GPU")
    conv, problem = layer.conv, layer.problem
    weight = conv.weight.contiguous(memory_format=torch.channels_last)

    @torch.inference_mode()
    def run(x: Tensor) -> Tensor:
        return torch.cudnn_convolution_relu(
            x, weight, conv.bias, problem.stride, problem.padding, problem.dilation, problem.groups
        )

    return run
