"""Lists the torch operations that are known to only compute, and those of them that accept any
numbers.

A name is ATen's ("aten.sigmoid.default"), that of torch's own quantisation
("quantized_decomposed.quantize_per_tensor.default") or of a package which registered it with
torch.library ("torchvision.roi_align.default"). Candidates are timed on random numbers, and an
index out of range raises an exception on a CPU but ends the process on a GPU.
"""

import importlib
from collections.abc import Callable
from functools import reduce
from typing import Any

import torch

from resfuse.kernels.engine.ir.graph import Graph, Node, Torch


def _names(listed: str) -> frozenset[str]:
    return frozenset(listed.split())


# ATen operations, without overloads, that accept any numbers.
_ANY_NUMBERS = _names(
    """
    abs add addcdiv addcmul amax amin aminmax any all arange argmax argmin atan atan2 bitwise_and
    bitwise_not bitwise_or bitwise_xor ceil celu clamp clamp_max clamp_min clone contiguous
    copysign cos cumsum detach div elu eq erf exp expm1 eye fill floor
    floor_divide fmod frac full full_like gelu ge gt hardshrink hardsigmoid hardswish hardtanh
    isfinite isinf isnan le leaky_relu lerp log log10 log1p log2 linspace log_sigmoid log_softmax
    _log_softmax logical_and logical_not logical_or logical_xor logsumexp lt masked_fill max maximum
    mean median min minimum mish mul nan_to_num ne neg new_full new_ones new_zeros norm ones
    ones_like pow prelu _prelu_kernel prod real reciprocal relu relu6 remainder round rsqrt rsub
    scalar_tensor selu sigmoid sign silu sin softmax _softmax softplus softshrink sqrt
    square std sub sum tan tanh threshold to _to_copy tril triu trunc var var_mean where
    xlogy zeros zeros_like

    linear matmul mm bmm addmm addbmm baddbmm einsum dot mv outer bilinear tensordot
    scaled_dot_product_attention linalg_vector_norm frobenius_norm cosine_similarity cdist

    conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution
    batch_norm group_norm instance_norm layer_norm rms_norm native_batch_norm native_group_norm
    native_layer_norm _native_batch_norm_legit _native_batch_norm_legit_no_training _weight_norm

    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d _adaptive_avg_pool2d
    adaptive_max_pool1d adaptive_max_pool2d avg_pool1d avg_pool2d avg_pool3d max_pool1d max_pool2d
    max_pool2d_with_indices max_pool3d fractional_max_pool2d im2col col2im grid_sampler
    grid_sampler_2d affine_grid_generator upsample_bicubic2d _upsample_bicubic2d_aa
    upsample_bilinear2d _upsample_bilinear2d_aa upsample_linear1d upsample_nearest1d
    upsample_nearest2d upsample_nearest3d upsample_trilinear3d _upsample_nearest_exact1d
    _upsample_nearest_exact2d

    alias broadcast_to cat channel_shuffle chunk constant_pad_nd copy diagonal diagonal_scatter
    expand flatten flip glu hstack lift_fresh_copy meshgrid movedim narrow pad permute pixel_shuffle
    pixel_unshuffle reflection_pad1d reflection_pad2d repeat repeat_interleave replication_pad1d
    replication_pad2d reshape roll rot90 select select_scatter slice slice_scatter sort split
    split_with_sizes squeeze stack t topk transpose unbind unflatten unfold unsafe_split unsqueeze
    view _unsafe_view view_as vstack
    """
)
# Those that accept any floats; integers are indices and must be in range.
_ANY_FLOATS = _names(
    "embedding gather index index_select one_hot scatter scatter_add take_along_dim index_put "
    "_unsafe_index"
)
# Those that accept some numbers only.
_PARTICULAR = _names(
    """
    acos asin atanh binary_cross_entropy bucketize erfinv histc linalg_cholesky linalg_cholesky_ex
    linalg_det linalg_eigh linalg_householder_product linalg_inv linalg_inv_ex linalg_matrix_exp
    matrix_exp linalg_matrix_norm linalg_qr linalg_solve linalg_solve_ex linalg_svd
    linalg_solve_triangular logit
    """
)
# What programs quantised by PT2E have, in a namespace of its own.
_QUANTIZED, _QUANTIZES = (
    "quantized_decomposed",
    _names(
        """
    quantize_per_tensor dequantize_per_tensor choose_qparams choose_qparams_symmetric
    quantize_per_channel dequantize_per_channel convert_element_type
    quantize_per_token dequantize_per_token choose_qparams_per_token
    _choose_qparams_per_token_asymmetric_impl choose_qparams_per_token_asymmetric
    quantize_per_channel_group dequantize_per_channel_group
    """
    ),
)
_PURE = {"aten": _ANY_NUMBERS | _ANY_FLOATS | _PARTICULAR, _QUANTIZED: _QUANTIZES}


