"""Step, the description of one native step, and programs of several steps.

The fields are those of `struct Step` in step.h; `runner` compares their offsets. Everything else
that the two languages must agree on is asked of the library: constants, the numbers of kinds and
activations, and the scratch memory that a step needs.
"""

import ctypes
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import cast

from resfuse.kernels.cpu import library as native
from resfuse.kernels.cpu.cpus import asked_for, threads
from resfuse.kernels.cpu.library import Storage

ACTIVATIONS = (
    "identity", "relu", "relu6", "silu", "sigmoid", "hardswish", "hardsigmoid", "leaky_relu",
    "prelu", "gelu", "gelu_tanh",
)  # fmt: skip
_STORAGES: tuple[Storage, ...] = ("fp32", "bf16", "u8")  # by their numbers, storage.h's
_POINTERS = ("x", "w", "bias", "slope", "residual", "gate", "y", "scratch")
_NUMBERS = (
    "N", "H", "W", "C", "K", "R", "S", "P", "Q",
    "stride_h", "stride_w", "pad_h", "pad_w", "dilation_h", "dilation_w", "groups",
    "x_pitch", "residual_pitch", "y_pitch", "gate_pitch", "unstored",
    "activation", "residual_last", "by_channel", "block", "scratch_pitch",
    "length", "rows", "x_local", "residual_local", "y_local", "storage",
)  # fmt: skip
# Of values in uint8: step.h.
_QUANTIZED_POINTERS = ("scale", "offset")
_QUANTIZED_NUMBERS = ("x_zero", "y_zero", "residual_zero", "y_fp32")
_REALS = ("x_scale", "y_inverse_scale", "residual_scale", "eps")  # eps: of norms
ABSENT = -1  # the offset into scratch memory of a value that is not there


class Step(ctypes.Structure):
    """A native step. Pointers are addresses or 0, numbers count elements, and offsets into scratch
    memory are ABSENT unless given. `storage` says which library runs it, by default float32's.
    Scales and eps are real numbers, all others whole ones.
    """

    _fields_ = [
        ("kind", ctypes.c_long),
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_long) for name in _NUMBERS),
        *((name, ctypes.c_void_p) for name in _QUANTIZED_POINTERS),
        *((name, ctypes.c_long) for name in _QUANTIZED_NUMBERS),
        *((name, ctypes.c_float) for name in _REALS),
    ]

    def __init__(self, **fields: float) -> None:
        nowhere = {"x_local": ABSENT, "residual_local": ABSENT, "y_local": ABSENT}
        super().__init__(**nowhere | fields)


def kind(name: str) -> int:
    """Returns the number of a kind of step, such as "direct", "max_pool" or "chain"."""
    return native.constant(f"kind.{name}")


def storage_number(storage: Storage) -> int:
    """Returns the number of the type that values are stored in."""
    return native.constant(f"storage.{storage}")


def storage_of(step: Step) -> Storage:
    """Returns the type that a step's values are stored in."""
    number: int = step.storage
    return _STORAGES[number]


VALUE_BYTES: dict[Storage, int] = {"fp32": 4, "bf16": 2, "u8": 1}


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
        kind=kind(name), length=len(steps), scratch=scratch, scratch_pitch=scratch_pitch,
        rows=rows, storage=steps[0].storage,
    )  # fmt: skip
    return [head, *steps]


Runner = Callable[[Step | ctypes.Array[Step], int, int], int]


def scratch_floats(step: Step) -> int:
    """Returns the floats of scratch memory that a thread needs for a step, which is no fused
    run."""
    return _ask("resfuse_scratch_floats", step)


def shared_floats(step: Step) -> int:
    """Returns the floats of memory that the moments of groups take, for either step of a group
    norm."""
    return _ask("resfuse_shared_floats", step)


def local_pixels(run: Sequence[Step]) -> int:
    """Returns the most pixels of a value that a fused run has in a thread's scratch memory at a
    time."""
    return _ask("resfuse_local_pixels", (Step * len(run))(*run))


def local_floats(step: Step, values: int) -> int:
    """Returns the floats of scratch memory that so many values of a step take."""
    return -(-VALUE_BYTES[storage_of(step)] * values // 4)


def _ask(function: str, steps: Step | ctypes.Array[Step]) -> int:
    first = steps if isinstance(steps, Step) else steps[0]
    ask = getattr(native.library_for(storage_of(first)), function)
    ask.restype, ask.argtypes = ctypes.c_long, [ctypes.POINTER(Step)]
    answer: int = ask(steps)
    return answer


def runner(storage: Storage = "fp32") -> Runner:
    """Returns the library's function (steps, count, threads) that runs steps, whose result
    `require_done` checks.
    """
    native.require_layout(Step, "Step")
    run = native.library_for(storage).resfuse_run
    run.restype, run.argtypes = ctypes.c_long, [ctypes.POINTER(Step), ctypes.c_long, ctypes.c_long]
    return cast(Runner, run)


class Program:
    """A sequence of steps that run in order, by one call for each of its parts that are stored in
    the same type.

    The memory they point to belongs to the caller and must outlive the program. Unless the number
    of threads was asked for, a call uses no more than `cpus.threads` returns then.

    Args:
        threads: the number of threads that there is scratch memory for.
    """

    def __init__(self, steps: Sequence[Step], threads: int) -> None:
        self._runs = [
            (runner(storage), (Step * len(part))(*part))
            for storage, steps_of in groupby(steps, storage_of)
            for part in [list(steps_of)]
        ]
        self._threads, self._asked = threads, asked_for() is not None

    def __call__(self) -> None:
        count = self._threads if self._asked else min(self._threads, threads())
        for run, steps in self._runs:
            require_done(run(steps, len(steps), count))


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
