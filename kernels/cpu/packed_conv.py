"""A fused convolution in float32 on the CPU, by a native step: a PackedConv (onednn.py) of our own.

One call costs 5 us beside its arithmetic, where torch's oneDNN op costs 27 (two cores), and ReLU
keeps NaN.
"""

import threading
from collections.abc import Callable

import torch
from torch import Tensor

from resfuse.kernels.cpu import conv_candidates
from resfuse.kernels.cpu.cpus import asking, threads
from resfuse.kernels.cpu.library import why_unavailable
from resfuse.kernels.cpu.program import ACTIVATIONS, Step, lanes, require_done, runner
from resfuse.kernels.cpu.weight_layout import (
    direct_from,
    direct_weights,
    grouped_from,
    grouped_weights,
    per_channel,
    slopes,
)
from resfuse.kernels.cpu.weight_origin import is_plain
from resfuse.kernels.ops.activation import Slope
from resfuse.kernels.ops.conv_problem import ConvProblem, Epilogue, Geometry, dtypes_of


def supports(weight: Tensor, geometry: Geometry, activation: str) -> bool:
    """Whether there is a native step for the convolution here."""
    fits = weight.dtype == torch.float32 and activation in ACTIVATIONS
    if not fits or weight.shape[0] < 16 or why_unavailable() is not None:
        return False
    if geometry.groups > 1:
        k, of_each, r, s = weight.shape
        return conv_candidates.fits_grouped(of_each * geometry.groups, k, geometry.groups, r * s)
    row = weight.shape[1] * weight.shape[3]
    return weight.shape[0] % lanes() == 0 and conv_candidates.fits_row(row)


class _Workspace(threading.local):
    """Scratch memory of a calling thread, for whichever convolution it runs: one at a time."""

    def __init__(self) -> None:
        self._held = torch.empty(0, dtype=torch.float32, device="cpu")

    def of(self, floats: int) -> int:
        """The address of so many floats."""
        if floats > self._held.numel():
            self._held = torch.empty(floats, dtype=torch.float32, device="cpu")
        return self._held.data_ptr()


_workspace = _Workspace()


class NativeConv:
    """act(conv(x) + bias + residual): x [N, C, H, W] of any format -> [N, K, P, Q], channels_last.

    Any number of threads may call it; each has memory of its own for sums.

    Raises:
        ValueError: at a call: x is no plain float32 tensor [N, C, H, W] in the CPU's memory.

    Args:
        weight: [K, C / groups, R, S], float32; not kept.
        bias: [K].
        geometry: of the convolution.
        activation: a name of ACTIVATIONS that `supports` allows.
        slope: of leaky_relu (a number) or prelu (a tensor [K]).
        threads: to run on; by default those of cpus.py.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        geometry: Geometry,
        activation: str,
        slope: Slope,
        threads: int | None = None,
    ) -> None:
        self._shape = weight.shape
        self._geometry, self._activation = geometry, activation
        self._channels = weight.shape[1] * geometry.groups
        # the inline Winograd reads the direct form's, too
        lay_out = grouped_weights if geometry.groups > 1 else direct_weights
        self._weight = lay_out(weight)
        self._bias = per_channel(bias)
        self._slope = None if slope is None else slopes(slope, weight.shape[0])
        self._run = runner()
        self._asked = threads
        self._here = threading.local()

    def __call__(self, x: Tensor) -> Tensor:
        self._require(x)
        return self._computed(x)

    def add(self, x: Tensor, residual: Tensor, overwrite: bool = False) -> Tensor:
        """With a residual of the output's shape, written over it if `overwrite`.

        Raises:
            ValueError: an argument is not what `__call__` takes, or the residual has another shape.
        """
        self._require(x)
        _require_memory("residual", residual)
        _, _, shape = self._step(x, True)
        if residual.shape != shape:
            raise ValueError(
                f"argument residual: {list(residual.shape)}; accepted: the output's {list(shape)}"
            )
        return self._added(x, residual, overwrite)

    def bound(self) -> Callable[[Tensor], Tensor]:
        """`self(x)`, without looking at what x is."""
        return self._computed

    def bound_add(self, overwrite: bool) -> Callable[[Tensor, Tensor], Tensor]:
        """`self.add(x, residual, overwrite)` likewise."""
        return lambda x, residual: self._added(x, residual, overwrite)

    def _require(self, x: Tensor) -> None:
        """What the native step cannot tell from an address."""
        _require_memory("x", x)
        if x.dim() != 4 or x.size(1) != self._channels or x.numel() == 0:
            wanted = f"[N, {self._channels}, H, W], none of them 0"
            raise ValueError(f"argument x: {list(x.shape)}; accepted: {wanted}")

    def _computed(self, x: Tensor) -> Tensor:
        step, count, shape = self._step(x, False)
        x = _nhwc(x)
        y = _empty(shape)
        step.x, step.y = x.data_ptr(), y.data_ptr()
        self._compute(step, count)
        return y

    def _added(self, x: Tensor, residual: Tensor, overwrite: bool) -> Tensor:
        step, count, shape = self._step(x, True)
        x, residual = _nhwc(x), _nhwc(residual)
        y = residual if overwrite else _empty(shape)
        step.x, step.residual, step.y = x.data_ptr(), residual.data_ptr(), y.data_ptr()
        self._compute(step, count)
        return y

    def _compute(self, step: Step, count: int) -> None:
        step.scratch = _workspace.of(step.scratch_pitch * count)
        require_done(self._run(step, 1, count))

    def _step(self, x: Tensor, residual: bool) -> tuple[Step, int, tuple[int, ...]]:
        """This thread's step for inputs like `x`, how many threads it runs on, and the shape of its
        output.
        """
        count = self._asked or threads()
        kept = self._here.__dict__.setdefault("steps", {})
        made = kept.get(residual)
        if made is None or made[0] != count or made[1] != x.shape:
            made = count, x.shape, *self._make(x, residual)
            kept[residual] = made
        return made[2], count, made[3]

    def _make(self, x: Tensor, residual: bool) -> tuple[Step, tuple[int, ...]]:
        n, c, h, w = x.shape
        k, _, r, s = self._shape
        epilogue = Epilogue.of(self._activation, residual)
        problem = ConvProblem(n, c, h, w, k, r, s, self._geometry, epilogue, dtypes_of("ieee"))
        with asking(self._asked):
            config = conv_candidates.choose(problem)
        step = conv_candidates.conv_step(
            problem,
            config,
            w=self._weight.data_ptr(),
            bias=self._bias.data_ptr(),
            slope=0 if self._slope is None else self._slope.data_ptr(),
            x_pitch=c,
            residual_pitch=k,
            y_pitch=k,
        )
        return step, (n, k, problem.p, problem.q)

    def dense_weight(self) -> Tensor:
        """The weight as it was given."""
        back = grouped_from if self._geometry.groups > 1 else direct_from
        return back(self._weight, self._shape)


def _empty(shape: tuple[int, ...]) -> Tensor:
    """Memory for an output, whatever the process's default dtype and device are."""
    return torch.empty(shape, dtype=torch.float32, device="cpu", memory_format=torch.channels_last)


def _require_memory(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor) or not is_plain(tensor):
        raise ValueError(f"argument {name}: a {type(tensor).__name__}; accepted: a plain tensor")
    if not tensor.is_cpu or tensor.dtype != torch.float32:
        found = f"{tensor.dtype} on {tensor.device}"
        raise ValueError(f"argument {name}: {found}; accepted: torch.float32 on the CPU")


def _nhwc(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)
