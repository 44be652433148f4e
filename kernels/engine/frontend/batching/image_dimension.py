"""Describes where the images of a batch are in the operands and the result of an operation.

The images of a value lie along one dimension, in order, with the same number of entries each.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from resfuse.kernels.engine.ir.graph import Torch
from resfuse.kernels.engine.ir.torch_operations import operation_named


@dataclass(frozen=True)
class Images:
    """The images of a value: `each` consecutive entries an image along dimension `dim`."""

    dim: int
    each: int


@dataclass(frozen=True)
class Operand:
    """A tensor that an operation reads.

    Attributes:
        images: None for a tensor that does not depend on the input.
        same: the dimensions along which all entries of such a tensor are equal.
    """

    shape: tuple[int, ...]
    images: Images | None
    same: frozenset[int] = frozenset()


class Unproved(Exception):
    """Says why an operation is not known to keep the images of a batch apart."""


class TorchCall:
    """A torch operation with its arguments by name; tensors among them are operands."""

    def __init__(
        self,
        op: Torch,
        inputs: list[Operand],
        shape: tuple[int, ...],
        batch: int,
        weights: Mapping[str, Operand],
    ) -> None:
        self.name = op.target.split(".")[1] if op.target.startswith("aten.") else op.target
        self.shape, self.batch = shape, batch
        self.operands: list[Operand] = []

        def read(arg: Any) -> Any:
            if isinstance(arg, list | tuple):
                return [read(item) for item in arg]
            if isinstance(arg, dict) and ("value" in arg or "state" in arg):
                own = inputs[arg["value"]] if "value" in arg else weights[arg["state"]]
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
        """Returns the dimensions given under the first of `names` that is set, counted from the
        front; None where none is set."""
        given = next((self[n] for n in names if self[n] is not None), None)
        if given is None or given == []:
            return None
        return [d % max(1, len(of.shape)) for d in (given if isinstance(given, list) else [given])]


def broadcast(operands: Iterable[Operand], shape: tuple[int, ...]) -> Images:
    """Returns the images of a result in which entries of equal positions meet, with dimensions
    aligned at the last one as torch broadcasts them."""
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


def images_of_first(call: TorchCall) -> Images:
    """Returns the images of the first operand; raises Unproved if another one has images, too."""
    images = call.first.images
    if images is None or any(operand.images for operand in call.operands[1:]):
        raise Unproved(f"{call.name} has a weight or an index that depends on the images")
    return images


def images_outside(call: TorchCall, dims: list[int] | None, images: Images) -> Images:
    """Returns `images`; raises Unproved if the call may work across them, along `dims`."""
    if dims is None or images.dim in dims:
        raise Unproved(f"{call.name} goes across the images of a batch")
    return images
