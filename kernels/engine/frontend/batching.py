"""Where the images of a batch are in each value of a graph, and the proof that none sees another:
what `other_batches="pad"` stands on.

A value's images lie along one dimension, the same number of entries each, in order. Every operation
has a rule that says along which dimension they come out, or raises: it adds up, sorts or multiplies
images with each other, or no rule is known. So a batch may be filled up with zeros, and the entries
of the images that were given are what they would be alone.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from resfuse.kernels.engine.ir.graph import Graph, Node, State, Torch
from resfuse.kernels.engine.ir.torch_operations import operation_named


@dataclass(frozen=True)
class Images:
    """Along `dim`, `each` entries an image."""

    dim: int
    each: int


@dataclass(frozen=True)
class Operand:
    """What an operation reads. `images` is None for what does not depend on the input; then `same`
    are dimensions along which all entries are the same."""

    shape: tuple[int, ...]
    images: Images | None
    same: frozenset[int] = frozenset()


class Unproved(Exception):
    """Why it is not known of an operation that it keeps images apart."""


def images_of_outputs(graph: Graph, state: State) -> tuple[Images, ...]:
    """Where the images are in each output of a graph for more than one.

    Raises:
        ValueError: images of some output are not known to be kept apart.
    """
    proofs: dict[str, Operand | Unproved] = {
        graph.input: Operand(graph.values[graph.input].shape, Images(0, 1))
    }
    for node in graph.nodes:
        try:
            proofs[node.name] = _of_node(graph, node, proofs, state)
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
    """The same for graphs by batch size; None where only one image fits, and none is padded.

    Raises:
        ValueError: as `images_of_outputs`; or they are elsewhere in batches of other sizes.
    """
    found = [images_of_outputs(graph, state) for size, graph in graphs.items() if size > 1]
    if any(images != found[0] for images in found):
        raise ValueError("argument other_batches: 'pad' is not possible: outputs differ by size")
    return found[0] if found else None


def _of_node(
    graph: Graph, node: Node, proofs: Mapping[str, Operand | Unproved], state: State
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
    call = Call(node.op, inputs, shape, graph.batch_size, state)
    made = call.name in _FILLED  # with one number, whatever the operand
    if made or not any(operand.images for operand in call.operands):
        return Operand(shape, None, _same(call))
    rule = _RULES.get(call.name)
    if rule is None:
        raise Unproved(f"{node.op.target} is not known to keep the images of a batch apart")
    return Operand(shape, rule(call))


def _of_ours(node: Node, inputs: list[Operand], shape: tuple[int, ...]) -> Images | None:
    """Convolutions, norms, pools and sums go image by image, along the first dimension."""
    if not any(operand.images for operand in inputs):
        return None
    images = _broadcast([Operand(o.shape[:1], o.images, o.same) for o in inputs], shape[:1])
    if images.dim != 0:
        raise Unproved(f"{node.name} has the images of a batch along dimension {images.dim}")
    return images


class Call:
    """An operation of torch's with its arguments by name."""

    def __init__(
        self, op: Torch, inputs: list[Operand], shape: tuple[int, ...], batch: int, state: State
    ) -> None:
        self.name = op.target.split(".")[1] if op.target.startswith("aten.") else op.target
        self.shape, self.batch = shape, batch
        self.operands: list[Operand] = []

        def read(arg: Any) -> Any:
            if isinstance(arg, list | tuple):
                return [read(item) for item in arg]
            if isinstance(arg, dict) and ("value" in arg or "state" in arg):
                own = inputs[arg["value"]] if "value" in arg else _of_state(state, arg["state"])
                self.operands.append(own)
                return own
            return arg

        schema = operation_named(op.target)._schema.arguments
        self.arguments = {a.name: a.default_value for a in schema if a.has_default_value()}
        self.arguments |= {a.name: read(v) for a, v in zip(schema, op.args, strict=False)}
        self.arguments |= {key: read(value) for key, value in op.kwargs}

    def __getitem__(self, name: str) -> Any:
        return self.arguments.get(name)

    @property
    def first(self) -> Operand:
        return next(iter(self.operands))

    def dims(self, of: Operand, *names: str) -> list[int] | None:
        """Dimensions that are given, counted from the front; None where none are."""
        given = next((self[n] for n in names if self[n] is not None), None)
        if given is None or given == []:
            return None
        return [d % max(1, len(of.shape)) for d in (given if isinstance(given, list) else [given])]


def _of_state(state: State, name: str) -> Operand:
    return Operand(tuple(state[name].shape), None)


_FILLED = ("zeros", "ones", "full", "new_zeros", "new_ones", "new_full")


def _same(call: Call) -> frozenset[int]:
    """Of a result without images: where all entries are the same."""
    whole = frozenset(range(len(call.shape)))
    if call.name in _FILLED:
        return whole
    if call.name in ("expand", "repeat") and len(call.operands) == 1:
        of = call.first
        before = len(call.shape) - len(of.shape)
        return frozenset(d for d in whole if d < before or of.shape[d - before] == 1)
    return frozenset()


