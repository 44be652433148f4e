"""load_onnx: an ONNX file as a torch.fx.GraphModule of ordinary torch layers.

model = load_onnx("resnet18.onnx")
engine = build_engine(model, images)
"""

from collections.abc import Sequence
from pathlib import Path

import torch.fx as fx


def load_onnx(path: str | Path, input_shape: Sequence[int | None] | None = None) -> fx.GraphModule:
    """Reads a convolutional network from an ONNX file.

    Convolutions, batch norms, pools, linear layers and activations become torch.nn modules, so that
    `fuse` and `build_engine` know them; everything else becomes plain torch functions. Shapes are
    static: nothing reads one at run time. The batch is left free where the file leaves it free and
    nothing in the network needs its size; `module.meta["batch_size"]` is None then, and otherwise
    the only one it takes. `module.meta["input_shape"]` is what it was read for; it refuses others.

    Args:
        path: an .onnx file of operator set 7 or later with one input of floating-point numbers, or
            of uint8 that a Cast or DequantizeLinear makes such of; the module takes that dtype.
            Nothing in it is executed; external data must lie in its folder.
        input_shape: of the input, where the file leaves sizes open; None as the first size demands
            that the batch stays free.

    Returns:
        the module, in eval mode. Several outputs come as a tuple, in the file's order.

    Raises:
        ValueError: the file cannot be read, or holds what is not read (it is named), or its input
            needs `input_shape`.
        ModuleNotFoundError: the package onnx is not installed.
    """
    # onnx is an optional package.
    from resfuse.kernels.onnx_reader.operators import OPERATORS
    from resfuse.kernels.onnx_reader.reading.graph_reader import read_graph
    from resfuse.kernels.onnx_reader.reading.model_file import read_model

    return read_graph(read_model(Path(path)), OPERATORS, input_shape)
