"""KERNELS: every Triton kernel, its plain-torch twin, and the launches we ship.

The strings are imported when used: the kernels need Triton, and `import resfuse.kernels` does not.
"""

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from resfuse.kernels.gpu.common.launch import Launch


@dataclass(frozen=True)
class KernelSpec:
    """Where to find a kernel's parts; each string is "module:name".

    op: the public function.
    reference: its plain-torch twin, which is the specification.
    shipped: `shipped() -> Iterator[(label, Launch)]`, every shipped configuration on a problem it
        is meant for, with tensors on the meta device.
    """

    op: str
    reference: str
    shipped: str
    does: str  # for `resfuse list`

    def load_op(self) -> Callable[..., Any]:
        return _load(self.op)

    def load_reference(self) -> Callable[..., Any]:
        return _load(self.reference)

    def launches(self) -> "Iterator[tuple[str, Launch]]":
        return _load(self.shipped)()


def _load(target: str) -> Any:
    module, name = target.split(":")
    return getattr(importlib.import_module(module), name)


KERNELS: dict[str, KernelSpec] = {
    "conv_bn_act": KernelSpec(
        "resfuse.kernels.gpu.conv.conv:conv_bn_act",
        "resfuse.kernels.gpu.conv.conv:conv_bn_act_ref",
        "resfuse.kernels.gpu.conv.conv:shipped",
        "any convolution, implicit GEMM; bias, residual, activation",
    ),
    "conv_bn_act_split_k": KernelSpec(
        "resfuse.kernels.gpu.split_k.split_k:conv_bn_act_split_k",
        "resfuse.kernels.gpu.conv.conv:conv_bn_act_ref",
        "resfuse.kernels.gpu.split_k.split_k:shipped",
        "the same for small batches: the reduction split over CTAs",
    ),
    "conv_int8": KernelSpec(
        "resfuse.kernels.gpu.conv_int8.conv_int8:conv_int8",
        "resfuse.kernels.gpu.conv_int8.conv_int8:conv_int8_ref",
        "resfuse.kernels.gpu.conv_int8.conv_int8:shipped",
        "any convolution of quantised values, in int8; requantised",
    ),
    "convert_int8": KernelSpec(
        "resfuse.kernels.gpu.int8_maps.convert:convert_int8",
        "resfuse.kernels.gpu.int8_maps.convert:convert_int8_ref",
        "resfuse.kernels.gpu.int8_maps.convert:shipped",
        "float32 to quantised values, and back",
    ),
    "pool_int8": KernelSpec(
        "resfuse.kernels.gpu.int8_maps.pool:pool_int8",
        "resfuse.kernels.gpu.int8_maps.pool:pool_int8_ref",
        "resfuse.kernels.gpu.int8_maps.pool:shipped",
        "max-pools, average pools and means of quantised values",
    ),
    "conv1x1": KernelSpec(
        "resfuse.kernels.gpu.conv1x1.conv1x1:conv1x1",
        "resfuse.kernels.gpu.conv1x1.conv1x1:conv1x1_ref",
        "resfuse.kernels.gpu.conv1x1.conv1x1_kernel:shipped",
        "1x1 convolution as a GEMM; a projection shortcut folded in as more K",
    ),
    "stem": KernelSpec(
        "resfuse.kernels.gpu.stem.stem:stem",
        "resfuse.kernels.gpu.stem.stem:stem_ref",
        "resfuse.kernels.gpu.stem.stem_kernel:shipped",
        "7x7/2 convolution, ReLU, 3x3/2 max-pool",
    ),
    "bn_act": KernelSpec(
        "resfuse.kernels.gpu.bn_act.bn_act:bn_act",
        "resfuse.kernels.gpu.bn_act.bn_act:bn_act_ref",
        "resfuse.kernels.gpu.bn_act.bn_act:shipped",
        "scale, shift, residual, activation where batch-norm cannot be folded",
    ),
    "block_tail": KernelSpec(
        "resfuse.kernels.gpu.block_tail.block_tail:block_tail",
        "resfuse.kernels.gpu.block_tail.block_tail:block_tail_ref",
        "resfuse.kernels.gpu.block_tail.block_tail_kernel:shipped",
        "3x3, 1x1 + residual + ReLU, and the next block's 1x1",
    ),
    "batch_statistics": KernelSpec(
        "resfuse.kernels.gpu.batch_norm.batch_statistics:batch_statistics",
        "resfuse.kernels.gpu.batch_norm.batch_statistics:batch_statistics_ref",
        "resfuse.kernels.gpu.batch_norm.batch_statistics_kernel:shipped",
        "training: mean and variance of each channel, running statistics",
    ),
    "bn_add_relu": KernelSpec(
        "resfuse.kernels.gpu.batch_norm.bn_add_relu:bn_add_relu",
        "resfuse.kernels.gpu.batch_norm.bn_add_relu:bn_add_relu_ref",
        "resfuse.kernels.gpu.batch_norm.bn_add_relu_kernel:shipped",
        "training: batch norm, residual or projection's norm, ReLU; all gradients",
    ),
    "conv_statistics": KernelSpec(
        "resfuse.kernels.gpu.batch_norm.conv_statistics:conv_statistics",
        "resfuse.kernels.gpu.batch_norm.conv_statistics:conv_statistics_ref",
        "resfuse.kernels.gpu.batch_norm.conv_statistics:shipped",
        "training: any convolution and the statistics of its output",
    ),
    "bn_conv1x1": KernelSpec(
        "resfuse.kernels.gpu.batch_norm.bn_conv1x1:bn_conv1x1",
        "resfuse.kernels.gpu.batch_norm.bn_conv1x1:bn_conv1x1_ref",
        "resfuse.kernels.gpu.batch_norm.bn_conv1x1:shipped",
        "training: 1x1 convolution of what it normalises while loading, with statistics",
    ),
}
