"""Builds results folders for the tests of the report, and reads its pages back."""

import re
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

from resfuse.bench.case import Case
from resfuse.bench.report import write_report
from resfuse.bench.results import append_row, record_environment
from resfuse.bench.row import Outcome, Stamp, record

CASE = Case("resnet18", "eager", "inference", "cpu", "float32", "contiguous", 8, 224)


STAMP = Stamp("Xeon 2.9 GHz", "xeon-torch2.14.1", "3f2a91c", "2026-05-09T10:00:00+00:00")


FACTS = {"torch": "2.14.1", "threads": "2", "ceiling_ieee_tflops": "0.5", "ceiling_copy_gb_s": "12"}


NETWORKS = {"resnet18": (11.69, 1.82), "resnet50": (25.56, 4.09), "resnet152": (60.19, 11.5)}


def add(folder: Path, case: Case = CASE, stamp: Stamp = STAMP, **metrics: float) -> None:
    """Appends a row that passed, with `rate` images/s and any metric that is given."""
    rate = metrics.pop("rate", 40.0)
    ms = 1e3 * case.batch_size / rate
    parameters, gmacs = NETWORKS.get(case.model, (1.0, 0.1))
    kind = "infer" if case.mode == "inference" else "train"
    values = {
        f"{kind}_samples_per_sec": rate, f"{kind}_step_time": ms, "p50_ms": ms, "p90_ms": 1.07 * ms,
        "param_count": parameters, "infer_gmacs": gmacs, "peak_mem_mb": 187.3, "setup_s": 2.47,
        "rel_l2_err": 3.21e-7, "sol_pct": 61.7, "rounds": 23,
        "speedup": 1.3, "speedup_ci_low": 1.2, "speedup_ci_high": 1.4,
    }  # fmt: skip
    append_row(folder, record(case, Outcome("pass", "", values | metrics), stamp))
    record_environment(folder, stamp.env_id, FACTS)


def add_failed(folder: Path, case: Case, status: str, error: str, **metrics: float) -> None:
    append_row(folder, record(case, Outcome(status, error, metrics), STAMP))
    record_environment(folder, STAMP.env_id, FACTS)


def text_of(folder: Path) -> str:
    """The page without its plots, which take most of the time."""
    with patch("resfuse.bench.report.page.PLOTS", {}):
        return write_report(folder).read_text()


def build_core(folder: Path) -> Path:
    """Two models, two batches, four ways to run them; one failed, one not available."""
    for i, model in enumerate(("resnet152", "resnet18")):
        for batch in (8, 1):
            for j, name in enumerate(("eager", "onnxrt", "compiled")):
                case = replace(CASE, model=model, batch_size=batch, backend=name)
                add(folder, case, rate=9.137 * (1 + j) + 31.7 * i + batch, speedup=1.21 + j / 17)
            case = replace(CASE, model=model, batch_size=batch, memory_format="channels_last")
            add(folder, case, rate=3.3 + i + batch, speedup=0.8, speedup_ci_low=0.7)
            case = replace(CASE, model=model, batch_size=batch, backend="tensorrt")
            add_failed(folder, case, "unavailable", "the package torch_tensorrt is not installed")
    case = replace(CASE, backend="fused")
    add_failed(folder, case, "fail_accuracy", "error 3.1e-2 is too large", rel_l2_err=3.1e-2)
    write_report(folder)
    return folder


def tables(page: str) -> list[tuple[str, list[dict[str, str]]]]:
    """Every table of a page as (the heading above it, rows keyed by column title)."""
    heading, found, lines = "", [], []
    for line in [*page.splitlines(), ""]:
        if line.startswith("#"):
            heading = line.lstrip("# ")
        if line.startswith("|"):
            lines.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
        elif lines:
            found.append((heading, [dict(zip(lines[0], row, strict=True)) for row in lines[2:]]))
            lines = []
    return found


def headline(page: str) -> dict[tuple[str, int, str], dict[str, str]]:
    """(model, batch, backend) -> its line of the headline tables."""
    return {
        (heading.split(",")[0], int(row["batch"]), row["backend"]): row
        for heading, rows in tables(page)
        if heading.endswith(" px")
        for row in rows
    }
