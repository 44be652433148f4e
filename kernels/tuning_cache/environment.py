"""What measured times, and saved engines, depend on."""

import ctypes
import hashlib
import importlib.metadata
import platform
import sys

import torch

from resfuse.kernels.cpu.cpus import threads
from resfuse.kernels.cpu.library import bf16_isa, fingerprint, int8_isa, processor


def device_name(device: torch.device) -> str:
    """The GPU's name; or the processor's, with a hash of what it can do, and the threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    described = processor()
    names = [line.split(":")[1] for line in described.splitlines() if line.startswith("model name")]
    name = names[0].strip() if names else platform.processor() or platform.machine()
    abilities = hashlib.sha256(described.encode()).hexdigest()[:8]
    torch_threads, own = torch.get_num_threads(), threads()
    ours = f", {own} for native steps" if own != torch_threads else ""
    return f"{name} ({abilities}), {torch_threads} threads{ours}"


def environment(device: torch.device) -> dict[str, str]:
    """The device, and the version of everything that generates code for it."""
    on_gpu = device.type == "cuda"
    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "triton": _version("triton"),
        **(_gpu() if on_gpu else _cpu()),
    }


def _cpu() -> dict[str, str]:
    arithmetic = {"bf16 arithmetic": bf16_isa(), "int8 arithmetic": int8_isa()}
    return {"native": fingerprint(), **arithmetic}


def _gpu() -> dict[str, str]:
    cudnn = str(torch.backends.cudnn.version())  # another may be installed beside the same torch
    return {"driver": _driver(), "ptxas": _ptxas(), "cudnn": cudnn}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _driver() -> str:
    """The newest CUDA that the driver knows, as it counts: 13000 for 13.0; torch does not say."""
    known = ctypes.c_int(0)
    try:
        library = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        library.cuDriverGetVersion(ctypes.byref(known))
    except (OSError, AttributeError):  # AMD's, say
        return f"unknown for CUDA {torch.version.cuda}"
    return f"{known.value} for CUDA {torch.version.cuda}"


def _ptxas() -> str:
    try:
        from triton.backends.nvidia.compiler import get_ptxas
    except ModuleNotFoundError:
        return "none"
    major, minor = torch.cuda.get_device_capability()
    return get_ptxas(10 * major + minor).version
