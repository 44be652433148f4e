"""Fused operations for residual networks, and `fuse` for whole models."""

from resfuse.kernels.engine.engine import Engine, build_engine
from resfuse.kernels.engine.load import load_engine
from resfuse.kernels.engine.predict import plan_for
from resfuse.kernels.explain import explain
from resfuse.kernels.folding import fold_conv_bn
from resfuse.kernels.fuse import fuse, fused, unfuse
from resfuse.kernels.modules import FusedBasicBlock, FusedBottleneck, FusedConvBNAct

__all__ = [
    "Engine",
    "FusedBasicBlock",
    "FusedBottleneck",
    "FusedConvBNAct",
    "build_engine",
    "explain",
    "fold_conv_bn",
    "fuse",
    "fused",
    "load_engine",
    "plan_for",
    "unfuse",
]
