"""Resize and Upsample, as far as torch computes exactly what ONNX says.

Nearest neighbours are picked by index, whatever the rule; of the interpolations those are read
whose sample points are torch's.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from resfuse.kernels.onnx_reader.operators.convolution_layers import weight_of
from resfuse.kernels.onnx_reader.operators.shapes import dim_of, ints_of
from resfuse.kernels.onnx_reader.reading.node import OnnxNode, Operators
from resfuse.kernels.onnx_reader.reading.values import Computed, Value

if TYPE_CHECKING:
    from resfuse.kernels.onnx_reader.reading.graph_reader import Reader

_INTERPOLATE = {"linear": {3: "linear", 4: "bilinear", 5: "trilinear"}, "cubic": {4: "bicubic"}}
MOST_PIXELS = 2**20  # a side


@dataclass(frozen=True)
class Axis:
    """One dimension: from `size` entries to `to`, `scale` times as many by the file's word."""

    dim: int
    size: int
    to: int
    scale: float

    @property
    def is_same(self) -> bool:
        return self.size == self.to and self.scale == 1


def _upsample(reader: "Reader", node: OnnxNode, x: Value, scales: Value | None = None) -> Value:
    x = reader.computed(x)
    given = node.attribute("scales") if scales is None else weight_of(node, scales, "a scale")
    return _resized(
        reader, node, x, _axes(node, x, list(map(float, given)), None, list(range(x.rank))),
        "asymmetric", "floor",
    )  # fmt: skip


def _resize(reader: "Reader", node: OnnxNode, x: Value, *more: Value | None) -> Value:
    if node.opset < 11:
        return _upsample(reader, node, x, more[0])
    x = reader.computed(x)
    _, scales, sizes = (*more, None, None, None)[:3]
    how = node.attribute("coordinate_transformation_mode", "half_pixel")
    rule = node.attribute("nearest_mode", "round_prefer_floor")
    node.require("antialias", 0)
    node.require("keep_aspect_ratio_policy", "stretch")
    node.attribute("extrapolation_value")  # of tf_crop_and_resize
    chosen = node.ints("axes", list(range(x.rank)))
    dims = [dim_of(node, axis, x.rank) for axis in chosen]
    factors = None if scales is None else weight_of(node, scales, "a scale").reshape(-1)
    wanted = ints_of(node, sizes, "a size")
    has_scales = factors is not None and factors.size > 0
    if has_scales == bool(wanted):
        raise node.refusal("a resize with both scales and sizes, or neither,")
    given = [float(factor) for factor in factors] if has_scales and factors is not None else None
    return _resized(reader, node, x, _axes(node, x, given, wanted, dims), how, rule)


def _axes(
    node: OnnxNode, x: Computed, scales: list[float] | None, sizes: list[int] | None,
    dims: list[int],
) -> list[Axis]:  # fmt: skip
    """The axes that change."""
    found = []
    nothing = [None] * len(dims)
    for dim, scale, to in zip(dims, scales or nothing, sizes or nothing, strict=True):
        if scale == 1:
            continue
        size = x.size(dim)
        if to is None:
            assert scale is not None
            to = math.floor(size * scale) if math.isfinite(scale) else 0
        else:
            scale = to / size
        if not 1 <= to <= MOST_PIXELS or not math.isfinite(scale):
            raise node.refusal(f"a size of {to}")
        axis = Axis(dim, size, to, scale)
        if not axis.is_same:
            found.append(axis)
    return found


def _resized(
    reader: "Reader", node: OnnxNode, x: Computed, axes: list[Axis], how: str, rule: str
) -> Value:
    mode = node.attribute("mode", "nearest")
    a, outside = node.attribute("cubic_coeff_a", -0.75), node.attribute("exclude_outside", 0)
    if not axes:
        return x
    if mode == "nearest":
        return _nearest(reader, node, x, axes, how, rule)
    known = _INTERPOLATE.get(mode, {})
    if x.rank not in known or min(axis.dim for axis in axes) < 2:
        raise node.refusal(f"mode={mode!r} over {x.rank} dimensions")
    if how not in ("half_pixel", "pytorch_half_pixel", "align_corners"):
        raise node.refusal(f"mode={mode!r} with coordinate_transformation_mode={how!r}")
    if how == "pytorch_half_pixel" and any(axis.to == 1 for axis in axes):
        raise node.refusal(f"coordinate_transformation_mode={how!r} to a single pixel")
    if mode == "cubic" and (a != -0.75 or outside):
        raise node.refusal(f"cubic_coeff_a={a} with exclude_outside={outside}")
    by_dim = {axis.dim: axis for axis in axes}
    every = [by_dim.get(d) or Axis(d, x.size(d), x.size(d), 1.0) for d in range(2, x.rank)]
    corners = how == "align_corners"
    size = tuple(axis.to for axis in every)
    # torch goes by the ratio of the sizes unless it is told a factor.
    as_sizes = all(axis.scale == axis.to / axis.size for axis in every)
    if corners or as_sizes:
        return reader.call(F.interpolate, x, size=size, mode=known[x.rank], align_corners=corners)
    factors = tuple(axis.scale for axis in every)
    return reader.call(
        F.interpolate, x, scale_factor=factors, mode=known[x.rank], align_corners=False
    )


def _nearest(
    reader: "Reader", node: OnnxNode, x: Computed, axes: list[Axis], how: str, rule: str
) -> Computed:
    picks = {axis.dim: _picked(node, axis, how, rule) for axis in axes}
    if x.rank == 4 and min(picks) >= 2:
        size = tuple(len(picks[d]) if d in picks else x.size(d) for d in (2, 3))
        for mode in ("nearest", "nearest-exact"):
            if all(np.array_equal(_torch_picks(a.size, a.to, mode), picks[a.dim]) for a in axes):
                return reader.call(F.interpolate, x, size=size, mode=mode)
    for dim, indices in picks.items():
        x = reader.call(torch.index_select, x, dim, reader.constant("indices", indices))
    return x


def _torch_picks(size: int, to: int, mode: str) -> np.ndarray:
    numbers = torch.arange(size, dtype=torch.float64)[None, None]
    found: np.ndarray = F.interpolate(numbers, size=to, mode=mode)[0, 0].numpy().astype(np.int64)
    return found


def _picked(node: OnnxNode, axis: Axis, how: str, rule: str) -> np.ndarray:
    """Which entry each entry of the result is, in float32 as ONNX Runtime computes it."""
    at = np.arange(axis.to, dtype=np.float32)
    scale = np.float32(axis.scale)
    if how in ("half_pixel", "pytorch_half_pixel"):
        source = (at + np.float32(0.5)) / scale - np.float32(0.5)
        if how == "pytorch_half_pixel" and axis.to == 1:
            source = np.zeros_like(at)
    elif how == "asymmetric":
        source = at / scale
    elif how == "align_corners":
        source = at * np.float32(axis.size - 1) / np.float32(max(1, axis.to - 1))
    else:
        raise node.refusal(f"mode='nearest' with coordinate_transformation_mode={how!r}")
    if rule == "floor":
        found = np.floor(source)
    elif rule == "ceil":
        found = np.ceil(source)
    elif rule == "round_prefer_floor":
        found = np.ceil(source - np.float32(0.5))
    elif rule == "round_prefer_ceil":
        found = np.floor(source + np.float32(0.5))
    else:
        raise node.refusal(f"nearest_mode={rule!r}")
    picked: np.ndarray = np.clip(found, 0, axis.size - 1).astype(np.int64)
    return picked


RESIZING: Operators = {"Resize": _resize, "Upsample": _upsample}
