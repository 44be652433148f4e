"""Fused operations for residual networks, and `fuse` for whole models."""

from resfuse.kernels.explain import explain
from resfuse.kernels.folding import fold_conv_bn
from resfuse.kernels.fuse import fuse, fused, unfuse

__all__ = ["explain", "fold_conv_bn", "fuse", "fused", "unfuse"]
