"""NativeConv: a fused convolution in float32 or bfloat16 on the CPU by a native step, with the
interface of PackedConv (onednn.py).

A call costs 5 us besides its arithmetic, where torch's oneDNN op costs 27 us (two cores), and ReLU
keeps NaN.
"""

import threading
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from resfuse.kernels.cpu import conv_candidates
from resfuse.kernels.cpu.cpus import threads
from resfuse.kernels.cpu.library import Storage, constant, why_unavailable
from resfuse.kernels.cpu.program import ACTIVATIONS, Step, lanes, require_done, runner
from resfuse.kernels.cpu.weight_layout import (
    direct_from,
    grouped_from,
    paired_from,
    per_channel,
    slopes,
    with_spare_vector,
)
from resfuse.kernels.cpu.weight_origin import is_plain
from resfuse.kernels.ops.activation import Slope
from resfuse.kernels.ops.conv_problem import ConvProblem, Epilogue, Geometry, dtypes_of

STORAGES: Mapping[torch.dtype, Storage] = {torch.float32: "fp32", torch.bfloat16: "bf16"}
LEAST_CHANNELS = 16  # of an output
DTYPES: Mapping[Storage, torch.dtype] = {storage: dtype for dtype, storage in STORAGES.items()}


def supports(
    weight: Tensor, geometry: Geometry, activation: str, storage: Storage | None = None
) -> bool:
    """Returns whether there is a native step for a convolution with `weight` here, in that storage
    or by default in that of the weight's dtype.
    """
    return refusal(weight, geometry, activation, storage) is None


def refusal(
    weight: Tensor, geometry: Geometry, activation: str, storage: Storage | None = None
) -> str | None:
    """Returns why there is no native step for a convolution with `weight` here, or None; the
    arguments are those of `supports`.
    """
    k, of_each, _, s = weight.shape
    if weight.dtype not in STORAGES:
        return f"no native step in {weight.dtype}"
    if activation not in ACTIVATIONS:
        return f"no native {activation}"
    if k < LEAST_CHANNELS:
        return f"only {k} output channels"
    if (reason := why_unavailable(storage or STORAGES[weight.dtype])) is not None:
        return reason
    form = _form(weight.shape, geometry.groups)
    if form is None:
        return "groups that fill no more than half a vector"
    if form == "grouped":
        return None
    row = of_each * s
    fits = conv_candidates.fits_row(row)
    return None if fits else f"rows of {row} values; at most {constant('MAX_ROW')}"


def _form(shape: torch.Size, groups: int) -> conv_candidates.Form | None:
    """Returns in which form a weight is packed, None where no form computes its groups."""
    k, of_each, r, s = shape
    if groups == 1:
        return "direct"
    if conv_candidates.fits_grouped(of_each * groups, k, groups, r * s):
        return "grouped"
    return "direct" if conv_candidates.fits_apart(k, groups) else None


