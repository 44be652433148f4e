"""OPERATORS: what each operator of ONNX is in torch.

A function `(reader, node, *inputs) -> value(s)` each; inputs that are left out are None or not
given. It asks the node for every attribute that it heeds: one left over is refused.
"""

from resfuse.kernels.onnx_reader.operators.activations import ACTIVATIONS
from resfuse.kernels.onnx_reader.operators.arithmetic import ARITHMETIC
from resfuse.kernels.onnx_reader.operators.convolution_layers import CONVOLUTIONS
from resfuse.kernels.onnx_reader.operators.linear import LINEAR
from resfuse.kernels.onnx_reader.operators.norms import NORMS
from resfuse.kernels.onnx_reader.operators.padding import PADDING
from resfuse.kernels.onnx_reader.operators.pools import POOLS
from resfuse.kernels.onnx_reader.operators.quantize_linear import QUANTIZATION
from resfuse.kernels.onnx_reader.operators.reductions import REDUCTIONS
from resfuse.kernels.onnx_reader.operators.resizing import RESIZING
from resfuse.kernels.onnx_reader.operators.selections import SELECTIONS
from resfuse.kernels.onnx_reader.operators.shapes import SHAPES
from resfuse.kernels.onnx_reader.reading.node import Operators

OPERATORS: Operators = {
    **CONVOLUTIONS,
    **LINEAR,
    **NORMS,
    **ACTIVATIONS,
    **POOLS,
    **ARITHMETIC,
    **REDUCTIONS,
    **SHAPES,
    **SELECTIONS,
    **PADDING,
    **RESIZING,
    **QUANTIZATION,
}
