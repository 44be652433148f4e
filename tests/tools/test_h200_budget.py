"""The predictions for an H200 that stand in its NOTES.md are those of tools/h200_budget.py, and the
times they start from are the measured ones there."""

import re
from pathlib import Path

import pytest

from resfuse.tools import h200_budget
from resfuse.tools.gpu_plan.costs import MANY, ONE, PREDICTED_MS

NOTES = (Path(__file__).parents[2] / "results/nvidia-h200/NOTES.md").read_text()


def measured() -> dict[tuple[str, ...], tuple[float, float, float]]:
    """Floor, cuDNN's and our ms of each convolution in the table of kernels."""
    found = {}
    pattern = r"\| (1x1|3x3) (\d+) (\S+)( \S+)? \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|"
    for r, side, channels, more, *times in re.findall(pattern, NOTES):
        found[r, side, channels, more.strip()] = tuple(map(float, times))
    return found


def test_the_times_it_starts_from_were_measured() -> None:
    table = measured()
    seen = set()
    for conv in h200_budget.CONVS:
        if conv.cudnn_ms is None:
            continue
        same = conv.r == 3
        side = str(conv.hw * conv.stride)
        more = f"/{conv.stride}" if same else "+res" * conv.residual
        key = f"{conv.r}x{conv.r}", side, str(conv.c) if same else f"{conv.c}->{conv.k}", more
        floor, cudnn, ours = table[key]
        assert (conv.cudnn_ms, conv.triton_ms) == (cudnn, ours), key
        assert conv.floor_ms(256, "fp16") == pytest.approx(floor, abs=0.004), key
        seen.add(key)
    assert seen == set(table)
    assert sum(conv.count for conv in h200_budget.CONVS) == 52  # of ResNet-50's 53, but its stem


def test_the_notes_have_its_table() -> None:
    for line in h200_budget.table():
        assert line in NOTES


def test_every_step_but_int8s_saves_time() -> None:
    ladder = [step.ms for step in h200_budget.steps() if "int8" not in step.what]
    assert ladder == sorted(ladder, reverse=True)
    for step in h200_budget.steps():
        assert set(step.times) == set(h200_budget.KINDS) and min(step.times.values()) >= 0


def test_the_plan_of_ten_minutes_shows_them() -> None:
    ladder = h200_budget.batch_1()
    assert {
        ("peer", MANY): h200_budget.ms_of(
            "convolution by convolution"
        ),  # by hand in NOTES.md: 5.33
        ("fp16", MANY): h200_budget.ms_of(": the plan as it stands"),
        ("int8", MANY): h200_budget.ms_of("int8: the plan as it stands"),
        ("fp16", ONE): ladder[0][1] / 1e3,
        ("int8", ONE): ladder[-1][1] / 1e3,
    } == pytest.approx(PREDICTED_MS, rel=2e-3)
