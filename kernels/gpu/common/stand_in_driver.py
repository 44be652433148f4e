"""A stand-in for Triton's CUDA driver, for machines without a GPU.

Under it a launch goes through Triton's own JITFunction.run: arguments are specialised, keys made,
the disk cache asked, missing kernels compiled for the GPU it stands for, and their shared memory
held against that GPU's; then nothing runs. What was launched, compiled and found, and which C
launchers Triton would have had gcc build, is written down.

    with stand_in() as driver:
        launch.run()
    assert driver.compiled == [] and driver.launchers_missing == []

Tensors may be on the CPU or on meta: of them only address, dtype and shape are looked at.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.backends.nvidia import driver as nvidia

from resfuse.kernels.gpu.common import c_launchers
from resfuse.kernels.gpu.common.launch import interpreting

H200_MULTIPROCESSORS = 132
HOPPER_SHARED_BYTES = 227 << 10  # the most one CTA may have
_MOST_THREADS = 1024
# A device no machine has, another one each time: kernels that were prepared for a stand-in are
# found again neither by a real driver nor by the next stand-in.
_device = itertools.count(1 << 20)


class Launched(NamedTuple):
    """One launch as a driver sees it.

    function: of the compiled kernel, another one for each.
    args: by name, constants included.
    """

    kernel: str
    grid: tuple[int, int, int]
    device: int
    stream: int
    function: int
    args: dict[str, Any]


class StandInDriver(DriverBase):
    """What Triton asks of a driver. Made by `stand_in`.

    Attributes:
        device, stream: the current ones; a test may make others so.
        launched: every launch, in order; their arguments are kept alive.
        launches: how many there were.
        compiled: the names of kernels that Triton compiled while it stood in, in this process.
        found: the names of those that its disk cache had.
        folders: where in that cache each of both lies.
        launchers: the source of each C launcher that the launches need (Triton 3.6; none in 3.8).
        launchers_missing: those of them that Triton's cache did not have.
    """

    def __init__(
        self,
        arch: int = 90,
        multiprocessors: int = H200_MULTIPROCESSORS,
        shared_bytes: int = HOPPER_SHARED_BYTES,
        *,
        keeps_launches: bool = True,
    ) -> None:
        super().__init__()
        self.target = GPUTarget("cuda", arch, 32)
        self.device = self._own_device = next(_device)
        self.stream = 0
        self.keeps_launches = keeps_launches
        self.launched: list[Launched] = []
        self.launches = 0
        self.compiled: list[str] = []
        self.found: list[str] = []
        self.folders: list[Path] = []
        self.launchers: list[str] = []
        self.launchers_missing: list[str] = []
        self.utils = _Utils(multiprocessors, shared_bytes)
        self.functions: set[Any] = set()  # whose caches know this device

    @classmethod
    def is_active(cls) -> bool:
        return False  # never found by Triton itself

    def launcher_cls(self, src: Any, metadata: Any) -> "_Launcher":
        """What Triton makes for each kernel that it loads."""
        self.functions.add(src.fn)
        source = c_launchers.source_of(src, metadata)
        if source is not None and source not in self.launchers:
            self.launchers.append(source)
            if not c_launchers.is_built(source):
                self.launchers_missing.append(source)
        return _Launcher(self, src.fn)

    def get_current_device(self) -> int:
        return self.device

    def set_current_device(self, device: int) -> None:
        self.device = device

    def get_current_stream(self, device: int) -> int:
        return self.stream

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_device_capability(self, device: int | None = None) -> tuple[int, int]:
        return divmod(self.target.arch, 10)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty: str) -> str:
        return nvidia.ty_to_cpp(ty)

    def get_benchmarker(self) -> Any:
        raise RuntimeError("a stand-in driver runs nothing, so nothing can be timed")

    def note(self, *, src: Any, metadata_group: dict[str, str], cache_hit: bool, **_: Any) -> None:
        """Triton's compilation listener."""
        (self.found if cache_hit else self.compiled).append(src.name)
        self.folders.append(Path(next(iter(metadata_group.values()))).parent)

    def forget(self) -> None:
        """Takes this device out of the kernels' own caches."""
        for function in self.functions:
            kernels, *_ = function.device_caches.pop(self._own_device)
            for kernel in kernels.values():
                kernel.module = None  # or Triton 3.8 would have a driver unload it


class _Utils:
    """The driver's C extension."""

    def __init__(self, multiprocessors: int, shared_bytes: int) -> None:
        self.properties = {
            "max_shared_mem": shared_bytes,
            "multiprocessor_count": multiprocessors,
            "max_num_regs": 65536,
            "warpSize": 32,
        }
        self.functions = itertools.count(1)

    def get_device_properties(self, device: int) -> dict[str, int]:
        return self.properties

    def load_binary(
        self, name: str, binary: bytes, shared_bytes: int, device: int
    ) -> tuple[int, int, int, int, int]:
        """Module, function, registers, spills, threads a CTA may have."""
        return 1, next(self.functions), 0, 0, _MOST_THREADS

    def unload_module(self, module: int) -> None:
        pass


class _Launcher:
    """Called as Triton calls its own, 3.6's as 3.8's."""

    def __init__(self, driver: StandInDriver, function: Any) -> None:
        self.driver, self.function = driver, function

    def __call__(
        self, x: int, y: int, z: int, stream: int, function: int, metadata: Any,
        launch_metadata: Any, enter_hook: Any, exit_hook: Any, *args: Any,
    ) -> None:  # fmt: skip
        driver = self.driver
        if enter_hook is not None:
            enter_hook(launch_metadata)
        driver.launches += 1
        if driver.keeps_launches:
            named = dict(zip(self.function.arg_names, args, strict=True))
            name, grid = self.function.__name__, (x, y, z)
            driver.launched.append(Launched(name, grid, driver.device, stream, function, named))


@contextmanager
def stand_in(
    arch: int = 90,
    multiprocessors: int = H200_MULTIPROCESSORS,
    shared_bytes: int = HOPPER_SHARED_BYTES,
    *,
    keeps_launches: bool = True,
) -> Iterator[StandInDriver]:
    """Triton's driver is a stand-in within; afterwards it is the one it was.

    Args:
        arch: compute capability times ten of the GPU that it stands for.
        shared_bytes: the most shared memory one CTA may have there.
        keeps_launches: keep the arguments of every launch. What looks at lifetimes, or counts the
            host's time, does without.

    Raises:
        RuntimeError: this process interprets kernels; no driver is asked then.
    """
    if interpreting():
        raise RuntimeError(
            "TRITON_INTERPRET is set, so kernels are interpreted and no driver is asked; unset it"
        )
    driver = StandInDriver(arch, multiprocessors, shared_bytes, keeps_launches=keeps_launches)
    config, knobs = triton.runtime.driver, triton.knobs.compilation
    before, listener = config._active, knobs.listener
    config.set_active(driver)
    knobs.listener = driver.note
    try:
        yield driver
    finally:
        driver.forget()
        config.set_active(before)
        knobs.listener = listener
