"""`resfuse inspect` for the terminal: what the kernels compile to, as a table, a CSV and a
summary."""

import csv
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

from rich.table import Table

from resfuse.kernels.inspect import Inspection, has_risky_operands, problems

NUMBERS = (
    "warps", "stages", "registers", "spilled B", "shared KB", "tensor-core instr.", "CTAs/SM",
    "warps/SM",
)  # fmt: skip


def table(results: Sequence[Inspection]) -> Table:
    """A line for each launch and target; what is wrong with it stands at the end."""
    shown = Table(title="kernels", title_justify="left", title_style="bold", box=None)
    for heading in ("kernel", "launch", "target"):
        shown.add_column(heading, overflow="fold")
    for heading in NUMBERS:
        shown.add_column(heading, justify="right")
    shown.add_column("problem", overflow="fold")
    for result in results:
        numbers = (
            result.num_warps, result.num_stages, result.registers, result.spill_bytes,
            f"{result.shared_bytes / 1024:.0f}", _tensor_cores(result), result.ctas, result.warps,
        )  # fmt: skip
        shown.add_row(
            result.kernel, result.label, result.target,
            *(str(number) for number in numbers), "; ".join(problems(result)),
        )  # fmt: skip
    return shown


def summary(results: Sequence[Inspection]) -> list[str]:
    """How many launches and problems, with which assemblers, and what to distrust."""
    bad = sum(bool(problems(result)) for result in results)
    assemblers = sorted({(r.assembler, r.assembler_version) for r in results if r.assembler})
    used = ", ".join(f"{path} {version}" for path, version in assemblers)
    lines = [
        f"{len(results)} configurations, {bad} with problems; assembled by {used or 'nothing'}"
    ]
    risky = [result for result in results if has_risky_operands(result)]
    if risky:
        lines.append(
            f"Warning: {len(risky)} of them feed Hopper's tensor cores from registers, which "
            f"ptxas {risky[0].assembler_version} may corrupt (triton #9433, #11781); set "
            "TRITON_PTXAS_PATH to a ptxas from 13.3 on (nvidia-cuda-nvcc on PyPI has one)."
        )
    return lines


def write_csv(results: Sequence[Inspection], file: Path) -> None:
    """Every field of every result, and its problems in the last column."""
    with file.open("w", newline="") as out:
        writer = csv.DictWriter(out, [*(field.name for field in fields(Inspection)), "problems"])
        writer.writeheader()
        for result in results:
            writer.writerow({**asdict(result), "problems": "; ".join(problems(result))})


def _tensor_cores(result: Inspection) -> str:
    """Their instructions; none where the kernel has no dot they could do."""
    return str(result.tensor_core_instructions) if result.dots else "-"