# Rules: each returns where the images of the result are


def _broadcast(operands: Iterable[Operand], shape: tuple[int, ...]) -> Images:
    """Entries of one position of each, dimensions counted from the back."""
    operands = list(operands)
    found = {
        Images(o.images.dim + len(shape) - len(o.shape), o.images.each)
        for o in operands
        if o.images
    }
    if len(found) != 1:
        raise Unproved("images of a batch lie along different dimensions of what is joined")
    (images,) = found
    for operand in operands:
        at = images.dim - (len(shape) - len(operand.shape))
        if operand.images is None and at >= 0 and operand.shape[at] != 1 and at not in operand.same:
            raise Unproved("every image of a batch meets other numbers, by its position")
    return images


def _elementwise(call: Call) -> Images:
    return _broadcast(call.operands, call.shape)


def _only(call: Call) -> Images:
    """Of an operation that images come into by one tensor, the first."""
    images = call.first.images
    if images is None or any(operand.images for operand in call.operands[1:]):
        raise Unproved(f"{call.name} has a weight or an index that depends on the images")
    return images


def _spared(call: Call, dims: list[int] | None, images: Images) -> Images:
    if dims is None or images.dim in dims:
        raise Unproved(f"{call.name} goes across the images of a batch")
    return images


def _reduced(call: Call) -> Images:
    images, of = _only(call), call.first
    dims = call.dims(of, "dim", "dims")
    _spared(call, dims, images)
    gone = 0 if call["keepdim"] else sum(d < images.dim for d in dims or [])
    return Images(images.dim - gone, images.each)


def _along(call: Call) -> Images:
    """Works along a dimension that stays, as softmax."""
    return _spared(call, call.dims(call.first, "dim", "dims"), _only(call))


def _last(call: Call) -> Images:
    """Works along the last dimension, or those of `normalized_shape`."""
    images = _only(call)
    count = len(call["normalized_shape"] or [0])
    dims = list(range(len(call.first.shape) - count, len(call.first.shape)))
    return _spared(call, dims, images)


def _first_dimension(call: Call) -> Images:
    """Goes image by image, which are along the first dimension of [N, ...]."""
    images = _only(call)
    if images.dim != 0:
        raise Unproved(f"{call.name} has the images of a batch along dimension {images.dim}")
    return images


def _sampled(call: Call) -> Images:
    every = [Operand(o.shape[:1], o.images, o.same) for o in call.operands]
    return _broadcast(every, call.shape[:1])


