"""The processor, as far as the system's own tables tell: name, model number, instruction sets.

A hypervisor's name ("Intel Xeon Processor") stands for ten years of chips; family, model, stepping
and the instructions that multiply matrices say which.
"""

import platform
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


def cpu_name() -> str:
    """The processor's name without trademark signs, from the system's own tables."""
    name = _first().get("model name") or platform.processor() or platform.machine()
    return " ".join(name.replace("(R)", "").replace("(TM)", "").split())


def cpu_facts() -> dict[str, str]:
    """`cpu`, and what tells processors of one name apart: `cpu_model`, `cpu_isa` where known."""
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


def _first() -> dict[str, str]:
    """What the system says of its first processor; empty where it has no such table."""
    try:
        block = CPUINFO.read_text().split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in block.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}
