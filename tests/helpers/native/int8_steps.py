"""Native steps on uint8, run in guarded memory, and the twins that say what is right."""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from guarded_pages import GuardedPages
from resfuse.kernels.cpu import conv_candidates
from resfuse.kernels.cpu.conv_candidates import NativeConfig
from resfuse.kernels.cpu.program import Step, lanes, require_done, runner, whole_vectors
from resfuse.kernels.cpu.weight_layout import (
    integers_per_channel,
    per_channel,
    slopes,
    with_spare_vector,
)
from resfuse.kernels.ops.activation import Slope
from resfuse.kernels.ops.conv_problem import ConvProblem, dtypes_of
from resfuse.kernels.ops.quantization import (
    Quantization,
    conv_ref,
    quantize_weights,
    requantization,
)

EXACT = ("identity", "relu", "relu6", "leaky_relu", "prelu")  # activations without exp


@dataclass(frozen=True)
class Int8Conv:
    """A convolution of uint8 with everything it reads.

    Attributes:
        x: [N, C, H, W], uint8, stored as `stored`; likewise the residual [N, K, P, Q].
        weight: [K, C / groups, R, S], float64.
        output: how y is stored; None: as float32.
    """

    problem: ConvProblem
    x: Tensor
    weight: Tensor
    bias: Tensor
    stored: Quantization
    output: Quantization | None = None
    slope: Slope = None
    residual: Tensor | None = None
    residual_stored: Quantization | None = None

    def expected(self) -> Tensor:
        """Returns what the twin computes."""
        weight, scale = quantize_weights(self.weight)
        how = requantization(weight, scale, self.bias, self.stored)
        problem = self.problem
        return conv_ref(
            self.x, weight, how, self.stored, self.output, problem.geometry, problem.activation,
            self.slope, self.residual, self.residual_stored, problem.epilogue.residual_last,
        )  # fmt: skip

    def run(self, config: NativeConfig, threads: int = 1, in_place: bool = False) -> Tensor:
        """Returns what the native step computes, in the residual's memory if `in_place`."""
        pages = GuardedPages()
        step, y, _kept = self.step(config, pages, in_place)
        scratch = pages.place(torch.empty(step.scratch_pitch * threads or 1, dtype=torch.float32))
        step.scratch = scratch.data_ptr()
        require_done(runner("u8")(step, 1, threads))
        pages.require_intact()
        return y.permute(0, 3, 1, 2)

    def step(
        self, config: NativeConfig, pages: GuardedPages, in_place: bool = False
    ) -> tuple[Step, Tensor, list[Tensor]]:
        """Returns the step without scratch memory, its y [N, P, Q, K], and all that it reads."""
        problem = self.problem
        weight, weight_scale = quantize_weights(self.weight)
        how = requantization(weight, weight_scale, self.bias, self.stored)
        laid_out = conv_candidates.layout_weight(config.form, weight, problem.groups, "u8")
        x = nhwc(self.x)
        if problem.groups > 1:  # which are read by whole vectors
            x = F.pad(x, (0, whole_vectors(problem.c) - problem.c), value=99)
        parameters = {
            "bias": per_channel(how.bias),
            "scale": per_channel(how.scale),
            "offset": integers_per_channel(how.offset),
        }
        if self.slope is not None:
            parameters["slope"] = slopes(self.slope, problem.k)
        if conv_candidates.lacking(problem.k, problem.groups):
            parameters = {name: with_spare_vector(t) for name, t in parameters.items()}
        kept = {"w": laid_out, "x": x, **parameters}
        numbers: dict[str, Any] = {"x_zero": self.stored.zero_point}
        if self.residual is not None:
            assert self.residual_stored is not None
            kept["residual"] = nhwc(self.residual)
            numbers["residual_zero"] = self.residual_stored.zero_point
            numbers["residual_scale"] = self.residual_stored.scale
            numbers["residual_pitch"] = problem.k
        if self.output is not None:
            numbers |= {"y_zero": self.output.zero_point}
            numbers |= {"y_inverse_scale": self.output.inverse_scale}
        placed = {name: pages.place(t) for name, t in kept.items()}
        if in_place:
            y = placed["residual"]
        else:
            n, k, p, q = problem.output_shape
            dtype = torch.float32 if self.output is None else torch.uint8
            y = pages.place(torch.full((n, p, q, k), 77, dtype=dtype))
        step = conv_candidates.conv_step(
            problem, config, x_pitch=x.shape[-1], y_pitch=problem.k, y=y.data_ptr(),
            unstored=-problem.k % lanes(),
            **{name: t.data_ptr() for name, t in placed.items()}, **numbers,
        )  # fmt: skip
        return step, y, list(placed.values())

    def require_right(self, config: NativeConfig, **how: Any) -> Tensor:
        """Requires the twin's bits; of activations with exp, values that are at most one apart, and
        few of those. Returns them."""
        got, want = self.run(config, **how), self.expected()
        require_like_twin(got, want, self.problem.activation)
        return got


