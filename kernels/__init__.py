"""Fused operations for residual networks, and `fuse` for whole models.

Each name is imported when it is first asked for: a command that only reads tables needs no torch,
and a process that measures another backend needs neither fusion nor the engine.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from resfuse.kernels.engine.build import build_engine
    from resfuse.kernels.engine.engine import Engine
    from resfuse.kernels.engine.load import load_engine
    from resfuse.kernels.engine.predict import plan_for
    from resfuse.kernels.engine.quantization.calibration import calibrate
    from resfuse.kernels.engine.quantization.pixels import Pixels
    from resfuse.kernels.engine.quantization.ranges import Ranges
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
    "Pixels",
    "Ranges",
    "build_engine",
    "calibrate",
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

# Name -> the module in this package that has it.
_MODULES = {
    "Engine": "engine.engine",
    "FusedBasicBlock": "fusion.modules",
    "FusedBottleneck": "fusion.modules",
    "FusedConvBNAct": "fusion.modules",
    "Pixels": "engine.quantization.pixels",
    "Ranges": "engine.quantization.ranges",
    "build_engine": "engine.build",
    "calibrate": "engine.quantization.calibration",
    "compile_backend": "engine.torch_compile.compile_backend",
    "explain": "fusion.explain",
    "fold_conv_bn": "ops.bn_folding",
    "fuse": "fusion.fuse",
    "fused": "fusion.fuse",
    "load_engine": "engine.load",
    "load_onnx": "onnx_reader.load_onnx",
    "plan_for": "engine.predict",
    "unfuse": "fusion.fuse",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = found  # the next time it is here
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
