"""Where a number was measured: device, versions, threads, ceilings, and the commit."""

import hashlib
import json
import os
import platform
import re
import subprocess
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from pathlib import Path
from types import MappingProxyType

import torch

from resfuse.bench.common.precision import set_math_mode
from resfuse.bench.measuring.clock.timing import CpuStopwatch, CudaStopwatch
from resfuse.bench.measuring.probes import allocator
from resfuse.bench.measuring.probes.processor import cpu_facts, cpu_name, microarchitecture
from resfuse.bench.records.case import PRECISIONS
from resfuse.kernels.gpu.inspect import ptxas

PACKAGES = (
    "torch",
    "triton",
    "torchvision",
    "onnx",
    "onnxruntime-gpu",
    "onnxruntime",
    "openvino",
    "torch-tensorrt",
    "numpy",
)
ROUNDS = 12  # of each loop that finds a ceiling; the fastest counts
NO_RESULTS = ":!results"  # git's way of saying "but these"
# What ceilings depend on.
REACHES = ("device_name", "gpu_memory_gb", "gpu_sms", "driver", "cuda", "cudnn", "torch", "threads")
# What a processor's name says that does not tell machines apart.
_NOISE = re.compile(r"\b(Processor|CPU|\d+-Core)\b|@ ?[\d.]+ ?GHz", re.IGNORECASE)
SOURCES = Path(__file__).resolve().parents[3]


def facts(device: str, threads: int) -> dict[str, str]:
    """Returns what may change a measurement, as text; equal on every call in one environment."""
    found = {"device_name": device_name(device), "device": torch.device(device).type}
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(torch.device(device))
        found |= {
            "gpu_memory_gb": f"{properties.total_memory / 2**30:.0f}",
            "gpu_sms": str(properties.multi_processor_count),
            "driver": _driver(),
            "cuda": str(torch.version.cuda),
            "cudnn": str(torch.backends.cudnn.version()),
            **_ptxas(),
        }
    found |= {
        **cpu_facts(),
        "cpu_cores": str(
            len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        ),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": str(threads or torch.get_num_threads()),
        "malloc": allocator.described(os.environ),
        "memory_gb": _memory_gb(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }
    return found | {name: version for name in PACKAGES if (version := _version(name))}


def env_id(found: dict[str, str]) -> str:
    """Returns ten hex digits that identify an environment in every row."""
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:10]


def folder_name(found: Mapping[str, str]) -> str:
    """Returns the results folder of a machine in readable words: `nvidia-h200`,
    `intel-xeon-emerald-rapids-2-cores`. Within it, env_id distinguishes versions."""
    name = found["device_name"]
    if found.get("device") == "cpu":
        cores = f"{found['cpu_cores']} cores"
        name = _NOISE.sub(" ", f"{found['cpu']} {microarchitecture(found)} {cores}")
    return "-".join(re.findall(r"[a-z0-9.]+", name.lower()))


def device_name(device: str) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(torch.device(device))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cpu_name()}, {cores} cores"


def commit() -> str:
    """Returns the last commit that changed more than results, with a hash of uncommitted changes;
    without git the version, with a hash of the sources, which may have been changed."""
    head = _git("rev-list", "-1", "--abbrev-commit", "--abbrev=12", "HEAD", "--", ".", NO_RESULTS)
    if not head:
        return f"v{_version('resfuse') or 'unknown'}+{_sources_digest()}"
    # Results are data: appending a row must not turn the next row's sources into changed ones.
    changes = _git("diff", "HEAD", "--", ".", NO_RESULTS) + _git(
        "ls-files", "--others", "--exclude-standard", "--", "*.py"
    )
    return f"{head}+{hashlib.sha256(changes.encode()).hexdigest()[:6]}" if changes else head


def known_ceilings(
    found: Mapping[str, str], environments: Iterable[Mapping[str, str]]
) -> dict[str, str]:
    """Returns the highest ceilings recorded for this device with the same driver and libraries.
    Other differences between environments (Triton, packages) do not change them.

    Args:
        found: facts of the environment at hand.
        environments: facts of others, with their ceilings.
    """
    best: dict[str, str] = {}
    for other in environments:
        if all(found.get(name) == other.get(name) for name in REACHES):
            ceilings = {name: rate for name, rate in other.items() if name.startswith("ceiling_")}
            best |= {name: max(rate, best.get(name, "0"), key=float)
                     for name, rate in ceilings.items()}  # fmt: skip
    return best


