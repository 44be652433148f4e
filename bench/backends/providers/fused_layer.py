"""Our own kernels, one at a time. On a CPU `fused` is what `fuse` uses there: a native step, or
oneDNN's fused convolution, which is a provider of its own, too."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from resfuse.bench.backends.providers.layer import ConvRelu
from resfuse.bench.common.errors import Unavailable
from resfuse.kernels.cpu import onednn
from resfuse.kernels.fusion.layers.fold_cache import Packed, pack, packs
from resfuse.kernels.gpu.registry import KERNELS

Run = Callable[[Tensor], Tensor]


def build(layer: ConvRelu, example: Tensor) -> Run:
    """Any convolution."""
    if not example.is_cuda:
        if packs(layer.conv.weight, layer.problem.geometry, "relu"):
            return _packed(pack, layer, example)
        raise Unavailable(f"there is no fused convolution in {example.dtype} on this CPU")
    return _triton("conv_bn_act", layer, **_window(layer))


def build_onednn(layer: ConvRelu, example: Tensor) -> Run:
    """Any convolution.

    Raises:
        Unavailable: not on a CPU.
    """
    if example.device.type != "cpu":
        raise Unavailable("oneDNN computes on the CPU only")
    if not onednn.supports(example.dtype):
        raise Unavailable(f"oneDNN has no fused convolution in {example.dtype} on this CPU")
    return _packed(onednn.PackedConv, layer, example)


def build_conv1x1(layer: ConvRelu, example: Tensor) -> Run:
    """1x1 without padding or groups.

    Raises:
        Unavailable: no GPU, or another convolution.
    """
    _require_cuda(example)
    p = layer.problem
    if (p.r, p.s) != (1, 1) or p.padding != (0, 0) or p.groups != 1:
        raise Unavailable("conv1x1 computes 1x1 convolutions without padding or groups only")
    return _triton("conv1x1", layer, stride=p.stride)


def build_split_k(layer: ConvRelu, example: Tensor) -> Run:
    """Any convolution, its reduction split over thread blocks."""
    _require_cuda(example)
    return _triton("conv_bn_act_split_k", layer, **_window(layer))


def _window(layer: ConvRelu) -> dict[str, Any]:
    return layer.problem.geometry._asdict()


def _triton(kernel: str, layer: ConvRelu, **window: Any) -> Run:
    try:
        op = KERNELS[kernel].load_op()
    except ModuleNotFoundError as error:
        raise Unavailable(f"{kernel} needs {error.name}, which is not installed") from None
    weight = layer.conv.weight.contiguous(memory_format=torch.channels_last)
    bias = layer.conv.bias

    @torch.inference_mode()
    def run(x: Tensor) -> Tensor:
        y: Tensor = op(x, weight, bias, activation="relu", **window)
        return y

    return run


def _packed(make: Callable[..., Packed], layer: ConvRelu, example: Tensor) -> Run:
    conv, geometry = layer.conv, layer.problem.geometry
    assert conv.bias is not None
    packed = make(conv.weight, conv.bias, geometry, "relu", None, example.shape)

    @torch.inference_mode()
    def run(x: Tensor) -> Tensor:
        return packed(x)

    return run


def _require_cuda(example: Tensor) -> None:
    if not example.is_cuda:
        raise Unavailable("Triton's kernels need a GPU; the interpreter is never timed")
