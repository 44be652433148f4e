"""Computes in fp64 what a part of a graph returns for random inputs, and the error allowed to
candidates.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from resfuse.kernels.engine.ir.candidate import Candidate
from resfuse.kernels.engine.ir.graph import Graph, State, Value
from resfuse.kernels.engine.runtime.executor import Executor
from resfuse.kernels.engine.tactics import eager
from resfuse.kernels.gpu.cudnn.cudnn_probe import as_decided
from resfuse.kernels.ops.conv_problem import math_mode_of
from resfuse.kernels.ops.quantization import QUANTIZED_DTYPES, less_128
from resfuse.kernels.ops.tolerance import EAGER_FACTOR, TOLERANCES

# The share of quantised numbers that may be one step away, where rounding is a tie but for the last
# bit of a float32: one in a thousand, and a few where there are few.
_TIES, _FEW = 1e-3, 2
_DEVIATION = 60  # steps: the standard deviation of quantised trial inputs


@dataclass(frozen=True)
class ExactAnswer:
    """Inputs of a part of a graph, its outputs in fp64, and the relative error allowed:
    EAGER_FACTOR times the error of torch's own operations, plus the tolerance of the math mode.
    Quantised outputs are integers: `allowed` is the share of them that may be one step away."""

    inputs: list[Tensor]
    outputs: list[Tensor]
    allowed: float

    def error_of(self, outputs: Sequence[Tensor]) -> float:
        """Returns the largest relative error in norm; infinite where a number is not finite. Of
        quantised outputs the largest share of numbers that are one step away; infinite where one is
        further."""
        pairs = [*zip(outputs, self.outputs, strict=True)]
        steps = [(y, want) for y, want in pairs if want.dtype in QUANTIZED_DTYPES]
        floats = [(y, want) for y, want in pairs if want.dtype not in QUANTIZED_DTYPES]
        return max(
            relative_error([y for y, _ in floats], [want for _, want in floats]),
            max((_share_of_steps(y, want) for y, want in steps), default=0.0),
        )


def _share_of_steps(y: Tensor, want: Tensor) -> float:
    """Returns the share of numbers that are one step away, less those that may be in any case;
    infinite where one is further."""
    apart = (y.int() - want.int()).abs()
    if not apart.numel() or apart.max() > 1:
        return math.inf if apart.numel() else 0.0
    return max(0, int(apart.sum()) - _FEW) / apart.numel()


def exact_answer(part: Graph, state: State, device: torch.device) -> ExactAnswer:
    """Returns the answer of a part of a graph in fp64, and the error allowed from one run of
    torch's own operations."""
    generator = torch.Generator(device).manual_seed(0)
    inputs = [_random(part.values[name], generator) for name in part.reads]
    exact = eager.exact(part, state, inputs)
    if part.dtype in QUANTIZED_DTYPES:  # sums of integers are exact
        of_floats = TOLERANCES["ieee"].rtol
        return ExactAnswer(inputs, exact, _TIES if _gives_steps(part) else of_floats)
    candidates = [Candidate("eager", at, at + 1) for at in range(len(part.nodes))]
    math_mode = math_mode_of(_floating(part), device)
    with as_decided(device, math_mode):  # torch keeps the plans of the first run
        own = relative_error(Executor(part, candidates, state)(*inputs), exact)
    return ExactAnswer(inputs, exact, EAGER_FACTOR * own + TOLERANCES[math_mode].rtol)


def _gives_steps(part: Graph) -> bool:
    return any(part.values[name].dtype in QUANTIZED_DTYPES for name in part.outputs)


def relative_error(outputs: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Returns the largest relative error in norm; infinite where a number is not finite."""
    worst = 0.0
    for y, expected in zip(outputs, exact, strict=True):
        difference = (y.double() - expected.double()).norm()
        error = (difference / expected.double().norm().clamp_min(1e-30)).item()
        worst = max(worst, error if math.isfinite(error) else math.inf)
    return worst


def _random(value: Value, generator: torch.Generator) -> Tensor:
    """Returns normally distributed numbers in channels_last, or ones where they are integers.
    Quantised ones are so distributed around the zero point that few are clipped."""
    device = generator.device
    if value.quantization is not None:
        zero = value.quantization.zero_point
        x = zero + _DEVIATION * torch.randn(value.shape, generator=generator, device=device)
        x = x.round().clamp(0, 255).to(torch.uint8)
        x = less_128(x) if value.dtype == torch.int8 else x
        return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
    if not value.dtype.is_floating_point:
        return torch.ones(value.shape, dtype=value.dtype, device=device)
    x = torch.randn(value.shape, generator=generator, dtype=torch.float32, device=device).to(
        value.dtype
    )
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def _floating(part: Graph) -> torch.dtype:
    """Returns the dtype that decides how large an error may be: the narrowest."""
    return part.dtype
