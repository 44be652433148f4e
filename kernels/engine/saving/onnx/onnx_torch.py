"""Those of torch's own operations that ONNX files can have: what moves values, and softmax."""

from collections.abc import Callable
from typing import Any

import numpy as np

from resfuse.kernels.engine.ir.graph import Node, Torch
from resfuse.kernels.engine.saving.onnx.onnx_builder import OnnxBuilder


def torch_operation(build: OnnxBuilder, node: Node, op: Torch) -> None:
    """Adds one of torch's operations.

    Raises:
        ValueError: it is none of those.
    """
    write = _TORCH.get(op.target)
    args = op.args[1:]
    known = write is not None and len(node.inputs) == 1 and op.args[:1] == ({"value": 0},)
    if write is None or not known or op.kwargs or op.result is not None:
        raise ValueError(
            f"the network runs {op.target} ({node.name!r}), which is not written to ONNX files; "
            f"accepted besides convolutions, pools, activations and sums: {', '.join(_TORCH)}"
        )
    build.store(node, write(build, node, build.names[node.inputs[0]], args))


def _reshape(build: OnnxBuilder, node: Node, x: str, args: tuple[Any, ...]) -> str:
    given, shape = build.value(node.inputs[0]).shape, build.value(node.name).shape
    # Of one image it is not known whether the first 1 is the batch.
    image_by_image = given[0] == shape[0] == build.graph.batch_size > 1
    build.any_batch &= image_by_image
    sizes = [0, *shape[1:]] if image_by_image else list(shape)  # 0: as it is
    return build.add("Reshape", [x, build.constant(np.array(sizes, np.int64), "shape")])


def _permute(build: OnnxBuilder, node: Node, x: str, args: tuple[Any, ...]) -> str:
    dims = len(build.value(node.name).shape)
    order = [dim % dims for dim in args[0]]
    build.any_batch &= order[0] == 0
    return build.add("Transpose", [x], perm=order)


def _transpose(build: OnnxBuilder, node: Node, x: str, args: tuple[Any, ...]) -> str:
    order = list(range(len(build.value(node.name).shape)))
    a, b = args
    order[a], order[b] = order[b], order[a]
    return _permute(build, node, x, (order,))


def _channel_shuffle(build: OnnxBuilder, node: Node, x: str, args: tuple[Any, ...]) -> str:
    channels = np.arange(build.value(node.name).shape[1], dtype=np.int64)
    order = channels.reshape(args[0], -1).T.reshape(-1)
    return build.add("Gather", [x, build.constant(order, "indices")], axis=1)


def _softmax(build: OnnxBuilder, node: Node, x: str, args: tuple[Any, ...]) -> str:
    if len(args) > 1 and args[1]:
        raise ValueError(f"softmax ({node.name!r}) converts to {args[1]}, which is not written")
    axis = args[0] % len(build.value(node.name).shape)
    build.any_batch &= axis > 0
    return build.add("Softmax", [x], axis=axis)


_TORCH: dict[str, Callable[[OnnxBuilder, Node, str, tuple[Any, ...]], str]] = {
    "aten.reshape.default": _reshape,
    "aten.flatten.using_ints": _reshape,
    "aten.squeeze.dim": _reshape,
    "aten.squeeze.dims": _reshape,
    "aten.unsqueeze.default": _reshape,
    "aten.permute.default": _permute,
    "aten.transpose.int": _transpose,
    "aten.channel_shuffle.default": _channel_shuffle,
    "aten.softmax.int": _softmax,
    "aten._softmax.default": _softmax,
}
