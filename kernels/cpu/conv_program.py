"""Fused convolutions that read each other's results, run by one native call.

By themselves each of them costs a call from Python and a start of the team of threads; here a
thread that finds no more of one to do goes on with the next. What a convolution hands to a
max-pool or to a depthwise one, and that to a 1x1, stays in strips of rows in a cache where it is
large.
"""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from resfuse.kernels.cpu import conv_candidates
from resfuse.kernels.cpu.conv_calls import ConvCall, Placement, with_conversions
from resfuse.kernels.cpu.conv_candidates import NativeConfig
from resfuse.kernels.cpu.conversion import Conversion
from resfuse.kernels.cpu.cpus import threads
from resfuse.kernels.cpu.packed_conv import NativeConv, empty_output, nhwc, workspace
from resfuse.kernels.cpu.program import (
    VALUE_BYTES,
    Runner,
    Step,
    mr,
    require_done,
    runner,
    storage_of,
    whole_vectors,
)
from resfuse.kernels.cpu.row_fusion import RowLayout, is_pointwise, rows_within
from resfuse.kernels.cpu.stem_pool import StemPool
from resfuse.kernels.ops.conv_problem import ConvProblem

# Bytes of a strip, half of a second-level cache, and the least rows of a thread.
_STRIP_BYTES, _LEAST_ROWS = 1 << 19, 14
_MOST_SHAPES = 16  # of inputs, whose steps a thread keeps


@dataclass(frozen=True)
class _Places:
    """The tensors that a step reads and writes, None where there is none or it lies in scratch
    memory, and the bytes of scratch memory before its own.
    """

    x: int | None = None
    residual: int | None = None
    y: int | None = None
    scratch: int = 0


@dataclass(frozen=True)
class _Bound:
    """A thread's steps for inputs of certain shapes. Tensors have numbers, too: inputs, then
    buffers that hold one result after another, then outputs.
    """

    runs: list[tuple[Runner, Any]]  # arrays of Step, each stored in one type
    steps: list[tuple[Step, _Places]]
    buffers: list[int]  # floats of each
    output_shapes: list[tuple[int, ...]]
    outputs: list[int]
    scratch_pitch: int  # floats of scratch memory for each thread


