"""CASES: the columns of rows.csv, whose rows say what a case asked for, measured, and how it ended.

Column order: the model, timm's columns, what was asked, our columns, how it ended, where and when.
A new metric only appends to what readers may find.
"""

from collections.abc import Mapping
from dataclasses import fields

from resfuse.bench.records.case import Load
from resfuse.bench.records.metrics import METRICS
from resfuse.bench.records.sheet import ENDED, Sheet

LOAD = tuple(field.name for field in fields(Load))

ASKED = (
    "backend", "mode", "precision", "math_mode", "memory_format", "device_name",
    "requested_batch_size", "weights", "images", "baseline", "parallel", "world_size",
    "input_shape", "origin", *LOAD,
)  # fmt: skip

IMG_SIZE = {"inference": "infer_img_size", "train": "train_img_size"}


def shape_of(row: Mapping[str, object]) -> str:
    """A row's image shape; "" for a square photograph, as all rows were once."""
    shape = str(row.get("input_shape") or "")
    size = row.get(IMG_SIZE.get(str(row.get("mode")), ""))
    if isinstance(size, int | float) and shape == f"3x{size:.0f}x{size:.0f}":
        return ""
    return "" if shape == "nan" else shape


def columns() -> tuple[str, ...]:
    """Returns the columns of rows.csv, in order."""
    timm = tuple(name for name in METRICS if name.startswith(("infer_", "train_", "param_")))
    ours = tuple(name for name in METRICS if name not in timm)
    return ("model", "infer_img_size", "train_img_size", *timm, *ASKED, *ours, *ENDED)


CASES = Sheet(
    "rows.csv",
    columns(),
    frozenset(
        (
            "model", "backend", "mode", "precision", "math_mode", "memory_format", "device_name",
            "weights", "images", "baseline", "parallel", "ended_by", "throttle", "status", "error",
            "env_id", "commit", "timestamp", "input_shape", "origin", "weights_sha256", *LOAD,
        )
    ),
    "resfuse bench",
    frozenset((*METRICS, "parallel", "world_size", "input_shape", "origin", *LOAD)),
)  # fmt: skip
