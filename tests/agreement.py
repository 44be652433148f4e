"""Is a kernel's answer right? One judge for all kernel tests, on the harness's tolerance table."""

import math

import torch
from torch import Tensor

from resfuse.kernels.tolerance import TOLERANCES

# A sum of n products in the accumulator's precision is off by about sqrt(n) roundings.
ROUNDINGS_IN_TABLE = 4


def require_close(got: Tensor, want: Tensor, math_mode: str, reduction: int = 1) -> None:
    """Fails unless every element agrees with the fp64 answer; NaN and Inf must stand where it has
    them.

    Args:
        got: the kernel's output, any dtype.
        want: fp64, of the same shape.
        math_mode: a row of TOLERANCES.
        reduction: products summed for one element (C / groups * R * S).
    """
    assert got.shape == want.shape, f"shape {tuple(got.shape)}, wanted {tuple(want.shape)}"
    assert want.dtype == torch.float64, f"the reference is {want.dtype}, not fp64"
    tolerance = TOLERANCES[math_mode]
    scale = max(1.0, math.sqrt(reduction) / ROUNDINGS_IN_TABLE)
    value = got.double()
    same = (value == want) | (value.isnan() & want.isnan())  # also infinities of one sign
    error = torch.where(same, 0.0, (value - want).abs())
    allowed = scale * (tolerance.atol + tolerance.rtol * want.abs())
    bad = ~same & ~(error <= allowed)
    if bad.any():
        first = tuple(int(i) for i in bad.nonzero()[0])
        finite = error[error.isfinite()]
        largest, rms = (float(finite.max()), float(finite.square().mean().sqrt()))
        raise AssertionError(
            f"{int(bad.sum())} of {bad.numel()} elements differ; largest finite error "
            f"{largest:.3g}, RMS {rms:.3g}; first at {first}: {float(value[first]):.6g}, "
            f"wanted {float(want[first]):.6g}"
        )