def operation_named(name: str) -> torch._ops.OpOverload[..., Any]:
    """Returns an operation of torch's dispatcher by a name such as `aten.sigmoid.default`.

    Raises:
        ValueError: no such operation is registered.
    """
    if name.startswith(f"{_QUANTIZED}."):
        importlib.import_module("torch.ao.quantization.fx._decomposed")  # which registers them
    try:
        found = reduce(getattr, name.split("."), torch.ops)
    except (AttributeError, RuntimeError):
        found = None
    if not isinstance(found, torch._ops.OpOverload):
        raise ValueError(f"there is no operation {name}; import the package that registers it")
    return found


# torch's functions that call the operation of the name with the same arguments. To call an
# operation itself from Python takes 1.5 to 4 us longer (one core of an EPYC Milan), and there are
# 357 calls in LeViT-128S, which runs in 26 ms.
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "aten.add.Tensor": torch.add,
    "aten.cat.default": torch.cat,
    "aten.gelu.default": torch.nn.functional.gelu,
    "aten.hardswish.default": torch.nn.functional.hardswish,
    "aten.layer_norm.default": torch.layer_norm,
    "aten.linear.default": torch.nn.functional.linear,
    "aten.matmul.default": torch.matmul,
    "aten.mul.Tensor": torch.mul,
    "aten.permute.default": torch.permute,
    "aten.reshape.default": torch.reshape,
    "aten.select.int": torch.select,
    "aten.softmax.int": torch.softmax,
    "aten.split_with_sizes.default": torch.split_with_sizes,
    "aten.transpose.int": torch.transpose,
    "aten.unsqueeze.default": torch.unsqueeze,
}


def function_named(name: str) -> Callable[..., Any]:
    """Returns a function that calls an operation, as `operation_named` finds it."""
    return _FUNCTIONS.get(name) or operation_named(name)


def is_pure(name: str) -> bool:
    """Returns whether the operation is known to only compute its result: it writes to no argument,
    draws no random numbers, and touches neither files nor the process."""
    namespace, _, rest = name.partition(".")
    if rest.split(".")[0] not in _PURE.get(namespace, ()):
        return False
    operation = operation_named(name)
    return not operation._schema.is_mutable


def draws(op: Torch) -> bool:
    """Returns whether an operation draws from torch's random generator when it runs."""
    operation = operation_named(op.target)
    if torch.Tag.nondeterministic_seeded not in operation.tags:
        return False
    names = [argument.name for argument in operation._schema.arguments]
    given = dict(zip(names, op.args, strict=False)) | dict(op.kwargs)
    return "dropout_p" not in names or bool(given.get("dropout_p", 0))


def accepts_random_inputs(part: Graph) -> bool:
    """Returns whether a graph may be run on random numbers and ones."""
    return all(_takes(part, node) for node in part.nodes)


def _takes(part: Graph, node: Node) -> bool:
    if not isinstance(node.op, Torch) or not node.inputs:
        return True  # without inputs it reads the state only
    namespace, name, *_ = node.op.target.split(".")
    if namespace != "aten":
        return False
    floats = all(part.values[i].dtype.is_floating_point for i in node.inputs)
    return name in _ANY_NUMBERS or (name in _ANY_FLOATS and floats)
