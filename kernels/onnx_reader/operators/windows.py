"""Strides, dilations and paddings of convolutions and pools, and ONNX's ways to leave them open."""

from dataclasses import dataclass
from typing import Any

from resfuse.kernels.onnx_reader.reading.node import OnnxNode
from resfuse.kernels.onnx_reader.reading.values import Computed


@dataclass(frozen=True)
class Window:
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    before: tuple[int, ...]  # padding
    after: tuple[int, ...]
    ceil: bool = False

    @property
    def is_symmetric(self) -> bool:
        return self.before == self.after

    def sides(self) -> list[int]:
        """The padding as torch's `pad` wants it: from the last dimension to the first."""
        pairs = zip(reversed(self.before), reversed(self.after), strict=True)
        return [side for pair in pairs for side in pair]

    def reach(self, dim: int) -> int:
        """Pixels between the ends of a window."""
        return self.dilation[dim] * (self.kernel[dim] - 1) + 1


def window_of(node: OnnxNode, x: Computed, kernel: tuple[int, ...]) -> Window:
    """The window of a node whose kernel is known.

    Raises:
        ValueError: it does not fit `x`, or the way it is padded is not known.
    """
    dims = len(kernel)
    if x.rank != dims + 2 or not 1 <= dims <= 3:
        raise node.refusal(f"a window of {list(kernel)} over a tensor of {x.rank} dimensions")
    stride = _each(node, "strides", dims, 1, least=1)
    dilation = _each(node, "dilations", dims, 1, least=1)
    if min(kernel) < 1:
        raise node.refusal(f"a kernel of {list(kernel)}")
    ceil = node.attribute("ceil_mode", 0)
    if ceil not in (0, 1):
        raise node.refusal(f"ceil_mode={ceil}")
    auto = node.attribute("auto_pad", "NOTSET")
    pads = node.ints("pads")
    zeros = (0,) * dims
    if auto == "VALID":
        return Window(kernel, stride, dilation, zeros, zeros, bool(ceil))
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        if max(dilation) > 1:
            raise node.refusal(f"auto_pad={auto} with dilations")
        sizes = [x.size(2 + dim) for dim in range(dims)]
        missing = [
            max(0, (-(-size // s) - 1) * s + k - size)
            for size, s, k in zip(sizes, stride, kernel, strict=True)
        ]
        less, more = [m // 2 for m in missing], [m - m // 2 for m in missing]
        before, after = (less, more) if auto == "SAME_UPPER" else (more, less)
        return Window(kernel, stride, dilation, tuple(before), tuple(after))
    if auto != "NOTSET":
        raise node.refusal(f"auto_pad={auto!r}")
    pads = pads or [0] * (2 * dims)
    if len(pads) != 2 * dims or min(pads) < 0:
        raise node.refusal(f"pads={pads}")
    return Window(kernel, stride, dilation, tuple(pads[:dims]), tuple(pads[dims:]), bool(ceil))


def _each(node: OnnxNode, name: str, dims: int, default: int, least: int) -> tuple[int, ...]:
    found: Any = node.ints(name, [default] * dims)
    if len(found) != dims or min(found) < least:
        raise node.refusal(f"{name}={found}")
    return tuple(found)
