"""Which ptxas the plan's kernels are assembled by: chosen once, and told to every subprocess."""

import contextlib
import os
from collections.abc import Iterator

from resfuse.bench.common.errors import UsageError
from resfuse.kernels.gpu.inspect import ptxas


@contextlib.contextmanager
def chosen() -> Iterator[str]:
    """Subprocesses started within are told of the best ptxas there is (TRITON_PTXAS_PATH).

    Yields:
        a line on which it is.

    Raises:
        UsageError: the user's own TRITON_PTXAS_PATH names none that runs.
    """
    try:
        best = ptxas.best(ptxas.find(), driver_major())
    except ValueError as error:
        raise UsageError(str(error)) from None
    if best is None:
        yield "No ptxas is to be found: Triton's kernels cannot be assembled here"
        return
    before = os.environ.get(ptxas.VARIABLE)
    os.environ[ptxas.VARIABLE] = best.path
    try:
        without = "" if best.sound else "; on Hopper the engine leaves whole tails of blocks out"
        yield f"Kernels are assembled by {best.told()}: {best.path}{without}"
    finally:
        if before is None:
            del os.environ[ptxas.VARIABLE]
        else:
            os.environ[ptxas.VARIABLE] = before


def driver_major() -> int | None:
    """Returns the major version of the driver's newest CUDA; NVML leaves the GPU alone."""
    try:
        import pynvml

        pynvml.nvmlInit()
        return int(pynvml.nvmlSystemGetCudaDriverVersion_v2()) // 1000
    except Exception:  # no package, or no driver
        return None
