"""Rules for operations that move entries without computing on them: reshape, permute, slice, cat,
pad, index and the like. Each returns where the images of the result are, or raises Unproved.
"""

import math

from resfuse.kernels.engine.frontend.batching.image_dimension import (
    Images,
    Operand,
    TorchCall,
    Unproved,
    broadcast,
    images_of_first,
    images_outside,
)


def reshaped(call: TorchCall) -> Images:
    """Applies to reshapes: entries keep their order, and those of an image stay together."""
    images, of = images_of_first(call), call.first
    before, inside = math.prod(of.shape[: images.dim]), 1
    for dim, size in enumerate(call.shape):
        if inside == before and size % call.batch == 0 and size:
            return Images(dim, size // call.batch)
        inside *= size
    raise Unproved(f"{call.name} puts entries of several images into one row")


def permuted(call: TorchCall) -> Images:
    images, of = images_of_first(call), call.first
    order = list(range(len(of.shape)))
    if call.name == "permute":
        order = call.dims(of, "dims") or order
    else:
        a, b = ((call[f"dim{i}"] or 0) % len(order) for i in (0, 1))
        order[a], order[b] = order[b], order[a]
    return Images(order.index(images.dim), images.each)


def repeated(call: TorchCall) -> Images:
    images, times = images_of_first(call), call["repeats"]
    dim = images.dim + len(times) - len(call.first.shape)
    if times[dim] != 1:
        raise Unproved("repeat puts the images of a batch behind each other again")
    return Images(dim, images.each)


def sliced(call: TorchCall) -> Images:
    images, of = images_of_first(call), call.first
    (dim,) = call.dims(of, "dim") or [0]
    if dim == images.dim and call.shape[dim] != of.shape[dim]:
        raise Unproved("slice takes some of the images of a batch")
    return images


def selected(call: TorchCall) -> Images:
    (dim,) = call.dims(call.first, "dim") or [0]
    images = images_outside(call, [dim], images_of_first(call))
    return Images(images.dim - (dim < images.dim), images.each)


def parted(call: TorchCall) -> Images:
    return images_outside(call, call.dims(call.first, "dim") or [0], images_of_first(call))


def joined(call: TorchCall) -> Images:
    dim = (call["dim"] or 0) % len(call.shape)
    if call.name == "stack":
        images = broadcast(call.operands, call.operands[0].shape)
        return Images(images.dim + (dim <= images.dim), images.each)
    return _cat(call.operands, dim)


def _cat(operands: list[Operand], dim: int) -> Images:
    images = broadcast(
        [Operand(_with(o.shape, dim, 1), o.images, o.same) for o in operands], operands[0].shape
    )
    if images.dim == dim:
        raise Unproved("cat puts the images of a batch behind others")
    return images


def _with(shape: tuple[int, ...], dim: int, size: int) -> tuple[int, ...]:
    return (*shape[:dim], size, *shape[dim + 1 :])


def padded(call: TorchCall) -> Images:
    images, sides = images_of_first(call), call["pad"] or call["padding"]
    touched = [len(call.first.shape) - 1 - i // 2 for i, side in enumerate(sides) if side]
    return images_outside(call, touched, images)


def indexed(call: TorchCall) -> Images:
    """Applies to indexing by tensors without images, in dimensions other than the images'."""
    images, of, indices = images_of_first(call), call.first, call["indices"]
    at = [i for i, index in enumerate(indices) if index is not None]
    images_outside(call, at, images)
    if images.dim < min(at):
        return images
    if max(at) - min(at) + 1 != len(at):
        raise Unproved("index puts what is picked in front of the images of a batch")
    rank = max(len(indices[i].shape) for i in at)
    assert images.dim < len(of.shape)
    return Images(images.dim - len(at) + rank, images.each)


def looked_up(call: TorchCall) -> Images:
    weight, indices = call.operands[:2]
    if weight.images is not None or indices.images is None:
        raise Unproved("embedding has a table that depends on the images")
    return indices.images
