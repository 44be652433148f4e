"""Packages and compilers: which there are, and how to get the others."""

import importlib
import os
from importlib import metadata
from pathlib import Path

from resfuse.bench.common.finding import BROKEN, NOTE, Finding

# import name -> distribution. The harness cannot do without these ...
NEEDED = {
    "torch": "torch", "numpy": "numpy", "pandas": "pandas", "rich": "rich", "psutil": "psutil",
    "matplotlib": "matplotlib", "PIL": "pillow", "skimage": "scikit-image",
    "sklearn": "scikit-learn", "safetensors": "safetensors",
}  # fmt: skip
# ... and measures less without those: (how to get it, what is missing without it).
OPTIONAL = {
    "triton": ("resfuse", "our GPU kernels"),
    "torchvision": ("resfuse[bench]", "torchvision:NAME, --pretrained"),
    "timm": ("timm", "timm:NAME"),
    "segmentation_models_pytorch": ("segmentation-models-pytorch", "smp:NAME"),
    "onnx": ("resfuse[bench]", "every ONNX backend"),
    "onnxscript": ("resfuse[bench]", "every ONNX backend"),
    "onnxruntime": ("resfuse[bench]", "onnxrt"),
    "openvino": ("resfuse[openvino]", "openvino"),
    "torch_tensorrt": ("resfuse[tensorrt]", "tensorrt"),
    "torchao": ("resfuse[torchao]", "compiled in int8"),
    "pynvml": ("resfuse[bench]", "a GPU's clocks and energy"),
}
DISTRIBUTIONS = {
    **NEEDED, "onnxruntime": "onnxruntime-gpu", "torch_tensorrt": "torch-tensorrt",
    "pynvml": "nvidia-ml-py",
}  # fmt: skip


def packages() -> list[Finding]:
    """Returns the versions on two lines, then a line for each package that cannot be imported."""
    there: dict[str, str] = {}
    absent: list[Finding] = []
    for name in [*NEEDED, *OPTIONAL]:
        reason = _import_error(name)
        if reason is None:
            there[name] = _version(name)
        elif name in NEEDED:
            how = f"pip install {DISTRIBUTIONS[name]}"
            absent.append(Finding(name, f"{reason}; nothing is measured without it: {how}", BROKEN))
        else:
            package, use = OPTIONAL[name]
            value = f"{reason}; without it no {use}: pip install '{package}'"
            absent.append(Finding(name, value, NOTE))
    measured = [f"{n} {v}" for n, v in there.items() if n in OPTIONAL or n == "torch"]
    around = [f"{n} {v}" for n, v in there.items() if n in NEEDED and n != "torch"]
    return [
        Finding("frameworks", ", ".join(measured) or "none"),
        Finding("harness", ", ".join(around) or "none"),
        *absent,
    ]


def providers() -> list[Finding]:
    """Returns ONNX Runtime's providers by its own list; only a session shows whether one loads."""
    if _import_error("onnxruntime"):
        return []
    names = importlib.import_module("onnxruntime").get_available_providers()
    return [
        Finding("onnx providers", ", ".join(n.removesuffix("ExecutionProvider") for n in names))
    ]


def compilers() -> list[Finding]:
    """Returns the C++ compiler of the native steps, and what it has built."""
    from resfuse.kernels.cpu.library import cache_folder, why_unavailable

    reason = why_unavailable()
    folder = cache_folder()
    built = len(list((folder / "native").glob("*.so")))
    cache = Finding("cache folder", f"{folder}: native steps for {built} settings, engines' times")
    if not _writable(folder):
        cache = Finding("cache folder", f"{folder} cannot be written: set RESFUSE_CACHE_DIR", NOTE)
    if reason is None:
        return [Finding("native steps", "compiled for this processor"), cache]
    how = "fused and engine use oneDNN, torch.compile may fail: apt-get install g++, or set CXX"
    return [Finding("native steps", f"{reason}; {how}", BROKEN), cache]


def ptxas() -> list[Finding]:
    """Returns Triton's ptxas for Hopper, with a warning if its version is known to miscompile;
    nothing without triton."""
    if _import_error("triton"):
        return []
    import torch
    from triton.backends.nvidia.compiler import get_ptxas

    from resfuse.kernels.engine.tactics.gpu.triton_block_tail import refusal_of_ptxas

    found = get_ptxas(90)
    refused = refusal_of_ptxas(found.version)
    on_hopper = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
    value = f"{found.version}, {found.path}"
    if refused is not None and not on_hopper:
        value += "; on Hopper, block_tail would be left out with it"
    lines = [Finding("ptxas", value)]
    asked = os.environ.get("TRITON_PTXAS_PATH")
    if asked and asked != found.path:  # Triton passes over one that tells no version
        lines.append(Finding("", f"TRITON_PTXAS_PATH is {asked}, which is no ptxas", NOTE))
    if refused is not None and on_hopper:
        lines.append(Finding("", f"block_tail is left out: {refused}", NOTE))
    return lines


def _writable(folder: Path) -> bool:
    """Tells whether the folder can be written, or made."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return there.is_dir() and os.access(there, os.W_OK)


def _import_error(name: str) -> str | None:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        return "is not installed" if error.name in (name, None) else f"needs {error.name}"
    except Exception as error:  # a wheel for another machine, a library that does not load
        return f"cannot be imported ({type(error).__name__}: {str(error).splitlines()[0]})"
    return None


def _version(name: str) -> str:
    for distribution in (DISTRIBUTIONS.get(name, name), name):
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return "of unknown version"
