"""Which rows a page shows, and which of them may stand side by side.

The latest row of a case stands, by its place in the file; older ones stay in the CSV. Standing
rows fall into comparisons: everything in one was measured in the same environment, mode, scenario,
precision and math mode, on the same device, weights and images, and against the same baseline.
Nothing on a page ever puts two comparisons together. Those of the scenarios throughput and server
are kept apart from all others.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from resfuse.bench.records.case import MODES, PRECISIONS, SCENARIOS
from resfuse.bench.records.case_row import IMG_SIZE, LOAD, shape_of
from resfuse.bench.records.metrics import METRICS
from resfuse.bench.records.outcome import STATUSES
from resfuse.bench.records.results import ROWS, read_environments, read_rows
from resfuse.bench.report.data.experiments import experiments, read_training_rows
from resfuse.bench.report.data.families import depth, family
from resfuse.bench.report.data.kernel_rows import read_kernel_rows, workloads
from resfuse.bench.report.data.ladder import EAGER
from resfuse.bench.report.data.palette import backend_rank
from resfuse.bench.report.data.quantized_networks import (
    quantized_networks,
    read_quantization_rows,
)
from resfuse.bench.report.data.result import Comparison, Environment, Result, Setting
from resfuse.bench.report.data.row_values import Row, finite_numbers, whole
from resfuse.bench.trainings.degradation_sheet import SHEET as DEGRADATION
from resfuse.bench.trainings.training_sheet import SHEET as TRAINING

# With env_id and device_name: what makes two rows the same case.
IDENTITY = (
    "env_id", "device_name", "model", "backend", "mode", "precision", "math_mode", "memory_format",
    "requested_batch_size", "infer_img_size", "train_img_size", "weights", "images", "baseline",
    "parallel", "world_size", *LOAD,
)  # fmt: skip
# What a row that did not pass may still say; a speed without a right answer is none.
KEPT_WITHOUT_PASS = (
    "param_count", "infer_gmacs", "infer_macts", "peak_mem_mb", "reserved_mem_mb", "setup_s",
    "rel_l2_err", "max_abs_err", "top1_agree", "err_vs_eager", "sqnr_db",
    "kl",
)  # fmt: skip
PLACE = "place"  # beside a row's columns: where it stands


@dataclass
class _Gathered:
    facts: dict[str, str] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    kernel_rows: list[Row] = field(default_factory=list)
    degradation_rows: list[Row] = field(default_factory=list)
    training_rows: list[Row] = field(default_factory=list)
    quantization_rows: list[Row] = field(default_factory=list)
    quantized_layers: list[Row] = field(default_factory=list)
    incomplete: int = 0


def read_folders(folders: Sequence[Path]) -> list[Environment]:
    """Returns the environments of the folders, the last measured first; a folder given twice counts
    once.

    Raises:
        UsageError: a folder has no results, or a file in it cannot be read.
    """
    gathered: dict[str, _Gathered] = {}
    for folder in {folder.resolve(): folder for folder in folders}.values():
        kernel_rows = read_kernel_rows(folder)
        degradation_rows = read_training_rows(folder, DEGRADATION)
        training_rows = read_training_rows(folder, TRAINING)
        quantization_rows = read_quantization_rows(folder)
        others = kernel_rows or degradation_rows or training_rows or quantization_rows
        rows: list[Row] = []
        if (folder / ROWS).exists() or not others:
            table = read_rows(folder)
            table[PLACE] = [f"row {number} of {folder.name}/{ROWS}" for number in table.index + 1]
            rows = [
                {str(name): value for name, value in row.items()}
                for row in table.to_dict("records")
            ]
        facts = read_environments(folder) if rows or others else {}
        entry = _Gathered()  # holds what comes before the first whole row, which is nothing
        for row in rows:
            if row["status"] in STATUSES and row["mode"] in MODES:
                entry = gathered.setdefault(_text(row["env_id"]), _Gathered())
                entry.rows.append(row)
            else:  # a crash cut it off, after the rows of its own sweep
                entry.incomplete += 1
        for env_id, own in kernel_rows.items():
            gathered.setdefault(env_id, _Gathered()).kernel_rows += own
        for env_id, own in degradation_rows.items():
            gathered.setdefault(env_id, _Gathered()).degradation_rows += own
        for env_id, own in training_rows.items():
            gathered.setdefault(env_id, _Gathered()).training_rows += own
        for env_id, (own, layers) in quantization_rows.items():
            gathered.setdefault(env_id, _Gathered()).quantization_rows += own
            gathered[env_id].quantized_layers += layers
        for env_id, entry in gathered.items():
            entry.facts |= facts.get(env_id, {})
    newest_first = sorted(gathered.items(), key=lambda each: _last_time(each[1]), reverse=True)
    return [_environment(env_id, entry) for env_id, entry in newest_first]


def _last_time(entry: _Gathered) -> str:
    """Returns when an environment's last row was measured, in ISO 8601."""
    every = (
        entry.rows, entry.kernel_rows, entry.degradation_rows, entry.training_rows,
        entry.quantization_rows,
    )  # fmt: skip
    return max((_text(row["timestamp"]) for rows in every for row in rows), default="")


