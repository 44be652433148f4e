"""Builds results folders for the tests of the report, and reads its pages back."""

import random
import re
from dataclasses import replace
from itertools import product
from pathlib import Path
from unittest.mock import patch

import pandas as pd

from resfuse.bench.records.case import Case
from resfuse.bench.records.case_row import CASES, columns
from resfuse.bench.records.outcome import Outcome
from resfuse.bench.records.results import ROWS, append_row, record_environment
from resfuse.bench.records.sheet import Stamp
from resfuse.bench.report import write_report
from resfuse.bench.report.report_page import DETAILS

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
    append_row(folder, CASES.record(case.identity(), Outcome("pass", "", values | metrics), stamp))
    record_environment(folder, stamp.env_id, FACTS)


def add_failed(folder: Path, case: Case, status: str, error: str, **metrics: float) -> None:
    append_row(folder, CASES.record(case.identity(), Outcome(status, error, metrics), STAMP))
    record_environment(folder, STAMP.env_id, FACTS)


def text_of(folder: Path) -> str:
    """DETAILS.md without its plots, which take most of the time."""
    with patch("resfuse.bench.report.report_page.PLOTS", {}):
        return details(folder)


def details(folder: Path) -> str:
    """Writes the report; returns DETAILS.md, which has everything."""
    return write_report(folder).with_name(DETAILS).read_text()


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


# name: parameters in millions, GMACs
MANY_NETWORKS = {
    "resnet18": (11.7, 1.81), "resnet34": (21.8, 3.66), "resnet50": (25.6, 4.09),
    "resnet101": (44.5, 7.8), "resnet152": (60.2, 11.5), "resnext50_32x4d": (25.0, 4.23),
    "resnext101_64x4d": (83.5, 15.5), "wide_resnet50_2": (68.9, 11.4), "vgg19_bn": (143.7, 19.6),
    "cifar_resnet20": (0.27, 0.041), "cifar_resnet56": (0.86, 0.126),
    "cifar_resnet110": (1.73, 0.255), "cifar_resnet1202": (19.4, 2.87),
    "preresnet200": (64.7, 15.0),
}  # fmt: skip
# backend: share of the roof with a large batch, ms lost to launching
WAYS = {
    "eager": (0.34, 3.1), "compiled": (0.55, 1.6), "cudnn_fused": (0.43, 1.3), "onnxrt": (0.3, 3.9),
    "tensorrt": (0.61, 0.3), "fused": (0.58, 0.6), "engine": (0.63, 0.25), "openvino": (0, 0),
}  # fmt: skip
MANY_FACTS = {"device": "cuda", "threads": "16", "torch": "2.14.1", "driver": "570.86",
              "ceiling_fp16_tflops": "720", "ceiling_bf16_tflops": "730",
              "ceiling_ieee_tflops": "51", "ceiling_copy_gb_s": "4010"}  # fmt: skip


def build_many(folder: Path, batches: tuple[int, ...] = (1, 32, 256)) -> Path:
    """What a GPU's results may look like, made up from a roofline and no measurement: 14 networks,
    8 backends in two formats, three precisions; 672 rows a batch size, some of which failed."""
    folder.mkdir(parents=True, exist_ok=True)
    stamp = replace(STAMP, device_name="NVIDIA H200", env_id="h200-torch2.14.1")
    chance = random.Random(7)
    rows = []
    asked = product(("float16", "bfloat16", "float32"), MANY_NETWORKS, batches, WAYS)
    for precision, model, batch, name in asked:
        for memory_format in ("contiguous", "channels_last"):
            case = Case(model, name, "inference", "cuda", precision, memory_format, batch, 224)
            rows.append(CASES.record(case.identity(), _made_up(case, chance), stamp))
    pd.DataFrame(rows, columns=list(columns())).to_csv(folder / ROWS, index=False)
    record_environment(folder, stamp.env_id, MANY_FACTS)
    return folder


def _made_up(case: Case, chance: random.Random) -> Outcome:
    parameters, gmacs = MANY_NETWORKS[case.model]
    if case.backend == "openvino":
        return Outcome("unavailable", "OpenVINO runs on Intel devices; this one is cuda")
    if case.precision == "float32" and case.batch_size == 256 and parameters > 60:
        return Outcome("oom", f"CUDA out of memory ({case.backend})")
    if case.backend == "onnxrt" and case.model == "resnext101_64x4d":
        return Outcome("timeout", "no answer in 300 s")
    if case.backend == "tensorrt" and case.model == "cifar_resnet1202":
        return Outcome("fail_accuracy", "error 3.1e-2 is too large", {"rel_l2_err": 3.1e-2})
    peak = 51 if case.precision == "float32" else 720

    def time(name: str, memory_format: str) -> float:
        share, launch = WAYS[name]
        layers = 0.3 + parameters**0.5 / 7
        slower = 1.0 if memory_format == "channels_last" else 1.12
        return launch * layers / 3 + slower * 2 * gmacs * case.batch_size / (share * peak)

    ms, baseline = time(case.backend, case.memory_format), time("eager", "contiguous")
    spread = 1 + chance.random() * 0.03
    ms *= 1 + chance.gauss(0, 0.012)
    ratio = baseline / ms if not case.is_baseline else 1 + chance.gauss(0, 0.004)
    floor = 2 * gmacs * case.batch_size / peak
    return Outcome("pass", "", {
        "infer_samples_per_sec": 1e3 * case.batch_size / ms, "infer_step_time": ms,
        "infer_batch_size": case.batch_size, "infer_gmacs": gmacs, "param_count": parameters,
        "p50_ms": ms, "p90_ms": ms * spread, "p99_ms": ms * spread**3, "rounds": 100,
        "peak_mem_mb": 4 * parameters + 22 * case.batch_size * gmacs**0.5, "setup_s": 12 * spread,
        "rel_l2_err": 4e-4 * spread, "max_abs_err": 2e-3, "top1_agree": 1.0, "err_vs_eager": 3e-4,
        "floor_ms": floor, "baseline_p50_ms": baseline, "sol_pct": 100 * floor / ms,
        "joules_per_image": 0.6 * ms / case.batch_size, "sm_clock_mhz": 1830, "speedup": ratio,
        "speedup_ci_low": ratio / spread**0.5, "speedup_ci_high": ratio * spread**0.5,
    })  # fmt: skip


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
