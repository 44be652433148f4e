"""The proof that no image of a batch sees another: what `other_batches="pad"` relies on.

Every operation has a rule that says along which dimension the images come out, or refuses: the
operation adds up, sorts or multiplies images with each other, or no rule for it is known. Where all
rules agree, a batch may be filled up with zeros, and the entries of the images that were given are
what they would be alone.
"""

from collections.abc import Callable, Mapping

from resfuse.kernels.engine.frontend.batching import computing_rules as computing
from resfuse.kernels.engine.frontend.batching import rearranging_rules as rearranging
from resfuse.kernels.engine.frontend.batching.image_dimension import (
    Images,
    Operand,
    TorchCall,
    Unproved,
    broadcast,
)
from resfuse.kernels.engine.ir.derived_state import with_derived
from resfuse.kernels.engine.ir.graph import Graph, Node, State, Torch


def images_of_outputs(graph: Graph, state: State) -> tuple[Images, ...]:
    """Returns where the images are in each output of a graph for several images.

    Raises:
        ValueError: images of some output are not known to be kept apart.
    """
    proofs: dict[str, Operand | Unproved] = {
        graph.input: Operand(graph.values[graph.input].shape, Images(0, 1))
    }
    weights = _weights(graph, state)
    for node in graph.nodes:
        try:
            proofs[node.name] = _of_node(graph, node, proofs, weights)
        except Unproved as why:
            proofs[node.name] = why
    found = []
    for i, name in enumerate(graph.outputs):
        known = proofs[name]
        images = known.images if isinstance(known, Operand) else None
        if images is None:
            said = str(known) if isinstance(known, Unproved) else "it does not depend on the input"
            raise ValueError(f"argument other_batches: 'pad' is not possible: output {i}: {said}")
        found.append(images)
    return tuple(found)


def images_at_all_sizes(graphs: Mapping[int, Graph], state: State) -> tuple[Images, ...] | None:
    """Returns where the images are in the outputs of graphs by batch size; None where all of them
    take a single image, since such a batch is never padded.

    Raises:
        ValueError: as `images_of_outputs`; or the outputs of two sizes differ.
    """
    found = [images_of_outputs(graph, state) for size, graph in graphs.items() if size > 1]
    if any(images != found[0] for images in found):
        raise ValueError("argument other_batches: 'pad' is not possible: outputs differ by size")
    return found[0] if found else None


def _weights(graph: Graph, state: State) -> dict[str, Operand]:
    """Returns the state, with what is derived from it, as operands."""
    known = with_derived(graph, state)
    found = {name: Operand(tuple(tensor.shape), None) for name, tensor in known.items()}
    for node in graph.derived:
        assert isinstance(node.op, Torch)
        shape = found[node.name].shape
        call = TorchCall(node.op, [], shape, graph.batch_size, found)
        found[node.name] = Operand(shape, None, _same(call))
    return found


def _of_node(
    graph: Graph,
    node: Node,
    proofs: Mapping[str, Operand | Unproved],
    weights: Mapping[str, Operand],
) -> Operand:
    inputs = []
    for name in node.inputs:
        known = proofs[name]
        if isinstance(known, Unproved):
            raise known
        inputs.append(known)
    shape = graph.values[node.name].shape
    if not isinstance(node.op, Torch):
        return Operand(shape, _of_ours(node, inputs, shape))
    call = TorchCall(node.op, inputs, shape, graph.batch_size, weights)
    filled = call.name in _FILLED  # with one number, whatever the operand
    if filled or not any(operand.images for operand in call.operands):
        return Operand(shape, None, _same(call))
    rule = _RULES.get(call.name)
    if rule is None:
        raise Unproved(f"{node.op.target} is not known to keep the images of a batch apart")
    return Operand(shape, rule(call))


