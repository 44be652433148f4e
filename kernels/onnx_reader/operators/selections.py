"""What takes parts of a tensor: slices, splits, gathers."""

import operator
from typing import TYPE_CHECKING, Any

import torch

from resfuse.kernels.onnx_reader.operators.shapes import dim_of, ints_of, reshaped
from resfuse.kernels.onnx_reader.reading.node import OnnxNode, Operators
from resfuse.kernels.onnx_reader.reading.values import Computed, Constant, NeedsBatch, Value

if TYPE_CHECKING:
    from resfuse.kernels.onnx_reader.reading.graph_reader import Reader


def _slice(
    reader: "Reader", node: OnnxNode, x: Value, starts: Value | None = None,
    ends: Value | None = None, axes: Value | None = None, steps: Value | None = None,
) -> Value:  # fmt: skip
    x = reader.computed(x)
    per_size = [_bounds(node, (starts, ends, axes, steps), i) for i in range(len(x.metas))]
    backwards: list[int] = []
    parts: list[Any] = [slice(None)] * x.rank
    for which in range(len(per_size[0])):
        found = set()
        for shape, bounds in zip(x.shapes, per_size, strict=True):
            start, end, axis, step = bounds[which]
            dim = dim_of(node, axis, x.rank)
            if step == 0:
                raise node.refusal("a step of 0")
            found.add((dim, _part(shape[dim], start, end, step)))
        if len(found) > 1:
            raise NeedsBatch
        ((dim, part),) = found
        if part is None:
            continue
        if parts[dim] != slice(None):
            raise node.refusal(f"axis {dim} twice")
        first, last, by, is_backwards = part
        parts[dim] = slice(first, last, by)
        backwards += [dim] * is_backwards
    if backwards:
        x = reader.call(torch.flip, x, tuple(backwards))
    if all(part == slice(None) for part in parts):
        return x
    return reader.call(operator.getitem, x, tuple(parts))


def _part(size: int, start: int, end: int, step: int) -> tuple[int, int | None, int, bool] | None:
    """(start, end, step, backwards) of a dimension; None where all of it is taken.

    An end at or behind the last entry is None, so that it says the same of every size.
    """
    first, last, step = slice(start, end, step).indices(size)
    if step > 0:
        if first == 0 and last == size and step == 1:
            return None
        return first, None if last == size else last, step, False
    # Of the entries in reverse order.
    first, last = size - 1 - first, size - 1 - last
    return first, None if last >= size else last, -step, True


def _bounds(
    node: OnnxNode, inputs: tuple[Value | None, ...], i: int
) -> list[tuple[int, int, int, int]]:
    """(start, end, axis, step) for each axis, for the i-th size of the batch."""
    if node.opset < 10:
        starts, ends, axes = (node.ints(name) for name in ("starts", "ends", "axes"))
        steps = None
    else:
        lists = []
        for value in inputs:
            if isinstance(value, Computed):
                raise node.refusal("a bound that is computed while the network runs")
            given = None if value is None else [int(each) for each in value.arrays[i].reshape(-1)]
            lists.append(given)
        starts, ends, axes, steps = lists
    if starts is None or ends is None:
        raise node.refusal("a slice without bounds")
    axes = list(range(len(starts))) if axes is None else axes
    steps = [1] * len(starts) if steps is None else steps
    return list(zip(starts, ends, axes, steps, strict=True))


def _split(
    reader: "Reader", node: OnnxNode, x: Value, sizes: Value | None = None
) -> tuple[Computed, ...]:
    x = reader.computed(x)
    dim = dim_of(node, node.attribute("axis", 0), x.rank)
    given = node.ints("split") if node.opset < 13 else ints_of(node, sizes, "sizes")
    parts = len(node.outputs)
    node.require("num_outputs", parts)
    size = x.size(dim)
    if given is None:
        if node.opset < 18 and size % parts:
            raise node.refusal(f"{size} in {parts} equal parts")
        each = -(-size // parts)
        given = [each] * (parts - 1) + [size - each * (parts - 1)]
    if sum(given) != size or len(given) != parts or min(given) < 0:
        raise node.refusal(f"{size} in parts of {given}")
    return reader.calls(parts, torch.split, x, tuple(given), dim)


def _gather(reader: "Reader", node: OnnxNode, x: Value, indices: Value) -> Computed:
    x = reader.computed(x)
    dim = dim_of(node, node.attribute("axis", 0), x.rank)
    if not isinstance(indices, Constant):
        raise node.refusal("an index that is computed while the network runs")
    size, given = x.size(dim), indices.array
    if given.size and not (-size <= given.min() and given.max() < size):
        raise node.refusal(f"an index beyond {size}")
    if given.ndim == 0:
        return reader.call(torch.select, x, dim, int(given) % size)
    flat = reader.constant(indices.name, given.reshape(-1) % size)
    found = reader.call(torch.index_select, x, dim, flat)
    if given.ndim == 1:
        return found
    return reshaped(reader, found, [(*s[:dim], *given.shape, *s[dim + 1 :]) for s in x.shapes])


SELECTIONS: Operators = {"Slice": _slice, "Split": _split, "Gather": _gather}
