"""Turns kernels.csv into workloads: the latest row of a provider on a convolution counts."""

from collections.abc import Sequence
from pathlib import Path

from resfuse.bench.records.case import PRECISIONS
from resfuse.bench.records.layer_metrics import KERNEL_METRICS
from resfuse.bench.records.layer_row import SHEET
from resfuse.bench.records.outcome import STATUSES
from resfuse.bench.records.results import read_rows
from resfuse.bench.report.data.families import depth, family
from resfuse.bench.report.data.row_values import Row, finite_numbers, whole
from resfuse.bench.report.data.workload import KernelResult, Workload

WORKLOAD = (
    "device_name", "model", "infer_img_size", "requested_batch_size", "precision", "math_mode",
)  # fmt: skip
IDENTITY = (*WORKLOAD, "op", "shape", "provider")
# What a row that did not pass may still say; a speed without a right answer is none.
KEPT_WITHOUT_PASS = ("rel_l2_err", "max_abs_err", "err_vs_eager", "gmacs", "least_mb")
NUMBERS = (*KERNEL_METRICS, "gmacs", "least_mb")


def read_kernel_rows(folder: Path) -> dict[str, list[Row]]:
    """Returns the complete rows of a folder's kernels.csv by env_id, in order; empty without a
    file.

    Raises:
        UsageError: the file cannot be read.
    """
    if not (folder / SHEET.file).exists():
        return {}
    found: dict[str, list[Row]] = {}
    for row in read_rows(folder, SHEET).to_dict("records"):
        if row["status"] in STATUSES:  # otherwise a crash cut it off
            found.setdefault(str(row["env_id"]), []).append({str(k): v for k, v in row.items()})
    return found


def workloads(rows: Sequence[Row]) -> tuple[Workload, ...]:
    """Returns the workloads of one environment's rows, by precision, model in order of depth and
    batch."""
    latest = {tuple(str(row[name]) for name in IDENTITY): row for row in rows}
    grouped: dict[tuple[str, ...], list[Row]] = {}
    for row in latest.values():
        grouped.setdefault(tuple(str(row[name]) for name in WORKLOAD), []).append(row)
    return tuple(sorted((_workload(group) for group in grouped.values()), key=_order))


def _workload(rows: list[Row]) -> Workload:
    first = rows[0]
    return Workload(
        device_name=str(first["device_name"]),
        model=str(first["model"]),
        img_size=whole(first["infer_img_size"]),
        batch_size=whole(first["requested_batch_size"]),
        precision=str(first["precision"]),
        math_mode=str(first["math_mode"]),
        results=tuple(_result(row) for row in rows),
    )


def _result(row: Row) -> KernelResult:
    numbers = finite_numbers(row, NUMBERS)
    if row["status"] != "pass":
        numbers = {name: value for name, value in numbers.items() if name in KEPT_WITHOUT_PASS}
    return KernelResult(
        shape=str(row["shape"]),
        layer=str(row["layer"]),
        provider=str(row["provider"]),
        count=whole(row["count"]),
        status=str(row["status"]),
        error=str(row["error"]),
        commit=str(row["commit"]),
        numbers=numbers,
    )


def _order(workload: Workload) -> tuple[str | int, ...]:
    precisions = [*PRECISIONS, workload.precision]
    return (
        workload.device_name, precisions.index(workload.precision), workload.precision,
        workload.math_mode, family(workload.model), depth(workload.model), workload.model,
        workload.img_size, workload.batch_size,
    )  # fmt: skip
