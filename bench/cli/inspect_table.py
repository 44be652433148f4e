"""`resfuse inspect` for the terminal: what the kernels compile to, as a table, a CSV and a
summary."""

from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

from rich.table import Table

from resfuse.bench.common.csv_text import line, neutral
from resfuse.kernels.gpu.inspect.inspect import Inspection, has_risky_operands, problems
from resfuse.kernels.gpu.inspect.ptxas import sound_path

NUMBERS = ("registers", "spilled B", "shared KB", "tensor-core", "CTAs/SM", "warps/SM")


def table(results: Sequence[Inspection]) -> Table:
    """Returns a table with a line for each launch and target; problems are in the last column."""
    shown = Table(title="kernels", title_justify="left", title_style="bold", box=None)
    for heading in ("kernel", "launch", "target"):
        shown.add_column(heading, overflow="fold")
    for heading in NUMBERS:
        shown.add_column(heading, justify="right")
    shown.add_column("problem", overflow="fold")
    for result in results:
        numbers = (
            result.registers, result.spill_bytes, round(result.shared_bytes / 1024),
            result.tensor_core_instructions if result.dots else "-", result.ctas, result.warps,
        )  # fmt: skip
        named = (result.kernel, result.label, result.target)
        shown.add_row(*named, *(str(n) for n in numbers), "; ".join(problems(result)))
    return shown


def summary(results: Sequence[Inspection]) -> list[str]:
    """Sums up launches, problems and assemblers, and says what to distrust."""
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
            f"TRITON_PTXAS_PATH to one from 13.3 on: {sound_path() or 'nvidia-cuda-nvcc on PyPI'}"
        )
    return lines


def write_csv(results: Sequence[Inspection], file: Path) -> None:
    """Writes every field of every result, with its problems in the last column."""
    with file.open("w", newline="") as out:
        out.write(line([*(field.name for field in fields(Inspection)), "problems"]))
        for result in results:
            cells = [*asdict(result).values(), "; ".join(problems(result))]
            out.write(line(map(neutral, cells)))
