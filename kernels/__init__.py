"""Fused operations for residual networks, and `fuse` for whole models."""

from resfuse.kernels.explain import explain
from resfuse.kernels.folding import fold_conv_bn
from resfuse.kernels.fuse import fuse, fused, unfuse
from resfuse.kernels.modules import FusedBasicBlock, FusedBottleneck, FusedConvBNAct

__all__ = [
    "FusedBasicBlock",
    "FusedBottleneck",
    "FusedConvBNAct",
    "explain",
    "fold_conv_bn",
    "fuse",
    "fused",
    "unfuse",
]
