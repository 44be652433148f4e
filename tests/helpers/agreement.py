"""Is a kernel's answer right? One judge for all kernel tests, on the harness's tolerance table."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from resfuse.kernels.ops.tolerance import TOLERANCES

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


def exact(twin: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """The twin's answer in fp64, to the same rounded numbers."""
    return twin(
        *(_wide(value) for value in args), **{name: _wide(value) for name, value in options.items()}
    )


def _wide(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) else value


def require_close_gradients(
    op: Callable[..., Any],
    twin: Callable[..., Any],
    leaves: dict[str, Tensor],
    upstream: Tensor,
    math_mode: str,
    reduction: int,
) -> None:
    """Fails unless the op has the gradients of its twin in fp64, and none where that has none.

    Args:
        leaves: what both take, by name.
        upstream: the gradient of their answer.
    """
    grads = []
    for function, dtype in ((op, torch.float32), (twin, torch.float64)):
        own = {name: leaf.detach().to(dtype).requires_grad_() for name, leaf in leaves.items()}
        function(**own).backward(upstream.to(dtype))
        grads.append({name: leaf.grad for name, leaf in own.items()})
    assert any(want is not None for want in grads[1].values())
    for name, want in grads[1].items():
        got = grads[0][name]
        assert (got is None) == (want is None), name
        if got is not None and want is not None:
            require_close(got, want, math_mode, reduction)
