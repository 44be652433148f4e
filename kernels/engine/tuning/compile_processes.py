"""Compiles Triton kernels by processes, where threads would wait for each other.

Triton holds Python's lock for an eighth of a compilation (from the source to its first IR: 67 of
560 ms with triton 3.6), so that threads are worth eight cores at the most. A process has to import
torch first, some 4 s, so it takes more cores than that and many kernels to win. The processes are
started as programs of their own, not by multiprocessing: that would run a caller's script again
in each of them where it has no `if __name__ == "__main__"`.
"""

import contextlib
import importlib
import io
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from triton.runtime.jit import JITFunction

if TYPE_CHECKING:
    from resfuse.kernels.gpu.common.launch import Launch

THREADS_ARE_WORTH = 8  # cores
MOST = 32
LEAST_KERNELS = 16  # of one process: 8 s of compilation for 4 s of imports
BYTES = 1 << 30  # of one process: 0.7 GB resident, and ptxas beside it
_PROGRAM = (
    "import pickle, sys; sys.path[:] = pickle.load(sys.stdin.buffer); "
    "from resfuse.kernels.engine.tuning.compile_processes import compile_all; "
    "compile_all(sys.stdin.buffer)"
)


def processes_for(kernels: int, cores: int, free_bytes: int) -> int:
    """Returns the number of processes that pay off, 0 where threads are as fast."""
    count = min(cores, MOST, kernels // LEAST_KERNELS, free_bytes // BYTES)
    return count if count > THREADS_ARE_WORTH else 0


def compile_in_processes(launches: "Sequence[Launch]", arch: int, cores: int) -> None:
    """Compiles launches into Triton's cache if that pays off; what a process fails to compile is
    left to the caller."""
    count = processes_for(len(launches), cores, free_bytes())
    if count and sys.executable:
        with contextlib.suppress(Exception):  # no process, no memory, or what pickle refuses
            run_processes(launches, arch, count)


def run_processes(launches: "Sequence[Launch]", arch: int, count: int) -> None:
    """Compiles launches by `count` processes, each every `count`-th of them.

    Raises:
        OSError: the processes cannot be started, or their input cannot be written.
    """
    jobs = [_pickled(launch) for launch in launches]
    # no GPU is needed, and one thread a process is enough
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    started: list[subprocess.Popen[bytes]] = []
    try:
        for first in range(count):
            with tempfile.TemporaryFile() as jobs_file:
                pickle.dump(sys.path, jobs_file)
                pickle.dump((os.getpid(), arch, jobs[first::count]), jobs_file)
                jobs_file.seek(0)
                started.append(
                    subprocess.Popen(
                        [sys.executable, "-c", _PROGRAM], stdin=jobs_file,
                        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                    )
                )  # fmt: skip
        for process in started:
            process.wait()
    finally:
        for process in started:
            process.kill()  # after Ctrl-C; those that have ended do not mind
            process.wait()


def compile_all(jobs_file: IO[bytes]) -> None:
    """Compiles the launches read from `jobs_file`, in a process started by `run_processes`, until
    its parent has ended."""
    from triton.backends.compiler import GPUTarget

    from resfuse.kernels.gpu.inspect.inspect import compile_launch

    parent, arch, jobs = pickle.load(jobs_file)
    for job in jobs:
        if os.getppid() != parent:
            return
        with contextlib.suppress(Exception):  # reported when it is measured
            compile_launch(_Unpickler(io.BytesIO(job)).load(), GPUTarget("cuda", arch, 32))


def free_bytes() -> int:
    """Returns the bytes of memory available without paging, 0 where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    except (OSError, ValueError, IndexError, StopIteration):
        return 0


def _pickled(launch: "Launch") -> bytes:
    written = io.BytesIO()
    _Pickler(written).dump(launch)
    return written.getvalue()


class _Pickler(pickle.Pickler):
    """A pickler that stores Triton kernels by name, as pickle stores functions."""

    def persistent_id(self, value: object) -> tuple[str, str] | None:
        if isinstance(value, JITFunction):
            return value.fn.__module__, value.fn.__qualname__
        return None


class _Unpickler(pickle.Unpickler):
    def persistent_load(self, name: tuple[str, str]) -> Any:
        module, function = name
        return getattr(importlib.import_module(module), function)
