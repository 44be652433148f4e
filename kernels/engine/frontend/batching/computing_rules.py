"""Rules for operations that compute: elementwise, reductions, norms, matrix products, attention.
Each returns where the images of the result are, or raises Unproved.
"""

from resfuse.kernels.engine.frontend.batching.image_dimension import (
    Images,
    Operand,
    TorchCall,
    Unproved,
    broadcast,
    images_of_first,
    images_outside,
)


def elementwise(call: TorchCall) -> Images:
    return broadcast(call.operands, call.shape)


def reduced(call: TorchCall) -> Images:
    images, of = images_of_first(call), call.first
    dims = call.dims(of, "dim", "dims")
    images_outside(call, dims, images)
    gone = 0 if call["keepdim"] else sum(d < images.dim for d in dims or [])
    return Images(images.dim - gone, images.each)


def along(call: TorchCall) -> Images:
    """Applies to operations along a dimension that stays, such as softmax."""
    return images_outside(call, call.dims(call.first, "dim", "dims"), images_of_first(call))


def last(call: TorchCall) -> Images:
    """Applies to norms over the last dimension, or over those of `normalized_shape`."""
    images = images_of_first(call)
    count = len(call["normalized_shape"] or [0])
    dims = list(range(len(call.first.shape) - count, len(call.first.shape)))
    return images_outside(call, dims, images)


def first_dimension(call: TorchCall) -> Images:
    """Applies to operations that go image by image along the first dimension of [N, ...]."""
    images = images_of_first(call)
    if images.dim != 0:
        raise Unproved(f"{call.name} has the images of a batch along dimension {images.dim}")
    return images


def sampled(call: TorchCall) -> Images:
    every = [Operand(o.shape[:1], o.images, o.same) for o in call.operands]
    return broadcast(every, call.shape[:1])


def linear(call: TorchCall) -> Images:
    return images_outside(call, [len(call.first.shape) - 1], images_of_first(call))


def _product(a: Operand, b: Operand, shape: tuple[int, ...]) -> Images:
    """Returns the images of [..., m, k] @ [..., k, n]."""
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
    return broadcast(outer, shape[:-2])


def matmul(call: TorchCall) -> Images:
    a, b = call.operands[:2]
    return _product(a, b, call.shape)


def added_matmul(call: TorchCall) -> Images:
    added, a, b = call.operands[:3]
    product = Operand(call.shape, _product(a, b, call.shape))
    return broadcast([added, product], call.shape)


def attention(call: TorchCall) -> Images:
    q, k, v = call.operands[:3]
    scores = (*q.shape[:-1], k.shape[-2])
    transposed = Operand((*k.shape[:-2], k.shape[-1], k.shape[-2]), _transposed(k), k.same)
    products = Operand(scores, _product(q, transposed, scores))
    masked = Operand(scores, broadcast([products, *call.operands[3:]], scores))
    return _product(masked, v, call.shape)


def _transposed(k: Operand) -> Images | None:
    images, rank = k.images, len(k.shape)
    if images is None or images.dim < rank - 2:
        return images
    return Images(2 * rank - 3 - images.dim, images.each)
