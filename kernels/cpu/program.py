"""Step, the description of one native step, and programs of several steps.

The fields are those of `struct Step` in step.h; `runner` compares their offsets. Everything else
that the two languages must agree on is asked of the library: constants, the numbers of kinds and
activations, and the scratch memory that a step needs.
"""

import ctypes
from collections.abc import Callable, Sequence
from typing import cast

from resfuse.kernels.cpu import library as native
from resfuse.kernels.cpu.cpus import asked_for, threads

ACTIVATIONS = ("identity", "relu", "relu6", "hardswish", "leaky_relu", "prelu")
_POINTERS = ("x", "w", "bias", "slope", "residual", "y", "scratch")
_NUMBERS = (
    "N", "H", "W", "C", "K", "R", "S", "P", "Q",
    "stride_h", "stride_w", "pad_h", "pad_w", "dilation_h", "dilation_w", "groups",
    "x_pitch", "residual_pitch", "y_pitch", "unstored",
    "activation", "residual_last", "by_channel", "block", "scratch_pitch",
    "length", "rows", "x_local", "residual_local", "y_local",
)  # fmt: skip
ABSENT = -1  # the offset into scratch memory of a value that is not there


class Step(ctypes.Structure):
    """A native step. Pointers are addresses or 0, numbers count elements, and offsets into scratch
    memory are ABSENT unless given.
    """

    _fields_ = [
        ("kind", ctypes.c_long),
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_long) for name in _NUMBERS),
    ]

    def __init__(self, **fields: int) -> None:
        nowhere = {"x_local": ABSENT, "residual_local": ABSENT, "y_local": ABSENT}
        super().__init__(**nowhere | fields)


def kind(name: str) -> int:
    """Returns the number of a kind of step, such as "direct", "max_pool" or "chain"."""
    return native.constant(f"kind.{name}")


def activation(name: str) -> int:
    """Returns the number of an activation in ACTIVATIONS."""
    return native.constant(f"activation.{name}")


def fused_run(
    name: str, steps: Sequence[Step], *, scratch: int = 0, scratch_pitch: int = 0, rows: int = 0
) -> list[Step]:
    """Returns `steps` preceded by the step that fuses them.

    Args:
        name: "chain" or "row_fused".
        scratch: the address of the threads' scratch memory, which holds the local values.
        scratch_pitch: the floats of scratch memory for each thread.
        rows: the rows of a strip ("row_fused").
    """
    head = Step(
        kind=kind(name), length=len(steps), scratch=scratch, scratch_pitch=scratch_pitch, rows=rows
    )
    return [head, *steps]


Runner = Callable[[Step | ctypes.Array[Step], int, int], int]


def scratch_floats(step: Step) -> int:
    """Returns the floats of scratch memory that a thread needs for a step, which is no fused
    run."""
    return _ask("resfuse_scratch_floats", step)


def local_pixels(run: Sequence[Step]) -> int:
    """Returns the most pixels of a value that a fused run has in a thread's scratch memory at a
    time."""
    return _ask("resfuse_local_pixels", (Step * len(run))(*run))


def _ask(function: str, steps: Step | ctypes.Array[Step]) -> int:
    ask = getattr(native.library(), function)
    ask.restype, ask.argtypes = ctypes.c_long, [ctypes.POINTER(Step)]
    answer: int = ask(steps)
    return answer


def runner() -> Runner:
    """Returns the library's function (steps, count, threads) that runs steps, whose result
    `require_done` checks.
    """
    native.require_layout(Step, "Step")
    run = native.library().resfuse_run
    run.restype, run.argtypes = ctypes.c_long, [ctypes.POINTER(Step), ctypes.c_long, ctypes.c_long]
    return cast(Runner, run)


class Program:
    """A sequence of steps that one call runs in order.

    The memory they point to belongs to the caller and must outlive the program. Unless the number
    of threads was asked for, a call uses no more than `cpus.threads` returns then.

    Args:
        threads: the number of threads that there is scratch memory for.
    """

    def __init__(self, steps: Sequence[Step], threads: int) -> None:
        self._steps = (Step * len(steps))(*steps)
        self._threads, self._asked = threads, asked_for() is not None
        self._run = runner()

    def __call__(self) -> None:
        count = self._threads if self._asked else min(self._threads, threads())
        require_done(self._run(self._steps, len(self._steps), count))


def require_done(failed: int) -> None:
    """Raises RuntimeError if the library's function reports that a thread has failed."""
    if failed:
        raise RuntimeError("a thread of the native steps has failed; the results are incomplete")


def lanes() -> int:
    """Returns the floats in a vector, to whose multiple channels are padded."""
    return native.constant("LANES")


def whole_vectors(channels: int) -> int:
    """Returns `channels` rounded up to a whole number of vectors."""
    return -(-channels // lanes()) * lanes()


def whole_lines(floats: int) -> int:
    """Returns `floats` rounded up to a whole number of cache lines."""
    line = native.constant("CACHE_LINE")
    return -(-floats // line) * line


def nr() -> int:
    """Returns the columns of a register tile: the output channels of a panel."""
    return native.constant("NR")


def mr() -> int:
    """Returns the rows of a register tile: the pixels that are computed together."""
    return native.constant("MR")
