"""NOTES.md of a results folder: the two limits and what was measured, from the rows; then room for
what people predict and learn. Written once, and then theirs."""

from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from resfuse.bench.common.errors import UsageError
from resfuse.bench.measuring.probes import roofline
from resfuse.bench.records import results
from resfuse.bench.records.case import PRECISIONS, Case
from resfuse.bench.records.convolutions import convolutions
from resfuse.resnet_ref import MODELS, create

FILE = "NOTES.md"
GROUP = ["model", "precision", "requested_batch_size", "infer_img_size"]
ROOM = """## Predictions and outcomes

| change | predicted | measured | why they differ |
| --- | --- | --- | --- |

## What was learnt
"""


def write_if_missing(folder: Path) -> Path | None:
    """Writes the notes of the environment of the last row; None where there are notes already, or
    nothing passed.

    Raises:
        UsageError: the folder's files cannot be read.
    """
    path = folder / FILE
    if path.exists():
        return None
    rows = results.read_rows(folder)
    if rows.empty:
        return None
    here = rows[(rows.env_id == rows.env_id.iloc[-1]) & (rows.commit == rows.commit.iloc[-1])]
    passed = here[(here.status == "pass") & (here["mode"] == "inference")]
    if passed.empty:
        return None
    env_id = str(passed.env_id.iloc[-1])
    facts = results.read_environments(folder).get(env_id)
    if facts is None:
        raise UsageError(f"{folder / results.ENVIRONMENTS} lacks the environment {env_id}")
    ceilings = {key: float(value) for key, value in facts.items() if key.startswith("ceiling_")}
    groups = passed.groupby(GROUP, sort=False)
    parts = [
        f"# {facts.get('device_name', env_id)}",
        f"From the rows of environment {env_id}, commit {passed.commit.iloc[-1]}. Ceilings: "
        + ", ".join(f"{key.removeprefix('ceiling_')} {value:g}" for key, value in ceilings.items())
        + ".",
        "## Limits",
        _table(LIMIT_HEADINGS, [_limits(key, ceilings) for key, _ in groups]),
        "FLOPs: all multiply-accumulates at the ceiling of the math mode. Bytes: weights, images "
        "and outputs once, at the ceiling of copying. Convolution by convolution: the larger of "
        "the two for each, every one of its tensors moved once, and added up.",
        "## Measured",
        _table(MEASURED_HEADINGS, [line for key, rows in groups for line in _measured(key, rows)]),
        "Medians; the speed-up is over the baseline in the same rounds, with its 95 % interval.",
        ROOM,
    ]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("\n\n".join(parts))
    temporary.replace(path)
    return path


Key = tuple[str, str, float, float]  # model, precision, images, pixels
LIMIT_HEADINGS = ("network", "FLOPs, ms", "bytes, ms", "convolution by convolution, ms", "images/s")
MEASURED_HEADINGS = (
    "network", "backend", "median, ms", "images/s", "% of floor", "speed-up", "baseline",
)  # fmt: skip


def _limits(key: Key, ceilings: dict[str, float]) -> list[str]:
    model, precision, batch_size, img_size = key[0], key[1], int(key[2]), int(key[3])
    if model not in MODELS or precision not in PRECISIONS:  # a newer version's, or a damaged row
        return [_network(key), *["unknown"] * 4]
    chosen = PRECISIONS[precision]
    rate = ceilings.get(f"ceiling_{chosen.math_mode}_tflops")
    copy = ceilings.get("ceiling_copy_gb_s")
    if not rate or not copy:
        return [_network(key), *["unknown"] * 4]
    cost = roofline.cost(create(model, device="meta").eval(), img_size)
    size = getattr(torch, chosen.storage).itemsize
    flops_ms = 2 * cost.macs * batch_size / rate / 1e9
    moved = (cost.param_count + batch_size * (cost.inputs + cost.outputs)) * size
    case = Case(model, "eager", "inference", "cpu", precision, "contiguous", batch_size, img_size)
    one_by_one_ms = sum(
        one.count * max(one.problem.flops / rate / 1e9, one.problem.least_bytes / copy / 1e6)
        for one in convolutions(case)
    )
    times = (flops_ms, moved / copy / 1e6, one_by_one_ms)
    return [
        _network(key),
        *(f"{ms:.3g}" for ms in times),
        f"{batch_size / one_by_one_ms * 1e3:.0f}",
    ]


def _measured(key: Key, rows: pd.DataFrame) -> list[list[str]]:
    return [_line(key, row) for row in rows.sort_values("p50_ms").to_dict("records")]


def _line(key: Key, row: Mapping[Hashable, Any]) -> list[str]:
    low, high = row["speedup_ci_low"], row["speedup_ci_high"]
    return [
        _network(key),
        f"{row['backend']} {row['memory_format']}",
        f"{row['p50_ms']:.3g}",
        f"{row['infer_samples_per_sec']:.0f}",
        "" if pd.isna(row["sol_pct"]) else f"{row['sol_pct']:.0f}",
        f"{row['speedup']:.2f} [{low:.2f}, {high:.2f}]",
        row["baseline"],
    ]


def _network(key: Key) -> str:
    return f"{key[0]}, {key[1]}, batch {int(key[2])}, {int(key[3])} pixels"


def _table(headings: tuple[str, ...], lines: list[list[str]]) -> str:
    rows = [headings, ["---"] * len(headings), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
