"""The processor, as far as the system's own tables tell: name, model number, instruction sets.

A hypervisor's name ("Intel Xeon Processor") stands for ten years of chips; family, model, stepping
and the instructions that multiply matrices say which.
"""

import platform
from collections.abc import Mapping
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
# What vectors and matrices are multiplied with, widest first, by the kernel's names (x86, then
# ARM).
INSTRUCTION_SETS = (
    "amx_fp16", "amx_bf16", "amx_int8", "avx10", "avx512_fp16", "avx512_bf16", "avx512_vnni",
    "avx512f", "avx_vnni", "avx2", "avx", "sse4_2",
    "sme2", "sme", "sve2", "sve", "i8mm", "bf16", "asimddp", "asimdhp", "asimd",
)  # fmt: skip
MOST_NAMED = 4
# Server chips, whose names in virtual machines stand for many years of them, by family and model:
# Linux's arch/x86/include/asm/intel-family.h and arch/x86/kernel/cpu/amd.c.
MICROARCHITECTURES = {
    ("6", "63"): "Haswell", ("6", "79"): "Broadwell", ("6", "106"): "Ice Lake",
    ("6", "143"): "Sapphire Rapids", ("6", "207"): "Emerald Rapids",
    ("6", "173"): "Granite Rapids", ("6", "175"): "Sierra Forest",
    ("23", "1"): "Naples", ("23", "49"): "Rome", ("25", "1"): "Milan", ("25", "17"): "Genoa",
    ("25", "160"): "Bergamo", ("26", "2"): "Turin",
}  # fmt: skip
SKYLAKE = ("6", "85")  # its steppings are three chips


def cpu_name() -> str:
    """Returns the processor's name without trademark signs, from the system's own tables."""
    name = _first().get("model name") or platform.processor() or platform.machine()
    return " ".join(name.replace("(R)", "").replace("(TM)", "").split())


def cpu_facts() -> dict[str, str]:
    """Returns the fact `cpu`, and `cpu_model` and `cpu_isa` where known, which distinguish
    processors of one name."""
    entry = _first()
    number = [
        f"{word} {entry[key]}"
        for key, word in (
            ("cpu family", "family"), ("model", "model"), ("stepping", "stepping"),
            ("CPU implementer", "implementer"), ("CPU part", "part"), ("CPU variant", "variant"),
            ("CPU revision", "revision"),
        )
        if key in entry
    ]  # fmt: skip
    here = set((entry.get("flags") or entry.get("Features") or "").split())
    widest = [name for name in INSTRUCTION_SETS if name in here][:MOST_NAMED]
    found = {"cpu": cpu_name(), "cpu_model": " ".join(number), "cpu_isa": " ".join(widest)}
    return {key: value for key, value in found.items() if value}


def microarchitecture(facts: Mapping[str, str]) -> str:
    """Returns the name of a server chip's design by the fact `cpu_model`, "" if it is unknown."""
    words = facts.get("cpu_model", "").split()
    number = dict(zip(words[::2], words[1::2], strict=False))
    chip = number.get("family", ""), number.get("model", "")
    if chip == SKYLAKE:
        stepping = int(number.get("stepping", "0"))
        return "Skylake" if stepping < 5 else "Cascade Lake" if stepping < 10 else "Cooper Lake"
    return MICROARCHITECTURES.get(chip, "")


def _first() -> dict[str, str]:
    """Returns what the system says of its first processor; empty where it has no such table."""
    try:
        block = CPUINFO.read_text().split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in block.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}
