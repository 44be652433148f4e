"""Step: what the library is told of one step, and programs of several.

The fields are those of `struct Step` in step.h, in its order.
"""

import ctypes
from collections.abc import Sequence
from typing import Any

from resfuse.kernels.cpu.cpus import asked_for, threads
from resfuse.kernels.cpu.library import NativeUnavailable, library

KINDS = (
    "direct", "winograd", "grouped", "max_pool", "mean", "affine", "average_pool", "pick",
    "winograd_inline",
)  # fmt: skip
ACTIVATIONS = {
    "identity": 0,
    "relu": 1,
    "relu6": 2,
    "hardswish": 3,
    "leaky_relu": 4,  # with its slope for every channel
    "prelu": 4,
}
POINTERS = ("x", "w", "bias", "slope", "residual", "y", "scratch")
NUMBERS = (
    "N", "H", "W", "C", "K", "R", "S", "P", "Q",
    "stride_h", "stride_w", "pad_h", "pad_w", "dilation_h", "dilation_w", "groups",
    "x_pitch", "residual_pitch", "y_pitch",
    "activation", "residual_last", "by_channel", "block", "scratch_pitch",
    "joined", "rows", "x_local", "residual_local", "y_local",
)  # fmt: skip


class Step(ctypes.Structure):
    """One step; pointers are addresses (0: none), numbers count elements."""

    _fields_ = [
        ("kind", ctypes.c_long),
        *((name, ctypes.c_void_p) for name in POINTERS),
        *((name, ctypes.c_long) for name in NUMBERS),
    ]


def runner() -> Any:
    """The library's function (steps, count, threads) that runs them; `require_done` judges what it
    returns.
    """
    lib = library()
    if lib.resfuse_step_bytes() != ctypes.sizeof(Step):
        raise NativeUnavailable("the library's steps are laid out otherwise on this platform")
    run = lib.resfuse_run
    run.restype, run.argtypes = ctypes.c_long, [ctypes.POINTER(Step), ctypes.c_long, ctypes.c_long]
    return run


class Program:
    """Steps to be run one after another by one call.

    The memory they point to must outlive the program; it is the caller's. Where their number was
    not asked for, threads become fewer with those that there are.

    Args:
        threads: those that there is scratch memory for.
    """

    def __init__(self, steps: Sequence[Step], threads: int) -> None:
        self._steps = (Step * len(steps))(*steps)
        self._threads, self._asked = threads, asked_for() is not None
        self._run = runner()

    def __call__(self) -> None:
        count = self._threads if self._asked else min(self._threads, threads())
        require_done(self._run(self._steps, len(self._steps), count))


def require_done(failed: int) -> None:
    """Raises RuntimeError where the library's function says that a thread has failed."""
    if failed:
        raise RuntimeError("a thread of the native steps has failed; the results are incomplete")


def lanes() -> int:
    """Floats in a vector; channels are padded to it."""
    return library().resfuse_lanes()


def whole_vectors(channels: int) -> int:
    """Channels up to a whole number of vectors."""
    return -(-channels // lanes()) * lanes()


def panel() -> int:
    """Output channels that are computed together."""
    return library().resfuse_panel()


def pixels() -> int:
    """Pixels that are computed together."""
    return library().resfuse_pixels()
