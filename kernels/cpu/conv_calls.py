"""Convolutions that read each other's results, and where in memory those results lie."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from resfuse.kernels.cpu.conversion import Conversion
from resfuse.kernels.cpu.library import Storage
from resfuse.kernels.cpu.packed_conv import NativeConv
from resfuse.kernels.cpu.stem_pool import StemPool

Native = NativeConv | StemPool


@dataclass(frozen=True)
class ConvCall:
    """A convolution of a program, a stem's max-pool, or a conversion. Values have numbers: the
    program's inputs, then the results of its calls.
    """

    conv: Native | Conversion
    x: int
    residual: int | None = None
    overwrite: bool = False  # whether the result may be written over the residual


def with_conversions(
    inputs: int, calls: Sequence[ConvCall], outputs: Sequence[int], given: Storage
) -> tuple[list[ConvCall], list[int]]:
    """Returns calls and outputs with conversions where storages meet: before the first call that
    reads a value in another one, and behind all calls for outputs.

    A result written over its residual is, where that is converted, written over the copy, which no
    other call reads, as no other reads the residual from then on.

    Args:
        inputs: the number of values that the calls begin with.
        given: the storage of inputs and outputs.
    """
    made: list[ConvCall] = []
    numbers = list(range(inputs))  # of each value, with conversions among them
    storages = [given] * inputs
    converted: dict[tuple[int, Storage], int] = {}

    def add(call: ConvCall) -> int:
        made.append(call)
        return inputs + len(made) - 1

    def stored(value: int, storage: Storage) -> int:
        if storages[value] == storage:
            return numbers[value]
        if (value, storage) not in converted:
            converted[value, storage] = add(ConvCall(Conversion(storage), numbers[value]))
        return converted[value, storage]

    for call in calls:
        storage = call.conv.storage
        x = stored(call.x, storage)
        residual = None if call.residual is None else stored(call.residual, storage)
        numbers.append(add(replace(call, x=x, residual=residual)))
        storages.append(storage)
    return made, [stored(value, given) for value in outputs]


class Placement:
    """Where the results of a program lie: those that leave it in tensors of their own, the others
    in buffers, each of which may hold results whose lifetimes do not overlap: best fit, in order.

    Args:
        inputs: the number of values that the program is called with.
        shapes: of all values.
        floats: that each value takes.
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
        floats: Sequence[int],
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
            free = [b for b, until in enumerate(busy_until) if until < unit[0]]
            fits = [b for b in free if self.buffers[b] >= floats[value]]
            buffer = min(fits, key=self.buffers.__getitem__, default=len(self.buffers))
            if buffer == len(self.buffers):
                self.buffers.append(floats[value])
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