def _environment(env_id: str, entry: _Gathered) -> Environment:
    latest = {(shape_of(row), *(_text(row[name]) for name in IDENTITY)): row for row in entry.rows}
    grouped: dict[Setting, list[Result]] = {}
    for row in latest.values():
        setting = Setting(**{name: _text(row[name]) for name in Setting.__dataclass_fields__})
        grouped.setdefault(setting, []).append(_result(row))
    comparisons = tuple(
        Comparison(setting, tuple(sorted(grouped[setting], key=_result_order)), entry.facts)
        for setting in sorted(grouped, key=_setting_order)
    )
    rows_read = len(entry.rows) + entry.incomplete
    served = tuple(one for one in comparisons if one.setting.is_served)
    return Environment(
        env_id, entry.facts, tuple(one for one in comparisons if not one.setting.is_served),
        rows_read, entry.incomplete,
        workloads(entry.kernel_rows), experiments(entry.degradation_rows),
        experiments(entry.training_rows), served,
        quantized_networks(entry.quantization_rows, entry.quantized_layers),
    )  # fmt: skip


def _result(row: Row) -> Result:
    mode, status = _text(row["mode"]), _text(row["status"])
    numbers = finite_numbers(row, METRICS)
    if status != "pass":
        numbers = {name: value for name, value in numbers.items() if name in KEPT_WITHOUT_PASS}
    return Result(
        model=_model(row),
        backend=_text(row["backend"]),
        memory_format=_text(row["memory_format"]),
        mode=mode,
        batch_size=whole(row["requested_batch_size"]),
        img_size=whole(row[IMG_SIZE[mode]]),
        baseline=_text(row["baseline"]),
        status=status,
        error=_text(row["error"]),
        throttle=_text(row["throttle"]),
        commit=_text(row["commit"]),
        timestamp=_text(row["timestamp"]),
        numbers=numbers,
        place=_text(row[PLACE]),
        name=_text(row["model"]),
        input_shape=shape_of(row),
    )


def _model(row: Row) -> str:
    """The model, with the image it takes where that is no square photograph: two shapes of one
    model are two models on a page."""
    name, shape = _text(row["model"]), shape_of(row)
    return f"{name} {shape}" if shape else name


def _text(value: object) -> str:
    return "" if value is None or (isinstance(value, float) and math.isnan(value)) else str(value)


def _result_order(result: Result) -> tuple[str | int, ...]:
    return (
        family(result.model), depth(result.model), result.model, result.img_size, result.batch_size,
        *backend_rank(result.backend), result.label,
    )  # fmt: skip


def _setting_order(setting: Setting) -> tuple[str | int, ...]:
    precisions = [*PRECISIONS, setting.precision]
    return (
        setting.device_name, MODES.index(setting.mode), precisions.index(setting.precision),
        setting.precision, setting.math_mode, setting.weights, setting.images,
        setting.baseline != EAGER, setting.baseline,
        setting.parallel, int(setting.world_size),
        [*SCENARIOS, setting.scenario].index(setting.scenario), setting.requested_qps,
        setting.latency_bound_ms,
    )  # fmt: skip
