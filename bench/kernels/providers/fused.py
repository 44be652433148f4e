"""Our own kernels, one at a time. On a CPU `fused` is a native step where there is one and oneDNN's
fused convolution elsewhere, as `fuse` has it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from resfuse.bench.errors import Unavailable
from resfuse.bench.kernels.layer import ConvRelu
from resfuse.kernels import onednn
from resfuse.kernels.native import packed as native
from resfuse.kernels.registry import KERNELS

Run = Callable[[Tensor], Tensor]


def build(layer: ConvRelu, example: Tensor) -> Run:
    """Any convolution."""
    if not example.is_cuda:
        return _native(layer) if native.supports(*_native_terms(layer)) else _onednn(layer, example)
    return _triton("conv_bn_act", layer, **_window(layer))


def build_conv1x1(layer: ConvRelu, example: Tensor) -> Run:
    """1x1 without padding or groups.

    Raises:
        Unavailable: no GPU, or another convolution.
    """
    _require_cuda(example)
    p = layer.problem
    if (p.r, p.s) != (1, 1) or p.padding != (0, 0) or p.groups != 1:
        raise Unavailable("conv1x1 computes 1x1 convolutions without padding or groups only")
    return _triton("conv1x1", layer)


def build_split_k(layer: ConvRelu, example: Tensor) -> Run:
    """Any convolution, its reduction split over thread blocks."""
    _require_cuda(example)
    return _triton("conv_bn_act_split_k", layer, **_window(layer))


def _window(layer: ConvRelu) -> dict[str, Any]:
    p = layer.problem
    return {"padding": p.padding, "dilation": p.dilation, "groups": p.groups}


def _triton(kernel: str, layer: ConvRelu, **window: Any) -> Run:
    try:
        op = KERNELS[kernel].load_op()
    except ModuleNotFoundError as error:
        raise Unavailable(f"{kernel} needs {error.name}, which is not installed") from None
    weight = layer.conv.weight.contiguous(memory_format=torch.channels_last)
    bias, stride = layer.conv.bias, layer.problem.stride

    @torch.inference_mode()
    def run(x: Tensor) -> Tensor:
        return op(x, weight, bias, stride=stride, activation="relu", **window)

    return run


def build_onednn(layer: ConvRelu, example: Tensor) -> Run:
    """Any convolution, on a CPU.

    Raises:
        Unavailable: a GPU, or a precision this CPU's oneDNN has no fused convolution in.
    """
    if example.is_cuda:
        raise Unavailable("oneDNN computes on the CPU")
    return _onednn(layer, example)


def _native_terms(layer: ConvRelu) -> tuple[Tensor, onednn.Geometry, str]:
    return layer.conv.weight, _geometry(layer), "relu"


def _native(layer: ConvRelu) -> Run:
    assert layer.conv.bias is not None
    packed = native.NativeConv(layer.conv.weight, layer.conv.bias, _geometry(layer), "relu", None)
    return torch.inference_mode()(packed)


def _onednn(layer: ConvRelu, example: Tensor) -> Run:
    if not onednn.supports(example.dtype):
        raise Unavailable(f"oneDNN has no fused convolution in {example.dtype} on this CPU")
    conv = layer.conv
    assert conv.bias is not None
    packed = onednn.PackedConv(
        conv.weight, conv.bias, _geometry(layer), "relu", None, example.shape
    )

    @torch.inference_mode()
    def run(x: Tensor) -> Tensor:
        return packed(x)

    return run


def _geometry(layer: ConvRelu) -> onednn.Geometry:
    p = layer.problem
    return onednn.Geometry(p.stride, p.padding, p.dilation, p.groups)


def _require_cuda(example: Tensor) -> None:
    if not example.is_cuda:
        raise Unavailable("Triton's kernels need a GPU; the interpreter is never timed")
