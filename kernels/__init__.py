"""Fused operations for residual networks."""

from resfuse.kernels.folding import fold_conv_bn

__all__ = ["fold_conv_bn"]
