"""Fused convolutions of a forward without checks that one native call runs (conv_program.py)."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from resfuse.kernels.cpu.conv_calls import ConvCall, Native
from resfuse.kernels.cpu.conv_program import ConvProgram
from resfuse.kernels.fusion.layers.compound_layers import (
    FusedStep,
    PoolStep,
    ProjectionStep,
    StemStep,
)
from resfuse.kernels.fusion.layers.fused_layers import ConvStep


class RegionCall(NamedTuple):
    """A convolution of a region, or a stem's max-pool. Values have numbers: the region's inputs,
    then its results.
    """

    step: ConvStep | PoolStep
    x: int
    residual: int | None


class ConvRegion:
    """Runs steps on a CPU without their checks, in one native call where all are native.

    Args:
        inputs: how many values it is called with.
    """

    def __init__(self, inputs: int) -> None:
        self._inputs = inputs
        self._calls: list[RegionCall] = []
        self._outputs: list[int] = []
        # Of the packed weights that it was made for; replaced at once, since other threads read it.
        self._made: tuple[list[Native], ConvProgram] | None = None

    @classmethod
    def joined(cls, regions: "Sequence[ConvRegion]") -> "ConvRegion":
        """Returns a region that runs others of one input and one output, each on what the one
        before it returns.
        """
        whole = cls(1)
        value = 0
        for region in regions:
            value = whole.embed(region, value)
        whole.returns([value])
        return whole

    def embed(self, region: "ConvRegion", x: int) -> int:
        """Adds the calls of a region of one input and one output behind the others, and returns the
        number of its result.

        Args:
            x: the number of its input.
        """
        before = self._inputs + len(self)
        numbers: list[int] = [x, *range(before, before + len(region))]
        for step, read, residual in region._calls:
            self._add(step, numbers[read], None if residual is None else numbers[residual])
        return numbers[region._outputs[0]]

    @staticmethod
    def takes(step: FusedStep) -> bool:
        """Whether a step consists of convolutions, and a stem's max-pool, alone."""
        return isinstance(step, ConvStep | ProjectionStep | StemStep)

    def add(self, step: FusedStep, read: Sequence[int]) -> int:
        """Adds a step behind the others, and returns the number of its result."""
        if isinstance(step, ProjectionStep):
            x, shortcut = read
            return self._add(step.conv, x, self._add(step.projection, shortcut, None))
        if isinstance(step, StemStep):
            conv = self._add(step.conv, read[0], None)
            return self._add(PoolStep(step.conv, step.pool), conv, None)
        assert isinstance(step, ConvStep)
        return self._add(step, read[0], read[1] if len(read) > 1 else None)

    def _add(self, step: ConvStep | PoolStep, x: int, residual: int | None) -> int:
        self._calls.append(RegionCall(step, x, residual))
        return self._inputs + len(self._calls) - 1

    def returns(self, outputs: Sequence[int]) -> None:
        """Says which values leave the region."""
        self._outputs = list(outputs)

    def __len__(self) -> int:
        return len(self._calls)

    def is_native(self) -> bool:
        """Whether one native call runs it, as its steps are bound now."""
        return all(isinstance(call.step.bound, Native) for call in self._calls)

    def __call__(self, *inputs: Tensor) -> Tensor | list[Tensor]:
        """Returns the outputs, or the only one."""
        made = self._made
        if made is None or any(
            call.step.bound is not conv for call, conv in zip(self._calls, made[0], strict=True)
        ):
            made = self._make()
        results = self._one_by_one(inputs) if made is None else made[1](*inputs)
        return results[0] if len(results) == 1 else results

    def _make(self) -> tuple[list[Native], ConvProgram] | None:
        packed = [call.step.bound for call in self._calls]
        convs = [each for each in packed if isinstance(each, Native)]
        if len(convs) < len(packed):
            return None
        calls = [
            ConvCall(conv, x, residual, residual is not None and step.overwrite)
            for conv, (step, x, residual) in zip(convs, self._calls, strict=True)
        ]
        self._made = made = convs, ConvProgram(self._inputs, calls, self._outputs)
        return made

    def _one_by_one(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        values = list(inputs)
        for step, x, residual in self._calls:
            read = [values[x]] if residual is None else [values[x], values[residual]]
            values.append(step.unchecked(*read))
        return [values[output] for output in self._outputs]
