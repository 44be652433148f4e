"""A stand-in for Triton's CUDA driver where there is no GPU: kernels are compiled for an H200 and
not run; what would have been launched is written down.

For processes without TRITON_INTERPRET; tensors are on the CPU and say that they are on a GPU.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.tools.tensor_descriptor import TensorDescriptor


@dataclass
class Launched:
    """A launch as the driver sees it."""

    kernel: str
    grid: tuple[int, ...]
    device: int
    stream: int
    function: int
    constants: dict[Any, Any]
    args: dict[str, Any]

    def named(self, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """All of it but scratch memory, the tensors at known addresses by their names."""
        names = {tensor.data_ptr(): name for name, tensor in tensors.items()}
        args = {k: _told(v, names) for k, v in self.args.items()}
        return {**vars(self), "args": args}


def _told(value: Any, names: dict[int, str]) -> Any:
    if isinstance(value, TensorDescriptor):
        rest = {k: v for k, v in vars(value).items() if k != "base"}
        return {**rest, "base": _told(value.base, names)}
    if isinstance(value, Tensor):
        address = value.data_ptr()
        return names.get(address, f"scratch of {value.numel()} {value.dtype}")
    return value


@dataclass
class StandIn:
    """`device` and `streams` (of a device) are the current ones."""

    device: int = 0
    streams: dict[int, int] = field(default_factory=dict)
    launched: list[Launched] = field(default_factory=list)
    loaded: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.utils = self

    # Triton's driver

    def get_current_device(self) -> int:
        return self.device

    def set_current_device(self, device: int) -> None:
        self.device = device

    def get_current_stream(self, device: int) -> int:
        return self.streams.get(device, 0)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {
            "max_shared_mem": 232448, "multiprocessor_count": 132, "max_num_regs": 65536,
            "warpSize": 32,
        }  # fmt: skip

    def load_binary(self, name: str, *_: Any) -> tuple[int, int, int, int, int]:
        self.loaded.append(name)
        return 1, len(self.loaded), 100, 0, 1024

    def unload_module(self, module: int) -> None:
        pass

    def launcher_cls(self, src: Any, metadata: Any) -> Any:
        constants = dict(src.constants)

        def launch(
            x: int, y: int, z: int, stream: int, function: int, packed: Any, told: Any, enter: Any,
            leave: Any, *args: Any,
        ) -> None:  # fmt: skip
            if enter is not None:
                enter(told)
            given = dict(zip(src.fn.arg_names, args, strict=True))
            self.launched.append(
                Launched(
                    src.fn.__name__, (x, y, z), self.device, stream, function, constants, given
                )
            )

        return launch


def install() -> StandIn:
    """Makes it Triton's driver, and tensors say that they are on a GPU."""
    driver = StandIn()
    triton.runtime.driver.set_active(driver)
    torch.Tensor.is_cuda = property(lambda self: True)  # type: ignore[assignment]
    torch.Tensor.is_cpu = property(lambda self: False)  # type: ignore[assignment]
    return driver
