"""ConvProblem: one convolution with its epilogue, in cuDNN's letters; what a choice of kernel and
configuration may depend on, and what it costs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

# math mode -> (storage, bytes of an element); accumulation is fp32 in all of them
MATH_MODES: dict[str, tuple[torch.dtype, int]] = {
    "ieee": (torch.float32, 4),
    "tf32": (torch.float32, 4),
    "fp16": (torch.float16, 2),
    "bf16": (torch.bfloat16, 2),
}


def math_mode_of(dtype: torch.dtype, device: torch.device | None = None) -> str:
    """How tensors of `dtype` are multiplied now; torch's own TF32 switch decides for float32.

    Args:
        device: where; by default a GPU if there is one.

    Raises:
        ValueError: no kernel computes in that dtype.
    """
    if dtype == torch.float32:
        on_gpu = torch.cuda.is_available() if device is None else device.type == "cuda"
        return "tf32" if on_gpu and torch.backends.cudnn.allow_tf32 else "ieee"
    for mode, (stored, _) in MATH_MODES.items():
        if stored == dtype:
            return mode
    raise ValueError(
        f"argument x: dtype {dtype}; accepted: torch.float32, torch.float16, torch.bfloat16"
    )


@dataclass(frozen=True)
class ConvProblem:
    """x [N, C, H, W] * w [K, C / groups, R, S] -> y [N, K, P, Q], all of them NHWC in memory."""

    n: int
    c: int
    h: int
    w: int
    k: int
    r: int
    s: int
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    math_mode: str = "fp16"
    activation: str = "relu"
    residual: bool = False

    @property
    def p(self) -> int:
        return self._output_shape[2]

    @property
    def q(self) -> int:
        return self._output_shape[3]

    @property
    def dtype(self) -> torch.dtype:
        return MATH_MODES[self.math_mode][0]

    @property
    def macs(self) -> int:
        """Multiply-accumulates as the convolution is defined, padding included."""
        return self.n * self.p * self.q * self.k * (self.c // self.groups) * self.r * self.s

    @property
    def flops(self) -> int:
        return 2 * self.macs

    @property
    def pixels_read(self) -> float:
        """The share of x's pixels that some window looks at: a quarter for a 1x1 of stride 2."""
        rows = _positions(self.h, self.p, self.r, self.stride[0], self.padding[0], self.dilation[0])
        columns = _positions(
            self.w, self.q, self.s, self.stride[1], self.padding[1], self.dilation[1]
        )
        return rows * columns / (self.h * self.w)

    @property
    def least_bytes(self) -> int:
        """Each tensor moved once: x as far as it is read, w, bias, y, and the residual if there is
        one."""
        return self.read_bytes + self._output_bytes

    @property
    def read_bytes(self) -> int:
        """The bytes of `least_bytes` that are read: all tensors but y."""
        size = MATH_MODES[self.math_mode][1]
        weight = self.k * (self.c // self.groups) * self.r * self.s
        read = round(self.n * self.c * self.h * self.w * self.pixels_read) + weight + self.k
        return size * read + self._output_bytes * self.residual

    @property
    def _output_shape(self) -> tuple[int, int, int, int]:
        weight = (self.k, self.c // self.groups, self.r, self.s)
        x = (self.n, self.c, self.h, self.w)
        return output_shape(x, weight, self.stride, self.padding, self.dilation)

    @property
    def _output_bytes(self) -> int:
        return MATH_MODES[self.math_mode][1] * self.n * self.p * self.q * self.k

    def label(self) -> str:
        """`8x64x56x56 k64 3x3`, then stride, dilation and groups where they are not one."""
        words = [f"{self.n}x{self.c}x{self.h}x{self.w} k{self.k} {self.r}x{self.s}"]
        if self.stride != (1, 1):
            words.append(f"/{self.stride[0]}")
        if self.dilation != (1, 1):
            words.append(f"dilation {self.dilation[0]}")
        if self.groups != 1:
            words.append(f"groups {self.groups}")
        return " ".join(words)


def output_shape(
    x_shape: Sequence[int],
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, int, int, int]:
    """(N, K, P, Q), of symbolic sizes too."""
    p, q = (
        (x_shape[2 + i] + 2 * padding[i] - dilation[i] * (weight_shape[2 + i] - 1) - 1) // stride[i]
        + 1
        for i in (0, 1)
    )
    return x_shape[0], weight_shape[0], p, q


def _positions(
    size: int, windows: int, kernel: int, stride: int, padding: int, dilation: int
) -> int:
    """How many of `size` positions any of the windows covers."""
    starts = range(-padding, windows * stride - padding, stride)
    covered = {at + tap * dilation for at in starts for tap in range(kernel)}
    return len(covered & set(range(size)))