def _of_ours(node: Node, inputs: list[Operand], shape: tuple[int, ...]) -> Images | None:
    """Returns the images of an operation that resfuse computes: convolutions, norms, pools and sums
    go image by image, along the first dimension."""
    if not any(operand.images for operand in inputs):
        return None
    images = broadcast([Operand(o.shape[:1], o.images, o.same) for o in inputs], shape[:1])
    if images.dim != 0:
        raise Unproved(f"{node.name} has the images of a batch along dimension {images.dim}")
    return images


_FILLED = ("zeros", "ones", "full", "new_zeros", "new_ones", "new_full")


def _same(call: TorchCall) -> frozenset[int]:
    """Returns the dimensions along which all entries of a result without images are equal."""
    whole = frozenset(range(len(call.shape)))
    if call.name in _FILLED:
        return whole
    if call.name in ("expand", "repeat") and len(call.operands) == 1:
        of = call.first
        before = len(call.shape) - len(of.shape)
        return frozenset(d for d in whole if d < before or of.shape[d - before] == 1)
    return frozenset()


def _rules(
    rule: Callable[[TorchCall], Images], names: str
) -> dict[str, Callable[[TorchCall], Images]]:
    return dict.fromkeys(names.split(), rule)


_RULES: dict[str, Callable[[TorchCall], Images]] = {
    **_rules(
        computing.elementwise,
        """
        abs add addcdiv addcmul alias atan atan2 bitwise_and bitwise_not bitwise_or ceil celu clamp
        clamp_max clamp_min clone contiguous cos detach div elu eq erf exp expand expm1 fill floor
        floor_divide fmod full_like ge gelu gt hardshrink hardsigmoid hardswish hardtanh isfinite
        isinf isnan le leaky_relu lerp log log1p log10 log2 log_sigmoid logical_and logical_not
        logical_or logical_xor lt masked_fill maximum minimum mish mul nan_to_num ne neg ones_like
        pow reciprocal relu relu6 remainder round rsqrt rsub selu sigmoid sign silu sin softplus
        softshrink sqrt square sub tan tanh threshold to _to_copy trunc where xlogy zeros_like
        """,
    ),
    **_rules(
        computing.reduced,
        "amax amin argmax argmin mean sum std var logsumexp prod max min all any "
        "norm linalg_vector_norm",
    ),
    **_rules(
        computing.along, "softmax _softmax log_softmax _log_softmax cumsum sort topk flip roll glu"
    ),
    **_rules(computing.last, "layer_norm native_layer_norm rms_norm"),
    **_rules(
        computing.first_dimension,
        """
        adaptive_avg_pool1d adaptive_avg_pool2d adaptive_max_pool2d avg_pool1d avg_pool2d avg_pool3d
        _native_batch_norm_legit_no_training channel_shuffle conv1d conv2d conv3d conv_transpose1d
        conv_transpose2d conv_transpose3d group_norm im2col max_pool1d max_pool2d
        max_pool2d_with_indices max_pool3d pixel_shuffle pixel_unshuffle prelu _prelu_kernel
        upsample_bicubic2d upsample_bilinear2d upsample_linear1d upsample_nearest1d
        upsample_nearest2d _upsample_bicubic2d_aa _upsample_bilinear2d_aa _upsample_nearest_exact2d
        """,
    ),
    **_rules(computing.sampled, "grid_sampler grid_sampler_2d"),
    **_rules(rearranging.reshaped, "reshape view flatten unflatten squeeze unsqueeze"),
    **_rules(rearranging.permuted, "permute transpose"),
    **_rules(rearranging.parted, "split split_with_sizes unsafe_split chunk index_select"),
    **_rules(rearranging.selected, "select unbind"),
    **_rules(rearranging.joined, "cat stack"),
    **_rules(
        rearranging.padded,
        "pad constant_pad_nd reflection_pad1d reflection_pad2d replication_pad2d",
    ),
    **_rules(computing.matmul, "matmul mm bmm"),
    **_rules(computing.added_matmul, "addmm baddbmm"),
    "repeat": rearranging.repeated,
    "slice": rearranging.sliced,
    "index": rearranging.indexed,
    "embedding": rearranging.looked_up,
    "linear": computing.linear,
    "scaled_dot_product_attention": computing.attention,
}