def _sources_digest() -> str:
    """Returns six hex digits that identify the packages' Python and C++ files."""
    digest = hashlib.sha256()
    for package in ("bench", "kernels", "resnet_ref", "tools"):
        for path in sorted((SOURCES / package).rglob("*")):
            if path.suffix in (".py", ".cpp", ".h"):
                digest.update(f"{path.relative_to(SOURCES)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:6]


def ceilings(
    device: str,
    precisions: Iterable[str],
    known: Mapping[str, str] = MappingProxyType({}),
    rounds: int = ROUNDS,
) -> dict[str, str]:
    """Measures how fast this device copies memory and multiplies in each math mode, on random data.

    A copy counts its bytes twice (read and written). A product is a square matrix multiplication or
    a 3x3 convolution, whichever is faster. Takes about two seconds.

    Args:
        known: those that need not be measured.
        rounds: of each loop. Fewer find lower ceilings, at which more is "faster than possible".
    """
    kind = torch.device(device).type
    copy = "ceiling_copy_gb_s"
    found = {copy: known[copy] if copy in known else f"{_copy_rate(device, kind, rounds):.4g}"}
    for name in precisions:
        precision = PRECISIONS[name]
        if precision.math_mode == "tf32" and kind != "cuda":
            continue
        if precision.is_quantized:  # torch's product of integers is no ceiling on any CPU
            continue
        key = f"ceiling_{precision.math_mode}_tflops"
        if key in known:
            found[key] = known[key]
            continue
        set_math_mode(precision.math_mode, kind)
        rate = _product_rate(device, kind, getattr(torch, precision.product), rounds)
        found[key] = f"{rate:.4g}"
    return found


def _copy_rate(device: str, kind: str, rounds: int) -> float:
    rates = []
    for megabytes in (64, 512):
        # One random megabyte again and again: to draw 512 of them took as long as to copy them.
        source = torch.randn(2**18, device=device).repeat(megabytes)
        target = torch.empty_like(source)
        ms = _fastest_ms(lambda: target.copy_(source), kind, rounds)  # noqa: B023
        rates.append(2 * megabytes * 2**20 / ms / 1e6)
    return max(rates)


def _product_rate(device: str, kind: str, dtype: torch.dtype, rounds: int) -> float:
    n = 8192 if kind == "cuda" else 1536
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    images = torch.randn(64 if kind == "cuda" else 8, 256, 28, 28, device=device, dtype=dtype)
    weight = torch.randn(256, 256, 3, 3, device=device, dtype=dtype)
    images, weight = (t.contiguous(memory_format=torch.channels_last) for t in (images, weight))
    with torch.inference_mode():
        product = 2 * n**3 / _fastest_ms(lambda: a @ b, kind, rounds)
        convolve = _fastest_ms(lambda: torch.conv2d(images, weight, padding=1), kind, rounds)
    return max(product, 2 * images.numel() * weight[0].numel() / convolve) / 1e9


def _fastest_ms(work: Callable[[], object], kind: str, rounds: int) -> float:
    best = float("inf")
    for _ in range(rounds):
        stopwatch = CudaStopwatch() if kind == "cuda" else CpuStopwatch()
        stopwatch.mark()
        work()
        stopwatch.mark()
        best = min(best, stopwatch.laps()[0])
    return best


def _driver() -> str:
    try:
        import pynvml

        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except Exception:  # no package or no permission: the other facts stand without it
        return "unknown"


def _ptxas() -> dict[str, str]:
    """Returns version and origin of Triton's ptxas: an old one can miscompile for Hopper."""
    found = ptxas.in_use()
    if found is None:
        return {"ptxas": "unknown"}
    return {"ptxas": found.version, "ptxas_from": found.origin}


def _memory_gb() -> str:
    return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f}"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=SOURCES, capture_output=True, text=True, check=False
        )
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
