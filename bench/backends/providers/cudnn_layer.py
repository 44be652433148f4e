"""cuDNN's convolution with bias and ReLU in its epilogue, through torch's own ops."""

from collections.abc import Callable

import torch
from torch import Tensor

from resfuse.bench.backends.providers.layer import ConvRelu
from resfuse.bench.common.errors import Unavailable
from resfuse.kernels.gpu.cudnn.cudnn_probe import decided
from resfuse.kernels.gpu.cudnn.cudnn_relu import conv_relu, searching, zeros_for


def build(layer: ConvRelu, example: Tensor) -> Callable[[Tensor], Tensor]:
    """Makes one call in the form that is right and fastest on the device; weight in channels_last.

    Raises:
        Unavailable: no CUDA device.
    """
    if not example.is_cuda:
        raise Unavailable("torch's fused convolution ops are cuDNN's and need an NVIDIA GPU")
    conv, p = layer.conv, layer.problem
    assert conv.bias is not None
    way = decided(p.math_mode, example.device)
    weight, bias = conv.weight.contiguous(memory_format=torch.channels_last), conv.bias
    z = zeros_for(way.form, p.output_shape, weight.new_zeros)

    @torch.inference_mode()
    def run(x: Tensor) -> Tensor:
        with searching(way.search):
            return conv_relu(way.form, x, weight, bias, z, p.geometry)

    return run
