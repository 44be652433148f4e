"""Small ONNX files, made operator by operator, and ONNX Runtime's answers to them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import torch.fx as fx
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from resfuse.kernels import load_onnx

FLOAT = TensorProto.FLOAT


def node(op: str, inputs: Sequence[str], outputs: Sequence[str] = ("y",), **attributes: Any) -> Any:
    return helper.make_node(
        op, list(inputs), list(outputs), name=f"{op}_of_{outputs[0]}", **attributes
    )


def file_of(
    path: Path,
    nodes: Sequence[Any],
    shape: Sequence[int | str],
    weights: dict[str, Any] | None = None,
    *,
    opset: int = 13,
    outputs: Sequence[str] = ("y",),
    dtype: int = FLOAT,
    out_dtype: int | None = None,
) -> Path:
    """An .onnx file with the input `x`."""
    tensors = [numpy_helper.from_array(np.asarray(a), n) for n, a in (weights or {}).items()]
    graph = helper.make_graph(
        list(nodes),
        "test",
        [helper.make_tensor_value_info("x", dtype, list(shape))],
        [helper.make_tensor_value_info(o, out_dtype or dtype, None) for o in outputs],
        tensors,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    onnx.save(model, path)
    return path


def answers_of_onnxruntime(path: Path, x: np.ndarray) -> list[np.ndarray]:
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads, settings.log_severity_level = 1, 4
    session = onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    found: list[np.ndarray] = session.run(None, {session.get_inputs()[0].name: x})
    return found


def images(shape: Sequence[int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def weights(*shape: int, seed: int = 1) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) * 0.5).astype(np.float32)


def require_equal(
    module: nn.Module, path: Path, x: np.ndarray, rtol: float = 2e-5, atol: float = 2e-5
) -> None:
    """The module's answers are ONNX Runtime's, in shape, dtype and value."""
    with torch.inference_mode():
        found = module(torch.from_numpy(x))
    given = found if isinstance(found, tuple) else (found,)
    wanted = answers_of_onnxruntime(path, x)
    assert len(given) == len(wanted)
    for one, other in zip(given, wanted, strict=True):
        assert tuple(one.shape) == other.shape
        assert one.numpy().dtype == other.dtype
        np.testing.assert_allclose(one.numpy(), other, rtol=rtol, atol=atol)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def check(
    path: Path, nodes: Sequence[Any], shape: Sequence[int], given: Any = None, **how: Any
) -> fx.GraphModule:
    """Reads a file whose batch is open, and compares it for several batches."""
    module = load_onnx(file_of(path, nodes, ["n", *shape[1:]], given, **how))
    assert module.meta["batch_size"] is None
    for batch in (1, 2, 3):
        require_equal(module, path, images((batch, *shape[1:]), batch))
    return module