class ConvProgram:
    """Runs convolutions one after another. Any number of threads may run it.

    Where they store values in a type that is not that of the tensors they take, values are
    converted as they enter and leave, and between two of them only where their types differ.

    Args:
        inputs: the number of values that it is called with.
        calls: of convolutions on the same number of threads, that take tensors of one dtype; each
            reads values before its own.
        outputs: the values that it returns.
    """

    def __init__(self, inputs: int, calls: Sequence[ConvCall], outputs: Sequence[int]) -> None:
        self._inputs = inputs
        first = next(call.conv for call in calls if isinstance(call.conv, NativeConv))
        self._asked, self._given, self._dtype = first.asked, first.given, first.dtype
        self._calls, self._outputs = with_conversions(inputs, calls, outputs, self._given)
        self._here = threading.local()

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """Returns the outputs, each [N, K, P, Q] in channels_last memory.

        Args:
            inputs: [N, C, H, W], of the convolutions' dtype in the CPU's memory, of any format.
        """
        count = self._asked or threads()
        bound = self._bound(count, inputs)
        tensors = [nhwc(x) for x in inputs]
        for floats in bound.buffers:
            tensors.append(torch.empty(floats, dtype=torch.float32, device="cpu"))
        for shape in bound.output_shapes:
            tensors.append(empty_output(shape, self._dtype))
        at = [tensor.data_ptr() for tensor in tensors]
        scratch = workspace.of(bound.scratch_pitch * count)
        for step, places in bound.steps:
            step.scratch = scratch + places.scratch
            if places.x is not None:
                step.x = at[places.x]
            if places.residual is not None:
                step.residual = at[places.residual]
            if places.y is not None:
                step.y = at[places.y]
        for run, steps in bound.runs:
            require_done(run(steps, len(steps), count))
        return [tensors[output] for output in bound.outputs]

    def _bound(self, count: int, inputs: Sequence[Tensor]) -> _Bound:
        known: dict[Any, _Bound] = self._here.__dict__.setdefault("bound", {})
        key = count, *(x.shape for x in inputs)
        bound = known.get(key)
        if bound is None:
            if len(known) >= _MOST_SHAPES:
                known.clear()
            bound = known[key] = self._bind(count, [tuple(x.shape) for x in inputs])
        return bound

    def _bind(self, count: int, shapes: list[tuple[int, ...]]) -> _Bound:
        """Makes the steps for inputs of these shapes, and gives every result memory."""
        problems = []
        for call in self._calls:
            problem = call.conv.problem(shapes[call.x], call.residual is not None)
            problems.append(problem)
            shapes.append((problem.n, problem.k, problem.p, problem.q))
        units = list(self._units(problems, shapes, count))
        ranges = [unit.calls for unit in units]
        pitches = self._pitches(shapes)
        floats = [
            self._floats(value, *both)
            for value, both in enumerate(zip(shapes, pitches, strict=True))
        ]
        placed = Placement(self._inputs, self._calls, self._outputs, shapes, floats, ranges)
        steps: list[Step] = []
        places: list[_Places] = []
        for unit in units:
            steps += self._steps(unit, shapes, pitches)
            if unit.layout is not None:
                places.append(_Places())
            for i, own in zip(unit.calls, unit.layout.own if unit.layout else [0], strict=True):
                call = self._calls[i]
                x, y = placed.tensor(call.x), placed.tensor(self._inputs + i)
                residual = None if call.residual is None else placed.tensor(call.residual)
                places.append(_Places(x, residual, y, 4 * own))
        runs = [
            (runner(storage), (Step * len(part))(*part))
            for storage, steps_of in groupby(steps, storage_of)
            for part in [list(steps_of)]
        ]
        bound = [step for _, part in runs for step in part]
        return _Bound(
            runs,
            list(zip(bound, places, strict=True)),
            placed.buffers,
            placed.output_shapes,
            [tensor for value in self._outputs if (tensor := placed.tensor(value)) is not None],
            max(step.scratch_pitch for step in steps),
        )

    def _pitches(self, shapes: Sequence[tuple[int, ...]]) -> list[int]:
        """Returns the values from one pixel to the next: the channels, and one of zeros behind an
        odd number that is converted to bfloat16 and read by windows, whose rows are then one.
        """
        pitches = [shape[1] for shape in shapes]
        added = {call.residual for call in self._calls}
        for value, call in enumerate(self._calls, self._inputs):
            if isinstance(call.conv, Conversion) and call.conv.makes == "bf16":
                pitches[value] += pitches[value] % 2 if value not in added else 0
        return pitches

    def _floats(self, value: int, shape: tuple[int, ...], pitch: int) -> int:
        """Returns the floats that a value takes."""
        n, _, h, w = shape
        i = value - self._inputs
        storage = self._given if i < 0 else self._calls[i].conv.makes
        return -(-VALUE_BYTES[storage] * n * h * w * pitch // 4)

    def _steps(
        self, unit: "_Unit", shapes: Sequence[tuple[int, ...]], pitches: Sequence[int]
    ) -> list[Step]:
        """Returns the steps of a unit, without addresses."""
        steps = []
        for i, config in zip(unit.calls, unit.configs, strict=True):
            call = self._calls[i]
            step, _ = call.conv.step(shapes[call.x], call.residual is not None, config)
            if pitches[call.x] > step.x_pitch:
                step.x_pitch = pitches[call.x]
                step.C = step.C if step.groups > 1 else step.x_pitch
            if isinstance(call.conv, Conversion):
                step.K = step.y_pitch = pitches[self._inputs + i]
            steps.append(step)
        if unit.layout is None:
            return steps
        for before, behind, pitch in zip(steps, steps[1:], unit.layout.pitches, strict=False):
            before.y_pitch = behind.x_pitch = pitch
            before.unstored = 0  # whole vectors have room there
        return unit.layout.fuse(steps, 0)

    def _units(
        self, problems: Sequence[ConvProblem], shapes: Sequence[tuple[int, ...]], count: int
    ) -> Iterator["_Unit"]:
        i = 0
        while i < len(problems):
            end = self._end_of_strips(i, problems, count)
            if end == i + 1:
                yield _Unit(range(i, end), [None])
            else:
                yield self._strips(range(i, end), problems[i:end], shapes)
            i = end

    def _end_of_strips(self, i: int, problems: Sequence[ConvProblem], count: int) -> int:
        """Returns where the calls end that are computed in strips of rows from call `i` on."""
        first = problems[i]
        if i + 1 == len(problems) or not self._hands_on(i) or not pays_in_strips(first, count):
            return i + 1
        reader = problems[i + 1]
        if any(isinstance(call.conv, Conversion) for call in self._calls[i : i + 2]):
            return i + 1
        if reader.c != reader.groups or reader.r * reader.s == 1:
            return i + 1
        pools = isinstance(self._calls[i + 1].conv, StemPool)
        if i + 2 == len(problems) or pools or not self._hands_on(i + 1):
            return i + 2
        converts = isinstance(self._calls[i + 2].conv, Conversion)
        return i + 3 if is_pointwise(problems[i + 2]) and not converts else i + 2

    def _strips(
        self, calls: range, problems: Sequence[ConvProblem], shapes: Sequence[tuple[int, ...]]
    ) -> "_Unit":
        first, windows, *following = problems
        value = VALUE_BYTES[conv_candidates.storage_of(first)]
        rows_read = max(1, _STRIP_BYTES // (value * first.q * whole_vectors(first.k)))
        rows = rows_within(rows_read, first, windows.r, windows.stride[0], windows.dilation[0])
        by_pixel = [c for c in conv_candidates.configs("direct", first) if not c.by_channel]
        block = min(by_pixel[len(by_pixel) // 2].block, rows_read * first.q // mr() * mr() or mr())
        configs = [NativeConfig("direct", False, block), NativeConfig("grouped", False, 0)]
        conv, reader = (
            self._calls[i].conv.step(shapes[self._calls[i].x], False, config)[0]
            for i, config in zip(calls, configs, strict=False)
        )
        layout = RowLayout(conv, reader, following, rows)
        return _Unit(calls, [*configs, *(layout.following for _ in following)], layout)

    def _hands_on(self, i: int) -> bool:
        """Whether the next call alone reads the result of call `i`, and no residual is added to
        it."""
        value, call, behind = self._inputs + i, self._calls[i], self._calls[i + 1]
        reads = sum((each.x, each.residual).count(value) for each in self._calls)
        alone = reads == 1 and behind.x == value and value not in self._outputs
        return alone and call.residual is None


def pays_in_strips(problem: ConvProblem, count: int) -> bool:
    """Whether what a convolution hands to a depthwise one is large, and each of `count` threads has
    so many rows of it that those which two of them compute do not matter.
    """
    value = VALUE_BYTES[conv_candidates.storage_of(problem)]
    large = value * problem.n * problem.p * problem.q * problem.k > _STRIP_BYTES
    return problem.groups == 1 and large and problem.n * problem.p >= _LEAST_ROWS * count


@dataclass(frozen=True)
class _Unit:
    """Calls that are computed together, in strips of rows where there is a layout.

    configs: None where it is the one that is expected to be fastest.
    """

    calls: range
    configs: Sequence[NativeConfig | None]
    layout: RowLayout | None = None
