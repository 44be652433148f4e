"""The device and the processors around it: names, clocks, limits, arithmetic, measured rates."""

import os
from pathlib import Path

from resfuse.bench.common.finding import BROKEN, NOTE, Finding

CGROUP = Path("/sys/fs/cgroup")
OWN_CGROUP = Path("/proc/self/cgroup")
GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")


def device_part(device: str) -> list[Finding]:
    """Describes the device that would be measured, and its clocks."""
    from resfuse.bench.measuring.probes import nvml

    facts = facts_of_rows(device)
    found = [Finding("device", facts["device_name"])]
    if facts["device"] == "cuda":
        parts = (
            f"driver {facts['driver']}, CUDA {facts['cuda']}, cuDNN {facts['cudnn']}, "
            f"{facts['gpu_memory_gb']} GB, {facts['gpu_sms']} multiprocessors"
        )
        clock, why = nvml.sm_clock_mhz(), nvml.throttle()
        value = "unknown: NVML does not answer" if clock is None else f"{clock} MHz now"
        slowed = f", slowed by {why}" if why not in (None, "none") else ""
        state = NOTE if clock is None or slowed else "ok"
        found += [Finding("", parts), Finding("GPU clock", value + slowed, state)]
    cpu = f"{facts['cpu']} ({facts.get('cpu_isa', 'unknown instructions')})"
    found += [Finding("CPU", f"{cpu}, {facts['threads']} threads of torch"), cores(), clocks()]
    return found


def cores(folder: Path = CGROUP, own: Path = OWN_CGROUP) -> Finding:
    """Returns the number of processors this process may use, and whether its cgroup grants
    fewer."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    granted = cgroup_cores(folder, own)
    value = f"{count} of {os.cpu_count()} processors"
    if granted is None:
        return Finding("CPU limits", f"{value}; no cgroup limit")
    if granted >= (count or 1):
        return Finding("CPU limits", f"{value}; the cgroup grants {granted:g}")
    value = f"{value}, but the cgroup grants {granted:g}: threads will be stopped; --threads helps"
    return Finding("CPU limits", value, NOTE)


def cgroup_cores(folder: Path, own: Path) -> float | None:
    """Returns the least number of processors that this process's cgroups grant, None without a
    limit.

    Args:
        folder: where they are mounted, of version 2 or 1.
        own: which of them this process is in, as /proc/self/cgroup has it.
    """
    limits = []
    for line in _text(own).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mounts = [folder] if not controllers else [folder / controllers, folder / "cpu"]
        for mount in mounts:
            place = mount / path.lstrip("/")
            for at in (place, *place.parents):
                if at.is_relative_to(mount):
                    limits.append(_limit(at))
    return min((limit for limit in limits if limit is not None), default=None)


def clocks(governor: Path = GOVERNOR) -> Finding:
    """Says how the system sets the CPU's clock."""
    name = _text(governor)
    if not name:
        return Finding("CPU clock", "set by the host of this virtual machine or container")
    if name in ("performance", "schedutil"):
        return Finding("CPU clock", f"governor {name}")
    value = f"governor {name}: the clock wanders; `cpupower frequency-set -g performance` holds it"
    return Finding("CPU clock", value, NOTE)


def arithmetic(device: str) -> list[Finding]:
    """Returns whether convolutions keep channels_last, whether they compute finite numbers, and
    TF32's switches."""
    import torch

    x = torch.randn(1, 16, 8, 8, device=device).to(memory_format=torch.channels_last)
    weight = torch.randn(16, 16, 3, 3, device=device)
    y = torch.conv2d(x, weight, padding=1)
    preserved = y.is_contiguous(memory_format=torch.channels_last)
    wrong = not torch.isfinite(y).all().item()
    on = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    tf32 = f"convolutions {_on(on[0])}, products {_on(on[1])}"
    if torch.device(device).type == "cpu":
        tf32 = f"no arithmetic of a CPU (switches: {tf32})"
    return [
        Finding("convolution", "gives numbers that are not finite", BROKEN)
        if wrong
        else Finding("channels_last", "kept by convolutions" if preserved else "not kept", "ok"),
        Finding("TF32", f"{tf32}; bench sets both by --precision"),
    ]


def rates(device: str, folder: Path) -> list[Finding]:
    """Returns the recorded ceilings of this environment, and whether its results can be written."""
    from resfuse.bench.common.errors import UsageError
    from resfuse.bench.measuring.probes import machine
    from resfuse.bench.records import results

    facts = facts_of_rows(device)
    own = folder / machine.folder_name(facts)
    try:
        writable = next(p for p in (own, *own.parents) if p.exists())
        if not (writable.is_dir() and os.access(writable, os.W_OK)):
            raise UsageError(f"{writable} cannot be written")
        known = results.read_environments(own) if (own / results.ENVIRONMENTS).exists() else {}
    except UsageError as error:
        return [Finding("results", f"{error}: use another --results folder", BROKEN)]
    ceilings = {
        key.removeprefix("ceiling_"): float(value)
        for key, value in known.get(machine.env_id(facts), {}).items()
        if key.startswith("ceiling_")
    }
    where = Finding("results", str(own))
    if not ceilings:
        value = "not measured here with these versions: `resfuse bench` or `resfuse roofline` does"
        return [where, Finding("ceilings", value)]
    words = [
        f"{value:.4g} GB/s copied" if key == "copy_gb_s"
        else f"{1e3 * value:.4g} GFLOP/s {key.removesuffix('_tflops')}"
        for key, value in ceilings.items()
    ]  # fmt: skip
    return [where, Finding("ceilings", ", ".join(words))]


def facts_of_rows(device: str) -> dict[str, str]:
    """Returns the environment that rows would have, with the allocator's settings."""
    from resfuse.bench.measuring.probes import allocator, machine

    malloc = allocator.described(allocator.keeping(os.environ))
    return {**machine.facts(device, 0), "malloc": malloc}


def _limit(folder: Path) -> float | None:
    quota, _, period = _text(folder / "cpu.max").partition(" ")
    if not quota:
        quota, period = (_text(folder / f"cpu.cfs_{n}_us") for n in ("quota", "period"))
    if not quota.isdigit() or not period.isdigit() or period == "0":  # "max", or -1
        return None
    return int(quota) / int(period)


def _text(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""


def _on(state: bool) -> str:
    return "on" if state else "off"