class _Workspace(threading.local):
    """The scratch memory of a calling thread, shared by all convolutions, of which it runs one at a
    time."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.float32, device="cpu")

    def of(self, floats: int) -> int:
        """Returns the address of memory for at least `floats` floats."""
        if floats > self._memory.numel():
            self._memory = torch.empty(floats, dtype=torch.float32, device="cpu")
        return self._memory.data_ptr()


workspace = _Workspace()


class NativeConv:
    """act(conv(x) + bias + residual): x [N, C, H, W] of any format -> [N, K, P, Q], channels_last.

    Any number of threads may call it; each has memory of its own for sums. It takes and returns
    tensors of the weight's dtype. Stored in bfloat16, x, the residual and, unless there are groups,
    the weight are rounded to it, and so, once, is the result; sums, bias and slope are float32.

    Raises:
        ValueError: at a call: x is no plain tensor [N, C, H, W] of that dtype in the CPU's memory.

    Args:
        weight: [K, C / groups, R, S], float32 or bfloat16; not kept.
        bias: [K].
        geometry: of the convolution.
        activation: a name of ACTIVATIONS that `supports` allows.
        slope: of leaky_relu (a number) or prelu (a tensor [K]).
        threads: to run on; by default those of cpus.py.
        storage: of the values that are computed with; by default that of the weight's dtype.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        geometry: Geometry,
        activation: str,
        slope: Slope,
        threads: int | None = None,
        storage: Storage | None = None,
    ) -> None:
        self.dtype = weight.dtype  # of the tensors that it takes and returns
        self.given = STORAGES[weight.dtype]
        self.storage = self.makes = storage or self.given
        self._shape = weight.shape
        self._geometry, self._activation = geometry, activation
        self._channels = weight.shape[1] * geometry.groups
        form = _form(weight.shape, geometry.groups)
        assert form is not None
        self._form: conv_candidates.Form = form
        self._weight = conv_candidates.layout_weight(
            form, weight.float(), geometry.groups, self.storage
        )
        self._winograd: Tensor | None = None  # laid out when it is first needed
        self._lays_out = threading.Lock()
        self._bias = per_channel(bias)
        self._slope = None if slope is None else slopes(slope, weight.shape[0])
        if form == "direct" and conv_candidates.lacking(weight.shape[0], geometry.groups):
            self._bias = with_spare_vector(self._bias)
            self._slope = None if self._slope is None else with_spare_vector(self._slope)
        self._run = runner(self.storage)
        self.asked = threads
        self._here = threading.local()

    def __call__(self, x: Tensor) -> Tensor:
        self._require(x)
        return self._computed(x)

    def add(self, x: Tensor, residual: Tensor, overwrite: bool = False) -> Tensor:
        """Returns act(conv(x) + bias + residual), with a residual [N, K, P, Q] that is overwritten
        if `overwrite`.

        Raises:
            ValueError: x or the residual is not accepted, or the residual has another shape.
        """
        self._require(x)
        _require_memory("residual", residual, self.dtype)
        _, _, shape = self._step(x, True)
        if residual.shape != shape:
            raise ValueError(
                f"argument residual: {list(residual.shape)}; accepted: the output's {list(shape)}"
            )
        return self._added(x, residual, overwrite)

    def bound(self) -> Callable[[Tensor], Tensor]:
        """Returns a function equal to `self` that does not check x."""
        return self._computed

    def bound_add(self, overwrite: bool) -> Callable[[Tensor, Tensor], Tensor]:
        """Returns a function (x, residual) equal to `self.add` that does not check its
        arguments."""
        return lambda x, residual: self._added(x, residual, overwrite)

    def _require(self, x: Tensor) -> None:
        """Raises ValueError unless x is a tensor [N, C, H, W] of the right dtype in the CPU's
        memory: the native step sees only its address."""
        _require_memory("x", x, self.dtype)
        if x.dim() != 4 or x.size(1) != self._channels or x.numel() == 0:
            wanted = f"[N, {self._channels}, H, W], none of them 0"
            raise ValueError(f"argument x: {list(x.shape)}; accepted: {wanted}")

    def _computed(self, x: Tensor) -> Tensor:
        step, count, shape = self._step(x, False)
        x = self._stored(x)
        y = empty_output(shape, x.dtype)
        step.x, step.y = x.data_ptr(), y.data_ptr()
        self._compute(step, count)
        return y.to(self.dtype)

    def _added(self, x: Tensor, residual: Tensor, overwrite: bool) -> Tensor:
        step, count, shape = self._step(x, True)
        x, residual = self._stored(x), self._stored(residual)
        y = residual if overwrite else empty_output(shape, x.dtype)
        step.x, step.residual, step.y = x.data_ptr(), residual.data_ptr(), y.data_ptr()
        self._compute(step, count)
        return y.to(self.dtype)

    def _stored(self, x: Tensor) -> Tensor:
        """Returns x as the step reads it."""
        return nhwc(x).to(DTYPES[self.storage])

    def _compute(self, step: Step, count: int) -> None:
        step.scratch = workspace.of(step.scratch_pitch * count)
        require_done(self._run(step, 1, count))

    def _step(self, x: Tensor, residual: bool) -> tuple[Step, int, tuple[int, ...]]:
        """Returns this thread's step for inputs of the shape of `x`, the number of threads it runs
        on and the shape of its output. The last step is cached by thread.
        """
        count = self.asked or threads()
        kept = self._here.__dict__.setdefault("steps", {})
        made = kept.get(residual)
        if made is None or made[0] != count or made[1] != x.shape:
            made = count, x.shape, *self.step(x.shape, residual)
            kept[residual] = made
        return made[2], count, made[3]

    def step(
        self,
        shape: Sequence[int],
        residual: bool,
        config: conv_candidates.NativeConfig | None = None,
    ) -> tuple[Step, tuple[int, ...]]:
        """Returns a step for inputs of `shape`, without the memory that it reads and writes, and
        the shape of its output.

        Args:
            config: by default the one that is expected to be fastest.
        """
        problem = self.problem(shape, residual)
        if config is None:
            config = conv_candidates.choose(problem)
        step = conv_candidates.conv_step(
            problem,
            config,
            w=self._laid_out(config.form).data_ptr(),
            bias=self._bias.data_ptr(),
            slope=0 if self._slope is None else self._slope.data_ptr(),
            x_pitch=problem.c,
            residual_pitch=problem.k,
            y_pitch=problem.k,
            unstored=-problem.k % lanes(),
        )
        return step, (problem.n, problem.k, problem.p, problem.q)

    def _laid_out(self, form: conv_candidates.Form) -> Tensor:
        """Returns the weight as the form reads it: the same tensor to every thread, since steps
        hold its address.
        """
        if form != "winograd":
            return self._weight
        with self._lays_out:
            if self._winograd is None:
                weight = self.dense_weight().float()
                self._winograd = conv_candidates.layout_weight(form, weight, 1, self.storage)
            return self._winograd

    def problem(self, shape: Sequence[int], residual: bool) -> ConvProblem:
        """Returns the problem for inputs of `shape`."""
        n, c, h, w = shape
        k, _, r, s = self._shape
        epilogue = Epilogue.of(self._activation, residual)
        dtypes = dtypes_of("ieee" if self.storage == "fp32" else "bf16")
        return ConvProblem(n, c, h, w, k, r, s, self._geometry, epilogue, dtypes)

    def dense_weight(self) -> Tensor:
        """Returns the weight [K, C / groups, R, S] in its original layout, rounded if it is kept
        so."""
        if self._form == "grouped":
            return grouped_from(self._weight, self._shape).to(self.dtype)
        back = direct_from if self.storage == "fp32" else paired_from
        groups = self._geometry.groups
        shape = torch.Size((self._shape[0] // groups, *self._shape[1:]))
        dense = torch.cat([back(group, shape) for group in self._weight.chunk(groups)])
        return dense.to(self.dtype)


def empty_output(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Returns memory for an output, whatever the process's default dtype and device are."""
    return torch.empty(shape, dtype=dtype, device="cpu", memory_format=torch.channels_last)


def _require_memory(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    if not isinstance(tensor, Tensor) or not is_plain(tensor):
        raise ValueError(f"argument {name}: a {type(tensor).__name__}; accepted: a plain tensor")
    if not tensor.is_cpu or tensor.dtype != dtype:
        found = f"{tensor.dtype} on {tensor.device}"
        raise ValueError(f"argument {name}: {found}; accepted: {dtype} on the CPU")


def nhwc(x: Tensor) -> Tensor:
    """Returns x in channels_last memory."""
    return x.contiguous(memory_format=torch.channels_last)
