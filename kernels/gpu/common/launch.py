"""Launch: one kernel launch written down, so that the same description runs the kernel, compiles it
for a GPU that is not there (`inspect`), and shows up in an error message.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy
import torch
import triton
from torch import Tensor
from triton.runtime.errors import InterpreterError
from triton.tools.tensor_descriptor import TensorDescriptor

Argument: TypeAlias = Tensor | TensorDescriptor | int | float | None


@dataclass(frozen=True)
class Launch:
    """Arguments and constants by parameter name; to inspect one, its tensors may be on meta.

    scratch: the arguments that are memory for this run alone, with anything in it.
    counters: those that are zero before each run, and after it.
    rounds_products: a product is rounded before something is added to it, as torch does, and never
        contracted with the sum into one instruction.
    """

    kernel: Any  # triton.JITFunction, or InterpretedFunction under TRITON_INTERPRET
    grid: tuple[int, ...]
    args: dict[str, Argument]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    least_capability: int = 80  # the oldest NVIDIA GPU it is for, as in sm_80
    scratch: tuple[str, ...] = ()
    counters: tuple[str, ...] = ()
    rounds_products: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """What Triton's compiler is told, beside arguments and constants."""
        told: dict[str, Any] = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return told | {"enable_fp_fusion": False} if self.rounds_products else told

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        first = next(iter(self.args.values()))
        tensor = first.base if isinstance(first, TensorDescriptor) else first
        assert isinstance(tensor, Tensor)
        return tensor.device

    def run(self) -> Any:
        """Runs it on the device of its tensors, on that device's current stream.

        Returns:
            The triton.CompiledKernel that runs; None in Triton's interpreter.

        Raises:
            RuntimeError: Triton's interpreter does not run under this NumPy.
        """
        try:
            with on(self.device):
                return self.kernel[self.grid](**self.args, **self.constants, **self.options)
        except InterpreterError as error:
            if "0-dimensional" in str(error) and (reason := refusal_of_interpreter()):
                raise RuntimeError(reason) from error
            raise


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Within it Triton launches on `device`, a GPU or not, whichever was the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def interpreting() -> bool:
    """True where kernels run in Triton's interpreter, on CPU tensors."""
    return bool(triton.knobs.runtime.interpret)


def refusal_of_interpreter(
    triton_version: str = triton.__version__, numpy_version: str = numpy.__version__
) -> str | None:
    """Why Triton's interpreter does not run with these versions; None where it does.

    Triton's scalars are arrays of one element, which Triton 3.8 squeezes and older ones hand to
    int(); NumPy 2.4 and newer refuse that.
    """
    if _is_older(triton_version, 3, 8) and not _is_older(numpy_version, 2, 4):
        return (
            f"Triton {triton_version}'s interpreter does not run under NumPy 2.4 and newer, "
            f"here {numpy_version}; install numpy<2.4, or Triton 3.8"
        )
    return None


def _is_older(version: str, major: int, minor: int) -> bool:
    return tuple(map(int, version.split(".")[:2])) < (major, minor)


def runs_triton(x: Tensor) -> bool:
    """True where an op on `x` launches its kernel; elsewhere it computes its plain-torch twin."""
    return x.is_cuda or (x.device.type == "cpu" and interpreting())


def multiprocessors(device: torch.device) -> int:
    """SMs of a GPU; those of an H200 where there is none, so that choices can be looked at."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 132


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a GPU; an H200's where there is none."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
