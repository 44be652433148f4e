"""Fused convolutions that read each other's results, run by one native call.

By themselves each of them costs a call from Python and a start of the team of threads; here a
thread that finds no more of one to do goes on with the next.
"""

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from resfuse.kernels.cpu.cpus import threads
from resfuse.kernels.cpu.packed_conv import NativeConv, empty_output, nhwc, workspace
from resfuse.kernels.cpu.program import Step, require_done, runner

_MOST_SHAPES = 16  # of inputs, whose steps a thread keeps


@dataclass(frozen=True)
class ConvCall:
    """One convolution of a program. Values have numbers: the program's inputs, then the results of
    its calls.
    """

    conv: NativeConv
    x: int
    residual: int | None = None
    overwrite: bool = False  # whether the result is written over the residual


@dataclass(frozen=True)
class _Bound:
    """A thread's steps for inputs of certain shapes. Tensors have numbers, too: inputs, then
    buffers that hold one result after another, then outputs.
    """

    program: Any  # an array of Step
    steps: list[tuple[Step, int, int | None, int]]  # with the tensors x, residual and y
    buffers: list[int]  # floats of each
    output_shapes: list[tuple[int, ...]]
    outputs: list[int]
    scratch_pitch: int  # floats of scratch memory for each thread


class ConvProgram:
    """Runs convolutions one after another. Any number of threads may run it.

    Args:
        inputs: the number of values that it is called with.
        calls: of convolutions on the same number of threads; each reads values before its own.
        outputs: the values that it returns.
    """

    def __init__(self, inputs: int, calls: Sequence[ConvCall], outputs: Sequence[int]) -> None:
        self._inputs, self._calls, self._outputs = inputs, list(calls), list(outputs)
        self._asked = calls[0].conv.asked
        self._run = runner()
        self._here = threading.local()

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """Returns the outputs, each [N, K, P, Q] in channels_last memory.

        Args:
            inputs: [N, C, H, W], float32 in the CPU's memory, of any format.
        """
        count = self._asked or threads()
        bound = self._bound(count, inputs)
        tensors = [nhwc(x) for x in inputs]
        for floats in bound.buffers:
            tensors.append(torch.empty(floats, dtype=torch.float32, device="cpu"))
        for shape in bound.output_shapes:
            tensors.append(empty_output(shape))
        at = [tensor.data_ptr() for tensor in tensors]
        scratch = workspace.of(bound.scratch_pitch * count)
        for step, x, residual, y in bound.steps:
            step.x, step.y, step.scratch = at[x], at[y], scratch
            if residual is not None:
                step.residual = at[residual]
        require_done(self._run(bound.program, len(bound.steps), count))
        return [tensors[output] for output in bound.outputs]

    def _bound(self, count: int, inputs: Sequence[Tensor]) -> _Bound:
        known: dict[Any, _Bound] = self._here.__dict__.setdefault("bound", {})
        key = count, *(x.shape for x in inputs)
        bound = known.get(key)
        if bound is None:
            if len(known) >= _MOST_SHAPES:
                known.clear()
            bound = known[key] = self._bind([tuple(x.shape) for x in inputs])
        return bound

    def _bind(self, shapes: list[tuple[int, ...]]) -> _Bound:
        """Makes the steps for inputs of these shapes, and gives every result memory."""
        steps = []
        for call in self._calls:
            step, shape = call.conv.step(shapes[call.x], call.residual is not None)
            steps.append(step)
            shapes.append(shape)
        placed = _Placement(self._inputs, self._calls, self._outputs, shapes)
        program = (Step * len(steps))(*steps)
        return _Bound(
            program,
            [
                (
                    program[i],
                    placed.tensor(call.x),
                    None if call.residual is None else placed.tensor(call.residual),
                    placed.tensor(self._inputs + i),
                )
                for i, call in enumerate(self._calls)
            ],
            placed.buffers,
            placed.output_shapes,
            [placed.tensor(value) for value in self._outputs],
            max(step.scratch_pitch for step in steps),
        )


class _Placement:
    """Where the results of a program lie: those that leave it in tensors of their own, the others
    in buffers, each of which may hold results of one size whose lifetimes do not overlap.
    """

    def __init__(
        self,
        inputs: int,
        calls: Sequence[ConvCall],
        outputs: Sequence[int],
        shapes: Sequence[tuple[int, ...]],
    ) -> None:
        self._inputs = inputs
        self.buffers: list[int] = []
        self.output_shapes: list[tuple[int, ...]] = []
        owner = list(range(inputs))  # of a value's memory
        last_read = dict.fromkeys(range(inputs), -1)
        for i, call in enumerate(calls):
            written = owner[call.residual] if call.overwrite and call.residual is not None else None
            owner.append(inputs + i if written is None else written)
            read = [call.x] if call.residual is None else [call.x, call.residual]
            for value in (inputs + i, *read):
                last_read[owner[value]] = i
        leaving = {owner[value] for value in outputs}
        busy_until: list[int] = []  # of each buffer
        place: dict[int, tuple[str, int]] = {value: ("input", value) for value in range(inputs)}
        for i in range(len(calls)):
            value = inputs + i
            if owner[value] != value:
                continue
            if value in leaving:
                place[value] = "output", len(self.output_shapes)
                self.output_shapes.append(shapes[value])
                continue
            floats = math.prod(shapes[value])
            fits = (
                b for b, size in enumerate(self.buffers) if size == floats and busy_until[b] < i
            )
            buffer = next(fits, len(self.buffers))
            if buffer == len(self.buffers):
                self.buffers.append(floats)
                busy_until.append(-1)
            busy_until[buffer] = last_read[value]
            place[value] = "buffer", buffer
        self._places = [place[each] for each in owner]

    def tensor(self, value: int) -> int:
        """Returns the number of a value's tensor: inputs come first, then buffers, then outputs."""
        kind, number = self._places[value]
        before = {"input": 0, "buffer": self._inputs, "output": self._inputs + len(self.buffers)}
        return before[kind] + number