def require_like_twin(got: Tensor, want: Tensor, activation: str = "identity") -> None:
    assert got.dtype == want.dtype and got.shape == want.shape
    if activation in EXACT:
        wrong = (got != want).nonzero()
        assert not len(wrong), (wrong[:4].tolist(), got[got != want][:4], want[got != want][:4])
    elif got.dtype == torch.float32:
        assert torch.allclose(got, want, rtol=3e-6, atol=1e-6)
    else:
        apart = (got.int() - want.int()).abs()
        assert int(apart.max()) <= 1 and int((apart > 0).sum()) <= max(1, apart.numel() // 1000)


def nhwc(x: Tensor) -> Tensor:
    """Returns [N, C, H, W] as contiguous [N, H, W, C]."""
    return x.permute(0, 2, 3, 1).contiguous()


def of_int8(problem: ConvProblem, to: str = "int8") -> ConvProblem:
    return replace(problem, dtypes=dtypes_of(to))


def random_values(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Returns uint8 of all sizes, both ends more often than others."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(-40, 296, shape, generator=generator)
    return drawn.clamp(0, 255).to(torch.uint8)


def random_conv(
    problem: ConvProblem,
    seed: int = 0,
    zero_point: int = 7,
    scale: float = 0.0173,
    output_zero: int = 5,
    clipped: float = 0.02,
) -> Int8Conv:
    """Returns a convolution in int8 whose output is stored so that about a share of `clipped` of
    it is clipped at either end."""
    generator = torch.Generator().manual_seed(seed)
    problem = of_int8(problem) if problem.dtypes.input != torch.uint8 else problem
    k, of_each, r, s = problem.weight_shape
    weight = torch.randn(k, of_each, r, s, generator=generator, dtype=torch.float64)
    weight *= torch.rand(k, 1, 1, 1, generator=generator, dtype=torch.float64) + 0.1
    bias = torch.randn(k, generator=generator)
    slope: Slope = {"leaky_relu": 0.2, "prelu": torch.randn(k, generator=generator)}.get(
        problem.activation
    )
    residual = random_values(problem.output_shape, seed + 1) if problem.residual else None
    stored = Quantization(scale, zero_point)
    conv = Int8Conv(
        problem, random_values(problem.input_shape, seed), weight, bias, stored, None, slope,
        residual, Quantization(0.021, 129) if problem.residual else None,
    )  # fmt: skip
    if problem.dtypes.output == torch.float32:
        return conv
    return replace(conv, output=quantization_for(conv.expected(), output_zero, clipped))


def quantization_for(v: Tensor, zero_point: int, clipped: float) -> Quantization:
    """Returns how to store values v with a zero point so that a share of them is clipped."""
    above, below = (torch.quantile(side.flatten()[:100000].clamp_min(0), 1 - clipped)
                    for side in (v, -v))  # fmt: skip
    room = above / max(255 - zero_point, 1), below / max(zero_point, 1)
    scale = float(min(r for r in room if r > 0)) if max(room) > 0 else 1.0
    return Quantization(max(scale, 1e-6), zero_point)


def whole(x: Tensor) -> Tensor:
    """Returns [N, C, H, W] as [N, H, W, channels in whole vectors], zeros behind the last one."""
    x = nhwc(x)
    return torch.nn.functional.pad(x, (0, whole_vectors(x.shape[-1]) - x.shape[-1]))