def _reshaped(call: Call) -> Images:
    """The entries in their order, under other dimensions: those of an image stay together."""
    images, of = _only(call), call.first
    before, inside = math.prod(of.shape[: images.dim]), 1
    for dim, size in enumerate(call.shape):
        if inside == before and size % call.batch == 0 and size:
            return Images(dim, size // call.batch)
        inside *= size
    raise Unproved(f"{call.name} puts entries of several images into one row")


def _permuted(call: Call) -> Images:
    images, of = _only(call), call.first
    order = list(range(len(of.shape)))
    if call.name == "permute":
        order = call.dims(of, "dims") or order
    else:
        a, b = ((call[f"dim{i}"] or 0) % len(order) for i in (0, 1))
        order[a], order[b] = order[b], order[a]
    return Images(order.index(images.dim), images.each)


def _repeated(call: Call) -> Images:
    images, times = _only(call), call["repeats"]
    dim = images.dim + len(times) - len(call.first.shape)
    if times[dim] != 1:
        raise Unproved("repeat puts the images of a batch behind each other again")
    return Images(dim, images.each)


def _sliced(call: Call) -> Images:
    images, of = _only(call), call.first
    (dim,) = call.dims(of, "dim") or [0]
    if dim == images.dim and call.shape[dim] != of.shape[dim]:
        raise Unproved("slice takes some of the images of a batch")
    return images


def _selected(call: Call) -> Images:
    (dim,) = call.dims(call.first, "dim") or [0]
    images = _spared(call, [dim], _only(call))
    return Images(images.dim - (dim < images.dim), images.each)


def _parted(call: Call) -> Images:
    return _spared(call, call.dims(call.first, "dim") or [0], _only(call))


def _joined(call: Call) -> Images:
    dim = (call["dim"] or 0) % len(call.shape)
    if call.name == "stack":
        images = _broadcast(call.operands, call.operands[0].shape)
        return Images(images.dim + (dim <= images.dim), images.each)
    return _cat(call.operands, dim)


def _cat(operands: list[Operand], dim: int) -> Images:
    images = _broadcast(
        [Operand(_with(o.shape, dim, 1), o.images, o.same) for o in operands], operands[0].shape
    )
    if images.dim == dim:
        raise Unproved("cat puts the images of a batch behind others")
    return images


def _with(shape: tuple[int, ...], dim: int, size: int) -> tuple[int, ...]:
    return (*shape[:dim], size, *shape[dim + 1 :])


def _padded(call: Call) -> Images:
    images, sides = _only(call), call["pad"] or call["padding"]
    touched = [len(call.first.shape) - 1 - i // 2 for i, side in enumerate(sides) if side]
    return _spared(call, touched, images)


def _indexed(call: Call) -> Images:
    """By tensors that do not depend on the images, in dimensions that are not theirs."""
    images, of, indices = _only(call), call.first, call["indices"]
    at = [i for i, index in enumerate(indices) if index is not None]
    _spared(call, at, images)
    if images.dim < min(at):
        return images
    if max(at) - min(at) + 1 != len(at):
        raise Unproved("index puts what is picked in front of the images of a batch")
    rank = max(len(indices[i].shape) for i in at)
    assert images.dim < len(of.shape)
    return Images(images.dim - len(at) + rank, images.each)


def _looked_up(call: Call) -> Images:
    weight, indices = call.operands[:2]
    if weight.images is not None or indices.images is None:
        raise Unproved("embedding has a table that depends on the images")
    return indices.images


def _linear(call: Call) -> Images:
    return _spared(call, [len(call.first.shape) - 1], _only(call))


def _product(a: Operand, b: Operand, shape: tuple[int, ...]) -> Images:
    """[..., m, k] by [..., k, n]."""
    if min(len(a.shape), len(b.shape)) < 2:
        raise Unproved("a matrix times a vector, of images of a batch")
    for operand, summed in ((a, -1), (b, -2)):
        if operand.images and operand.images.dim == len(operand.shape) + summed:
            raise Unproved("matmul adds up over the images of a batch")
    rank = len(shape)
    outer = []
    for operand, free, images in ((a, -2, a.images), (b, -1, b.images)):
        dim = images.dim if images else -9
        if images and dim == len(operand.shape) + free:  # m or n: the other must not have images
            other = b if operand is a else a
            if other.images:
                raise Unproved("matmul multiplies the images of a batch with each other")
            return Images(rank + free, images.each)
        outer.append(Operand(operand.shape[:-2], images, operand.same))
    return _broadcast(outer, shape[:-2])


def _matmul(call: Call) -> Images:
    a, b = call.operands[:2]
    return _product(a, b, call.shape)


def _added_matmul(call: Call) -> Images:
    added, a, b = call.operands[:3]
    made = Operand(call.shape, _product(a, b, call.shape))
    return _broadcast([added, made], call.shape)


def _attention(call: Call) -> Images:
    q, k, v = call.operands[:3]
    scores = (*q.shape[:-1], k.shape[-2])
    turned = Operand((*k.shape[:-2], k.shape[-1], k.shape[-2]), _turned(k), k.same)
    made = Operand(scores, _product(q, turned, scores))
    masked = Operand(scores, _broadcast([made, *call.operands[3:]], scores))
    return _product(masked, v, call.shape)


def _turned(k: Operand) -> Images | None:
    images, rank = k.images, len(k.shape)
    if images is None or images.dim < rank - 2:
        return images
    return Images(2 * rank - 3 - images.dim, images.each)


def _rules(rule: Callable[[Call], Images], names: str) -> dict[str, Callable[[Call], Images]]:
    return dict.fromkeys(names.split(), rule)


_RULES: dict[str, Callable[[Call], Images]] = {
    **_rules(
        _elementwise,
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
        _reduced,
        "amax amin argmax argmin mean sum std var logsumexp prod max min all any "
        "norm linalg_vector_norm",
    ),
    **_rules(_along, "softmax _softmax log_softmax _log_softmax cumsum sort topk flip roll glu"),
    **_rules(_last, "layer_norm native_layer_norm rms_norm"),
    **_rules(
        _first_dimension,
        """
        adaptive_avg_pool1d adaptive_avg_pool2d adaptive_max_pool2d avg_pool1d avg_pool2d avg_pool3d
        _native_batch_norm_legit_no_training channel_shuffle conv1d conv2d conv3d conv_transpose1d
        conv_transpose2d conv_transpose3d group_norm im2col max_pool1d max_pool2d
        max_pool2d_with_indices max_pool3d pixel_shuffle pixel_unshuffle prelu _prelu_kernel
        upsample_bicubic2d upsample_bilinear2d upsample_linear1d upsample_nearest1d
        upsample_nearest2d _upsample_bicubic2d_aa _upsample_bilinear2d_aa _upsample_nearest_exact2d
        """,
    ),
    **_rules(_sampled, "grid_sampler grid_sampler_2d"),
    **_rules(_reshaped, "reshape view flatten unflatten squeeze unsqueeze"),
    **_rules(_permuted, "permute transpose"),
    **_rules(_parted, "split split_with_sizes unsafe_split chunk index_select"),
    **_rules(_selected, "select unbind"),
    **_rules(_joined, "cat stack"),
    **_rules(_padded, "pad constant_pad_nd reflection_pad1d reflection_pad2d replication_pad2d"),
    **_rules(_matmul, "matmul mm bmm"),
    **_rules(_added_matmul, "addmm baddbmm"),
    "repeat": _repeated,
    "slice": _sliced,
    "index": _indexed,
    "embedding": _looked_up,
    "linear": _linear,
    "scaled_dot_product_attention": _attention,
}
