"""Fused operations for residual networks, and `fuse` for whole models."""

from resfuse.kernels.engine.build import build_engine
from resfuse.kernels.engine.engine import Engine
from resfuse.kernels.engine.load import load_engine
from resfuse.kernels.engine.predict import plan_for
from resfuse.kernels.engine.torch_compile.compile_backend import compile_backend
from resfuse.kernels.fusion.explain import explain
from resfuse.kernels.fusion.fuse import fuse, fused, unfuse
from resfuse.kernels.fusion.modules import FusedBasicBlock, FusedBottleneck, FusedConvBNAct
from resfuse.kernels.onnx_reader.load_onnx import load_onnx
from resfuse.kernels.ops.bn_folding import fold_conv_bn

__all__ = [
    "Engine",
    "FusedBasicBlock",
    "FusedBottleneck",
    "FusedConvBNAct",
    "build_engine",
    "compile_backend",
    "explain",
    "fold_conv_bn",
    "fuse",
    "fused",
    "load_engine",
    "load_onnx",
    "plan_for",
    "unfuse",
]
