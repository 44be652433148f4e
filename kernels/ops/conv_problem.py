"""ConvProblem: one convolution with its epilogue, in cuDNN's letters; what a choice of kernel and
configuration may depend on, and what it costs. It is put together from what a layer knows before it
has seen an image: how its window moves (Geometry) and what is done to its sums (Epilogue); and from
the dtypes of its tensors (Dtypes).

These three are named tuples: choices of kernels are looked up by them, and tuples are hashed in C.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

# math mode -> (storage, bytes of an element); accumulation is fp32 in all of them
MATH_MODES: dict[str, tuple[torch.dtype, int]] = {
    "ieee": (torch.float32, 4),
    "tf32": (torch.float32, 4),
    "fp16": (torch.float16, 2),
    "bf16": (torch.bfloat16, 2),
}

Pair = tuple[int, int]  # (vertical, horizontal)
Residual = Literal["none", "before", "after"]  # added before or after the activation


class Geometry(NamedTuple):
    """How the window of a convolution moves, in the order of torch's convolutions, so that
    `F.conv2d(x, weight, bias, *geometry)` reads it.
    """

    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1

    @classmethod
    def of(
        cls, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
    ) -> "Geometry":
        """Returns the geometry of pairs that may be lists, as torch hands them to an op."""
        return cls(
            (stride[0], stride[1]), (padding[0], padding[1]), (dilation[0], dilation[1]), groups
        )

    def output_shape(
        self, x_shape: Sequence[int], weight_shape: Sequence[int]
    ) -> tuple[int, int, int, int]:
        """(N, K, P, Q), of symbolic sizes too."""
        p, q = (
            (
                x_shape[2 + i]
                + 2 * self.padding[i]
                - self.dilation[i] * (weight_shape[2 + i] - 1)
                - 1
            )
            // self.stride[i]
            + 1
            for i in (0, 1)
        )
        return x_shape[0], weight_shape[0], p, q


class Epilogue(NamedTuple):
    """What is done to the sums before they are stored: act(sums + bias + residual), or
    act(sums + bias) + residual.

    It holds no numbers: bias, residual and the activation's slope are tensors beside x, and so are
    int8's scales, a factor for each channel's sums, which the dtypes say are there.
    """

    activation: str = "identity"  # a name in ACTIVATIONS
    residual: Residual = "none"

    @classmethod
    def of(cls, activation: str, residual: bool, residual_last: bool = False) -> "Epilogue":
        """Returns the epilogue of arguments as public functions take them."""
        where: Residual = "after" if residual_last else "before"
        return cls(activation, where if residual else "none")

    @property
    def residual_last(self) -> bool:
        """Whether a residual is added after the activation."""
        return self.residual == "after"


class Dtypes(NamedTuple):
    """The dtypes of a convolution's tensors and of its sums.

    They may differ: where fp32 becomes bf16 inside a network, `output` is not `input`; those of
    int8 are (uint8, int8, uint8, int32), and its output may be float32.
    """

    input: torch.dtype
    weight: torch.dtype  # and the bias's, but with int8 that is float32
    output: torch.dtype  # and the residual's
    accumulator: torch.dtype
    tf32: bool = False  # float32 operands are rounded to TF32 to be multiplied

    @property
    def math_mode(self) -> str:
        """How the operands are multiplied, a name in MATH_MODES or QUANTIZED_MODES."""
        if self.weight == torch.int8:
            return "int8" if self.output == torch.uint8 else "int8_fp32"
        return "tf32" if self.tf32 else _mode_of(self.weight)


def _mode_of(dtype: torch.dtype) -> str:
    """The first math mode of floats that stores `dtype`."""
    for mode, (stored, _) in MATH_MODES.items():
        if stored == dtype:
            return mode
    raise ValueError(
        f"argument x: dtype {dtype}; accepted: torch.float32, torch.float16, torch.bfloat16"
    )


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
    return _mode_of(dtype)


_DTYPES = {
    mode: Dtypes(stored, stored, stored, torch.float32, mode == "tf32")
    for mode, (stored, _) in MATH_MODES.items()
}
# Of values in uint8 (quantization.py); accumulation is in int32.
QUANTIZED_MODES = {
    "int8": Dtypes(torch.uint8, torch.int8, torch.uint8, torch.int32),
    "int8_fp32": Dtypes(torch.uint8, torch.int8, torch.float32, torch.int32),
}
_DTYPES |= QUANTIZED_MODES


def dtypes_of(math_mode: str) -> Dtypes:
    """The dtypes where all tensors are stored as the math mode's operands are.

    Raises:
        ValueError: no such math mode.
    """
    if math_mode not in _DTYPES:
        raise ValueError(f"argument math_mode: {math_mode!r}; accepted: {', '.join(_DTYPES)}")
    return _DTYPES[math_mode]


_DENSE, _RELU = Geometry(), Epilogue("relu")


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
    geometry: Geometry = _DENSE
    epilogue: Epilogue = _RELU
    dtypes: Dtypes = _DTYPES["fp16"]

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any], residual_last: bool = False) -> "ConvProblem":
        """Returns what `to_plain`, and JSON, have made plain data of.

        Raises:
            KeyError, TypeError, ValueError: it is nothing that `to_plain` returns.
        """
        given: dict[str, Any] = {
            name: tuple(v) if isinstance(v, list) else v for name, v in plain.items()
        }
        geometry = Geometry(**{name: given.pop(name) for name in Geometry._fields})
        dtypes = dtypes_of(given.pop("math_mode"))
        epilogue = Epilogue.of(given.pop("activation"), given.pop("residual"), residual_last)
        return cls(**given, geometry=geometry, epilogue=epilogue, dtypes=dtypes)

    def to_plain(self) -> dict[str, Any]:
        """Returns it as saved engines and subprocesses read it: flat, its dtypes by the name of
        their math mode, and whether there is a residual, without its place
        (`epilogue.residual_last`).

        Raises:
            ValueError: no math mode has these dtypes.
        """
        if self.dtypes != dtypes_of(self.math_mode):
            raise ValueError(f"{self.dtypes}; saved are those of a math mode alone")
        sizes = {name: getattr(self, name) for name in ("n", "c", "h", "w", "k", "r", "s")}
        return {
            **sizes,
            **self.geometry._asdict(),
            "math_mode": self.math_mode,
            "activation": self.activation,
            "residual": self.residual,
        }

    @property
    def stride(self) -> Pair:
        return self.geometry.stride

    @property
    def padding(self) -> Pair:
        return self.geometry.padding

    @property
    def dilation(self) -> Pair:
        return self.geometry.dilation

    @property
    def groups(self) -> int:
        return self.geometry.groups

    @property
    def activation(self) -> str:
        return self.epilogue.activation

    @property
    def residual(self) -> bool:
        """Whether one is added, before or after the activation."""
        return self.epilogue.residual != "none"

    @property
    def math_mode(self) -> str:
        return self.dtypes.math_mode

    @property
    def is_quantized(self) -> bool:
        """Whether values and weights are 8-bit integers."""
        return self.dtypes.weight == torch.int8

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of x."""
        return self.dtypes.input

    @property
    def p(self) -> int:
        return self.output_shape[2]

    @property
    def q(self) -> int:
        return self.output_shape[3]

    @property
    def input_shape(self) -> tuple[int, int, int, int]:
        return self.n, self.c, self.h, self.w

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        return self.k, self.c // self.groups, self.r, self.s

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        """(N, K, P, Q)."""
        return self.geometry.output_shape(self.input_shape, self.weight_shape)

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
        k, c, r, s = self.weight_shape
        pixels = round(self.n * self.c * self.h * self.w * self.pixels_read)
        read = self.dtypes.input.itemsize * pixels
        read += self.dtypes.weight.itemsize * k * c * r * s
        read += (4 if self.dtypes.weight == torch.int8 else self.dtypes.weight.itemsize) * k  # bias
        return read + self._output_bytes * self.residual

    @property
    def _output_bytes(self) -> int:
        return self.dtypes.output.itemsize * self.n * self.p * self.q * self.k

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


def _positions(
    size: int, windows: int, kernel: int, stride: int, padding: int, dilation: int
) -> int:
    """How many of `size` positions any of the windows covers."""
    starts = range(-padding, windows * stride - padding, stride)
    covered = {at + tap * dilation for at in starts for tap in range(kernel)}
    return len(covered & set(range(size)))
