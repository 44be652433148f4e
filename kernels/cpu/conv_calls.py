"""Convolutions that read each other's results, and where in memory those results lie."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from resfuse.kernels.cpu.packed_conv import NativeConv
from resfuse.kernels.cpu.stem_pool import StemPool

Native = NativeConv | StemPool


@dataclass(frozen=True)
class ConvCall:
    """A convolution of a program, or a stem's max-pool. Values have numbers: the program's inputs,
    then the results of its calls.
    """

    conv: Native
    x: int
    residual: int | None = None
    overwrite: bool = False  # whether the result may be written over the residual


class Placement:
    """Where the results of a program lie: those that leave it in tensors of their own, the others
    in buffers, each of which may hold results whose lifetimes do not overlap: best fit, in order.

    Args:
        inputs: the number of values that the program is called with.
        units: calls that are computed strip by strip: what one of them reads is needed until all
            are done, what the last one writes from when the first begins, and the results of the
            others lie in scratch memory.
    """

    def __init__(
        self,
        inputs: int,
        calls: Sequence[ConvCall],
        outputs: Sequence[int],
        shapes: Sequence[tuple[int, ...]],
        units: Sequence[range],
    ) -> None:
        self._inputs = inputs
        self.buffers: list[int] = []
        self.output_shapes: list[tuple[int, ...]] = []
        owner = list(range(inputs))  # of a value's memory
        needed_until = dict.fromkeys(range(inputs), -1)
        for unit in units:
            for i in unit:
                call, value = calls[i], inputs + i
                over = call.residual if call.overwrite and len(unit) == 1 else None
                owner.append(value if over is None else owner[over])
                read = [call.x] if call.residual is None else [call.x, call.residual]
                for each in (value, *read):
                    needed_until[owner[each]] = unit[-1]
        leaving = {owner[value] for value in outputs}
        busy_until: list[int] = []  # of each buffer
        self._places: dict[int, tuple[str, int]] = {}  # by owner
        self._owner = owner
        for value in range(inputs):
            self._places[value] = "input", value
        for unit in units:
            value = inputs + unit[-1]
            if owner[value] != value:
                continue
            if value in leaving:
                self._places[value] = "output", len(self.output_shapes)
                self.output_shapes.append(shapes[value])
                continue
            floats = math.prod(shapes[value])
            free = [b for b, until in enumerate(busy_until) if until < unit[0]]
            fits = [b for b in free if self.buffers[b] >= floats]
            buffer = min(fits, key=self.buffers.__getitem__, default=len(self.buffers))
            if buffer == len(self.buffers):
                self.buffers.append(floats)
                busy_until.append(-1)
            busy_until[buffer] = needed_until[value]
            self._places[value] = "buffer", buffer

    def tensor(self, value: int) -> int | None:
        """Returns the number of a value's tensor: inputs come first, then buffers, then outputs.
        What lies in scratch memory has none.
        """
        found = self._places.get(self._owner[value])
        if found is None:
            return None
        kind, number = found
        before = {"input": 0, "buffer": self._inputs, "output": self._inputs + len(self.buffers)}
        return before[kind] + number
