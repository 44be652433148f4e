"""After how many images set-up is paid back: the arithmetic, and what the report says of it."""

from dataclasses import replace
from pathlib import Path

import pytest

from report_rows import CASE, add, tables, text_of
from resfuse.bench.records.metrics import METRICS
from resfuse.bench.records.sample import Accuracy, Measured, Memory

FAST = replace(CASE, backend="compiled")


def images_until(setup_s: float, times_ms: tuple[float, ...], case=FAST) -> float | None:
    measured = Measured(
        case=case, param_count=1, macs=1, activations=1, times_ms=times_ms,
        baseline_ms=(100.0, 101.0, 99.0, 100.0), ended_by="rounds", phases_ms={},
        accuracy=Accuracy(0.0, 0.0, 0.0, 1.0), memory=Memory(None, None), setup_s=setup_s,
        baseline_setup_s=0.5, floor_ms=None, joules=None, sm_clock_mhz=None, throttle=None,
        other_load=None, step=lambda: None,
    )  # fmt: skip
    value = METRICS["break_even_images"].compute(measured)
    assert value is None or isinstance(value, float)
    return value


def test_set_up_beyond_the_baselines_over_what_an_image_saves() -> None:
    """Batches of 8: 20 ms a batch are 2.5 ms an image; 10 s more of set-up are 4,000 images."""
    assert images_until(10.5, (80.0, 80.0, 80.0, 80.0)) == pytest.approx(4000)
    assert images_until(0.2, (80.0, 80.0, 80.0, 80.0)) == 0  # sooner there than the baseline


def test_nothing_is_paid_back_by_what_is_not_faster() -> None:
    assert images_until(10.5, (100.0, 120.0, 110.0, 130.0)) is None
    assert images_until(10.5, (60.0, 130.0, 60.0, 130.0)) is None  # the interval contains 1
    assert images_until(10.5, (80.0, 80.0, 80.0, 80.0), CASE) is None  # the baseline itself


def test_the_report_tells_when_and_who_never(tmp_path: Path) -> None:
    add(tmp_path, setup_s=0.5)
    add(tmp_path, FAST, rate=100.0, setup_s=10.5, break_even_images=4000.4)
    add(tmp_path, replace(CASE, backend="onnxrt"), rate=20.0, setup_s=5.0)
    found = dict(tables(text_of(tmp_path)))["Break-even: when set-up is recovered"]
    assert [row["backend"] for row in found] == ["compiled", "onnxrt"]
    assert found[0]["images until set-up is recovered"] == "4000"
    assert found[0]["seconds until then"] == "40.0"
    assert found[1]["images until set-up is recovered"] == "never: not faster"
