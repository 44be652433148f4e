"""`resfuse study models --kinds speed`: what stands on the page that is made of its rows."""

import re
from dataclasses import replace
from typing import Any

import pandas as pd

from resfuse.bench.report.study_pages import MODELS_PICTURE
from resfuse.bench.studies.models import models_study, models_table
from resfuse.bench.studies.models import speed_table as page_of
from resfuse.bench.studies.models.speed_study import SPEEDS

WHERE = {"env_id": "e", "commit": "c"}


def sheet(*given: dict[str, Any]) -> pd.DataFrame:
    """Rows as results.read_rows gives them."""
    empty = {name: "" if name in SPEEDS.text else float("nan") for name in SPEEDS.columns}
    return pd.DataFrame([{**empty, **WHERE, "status": "pass", **row} for row in given])


def speeds(network: str, batch: int, fused: float, **engine_over: float) -> list[dict[str, Any]]:
    """The rows of a network, given how many times as fast as each backend the engine is."""
    row = {"network": network, "batch_size": batch, "requested_img_size": 64, "img_size": 64}

    def ratio(column: str, value: float) -> dict[str, float]:
        return {column: value, f"{column}_ci_low": 0.9 * value, f"{column}_ci_high": 1.1 * value}

    return [
        *(row | {"backend": name, "peak_mem_mb": 30.0, **ratio("engine_speedup", value)}
          for name, value in engine_over.items()),
        row | {"backend": "fused", "macs_fused_pct": 88.0, **ratio("speedup", fused)},
        row | {"backend": "engine", "setup_s": 12.34, "rebuild_s": 1.5, "peak_mem_mb": 20.0},
    ]  # fmt: skip


ROWS = sheet(
    {"network": "timm dla34", "batch_size": 1, "requested_img_size": 64,
     "backend": "compiled", "engine_speedup": 1.1, "commit": "before"},
    *speeds("timm dla34", 1, 1.3, eager=2.0, openvino=1.25, onnxrt=1.5),
    *speeds("timm dla46_c", 1, 0.97, eager=1.8, openvino=1.5, onnxrt=0.8),
    *speeds("timm repvgg_a0", 1, 1.5, eager=2.0, openvino=0.95, onnxrt=1.5),
    *speeds("timm repvgg_a0", 8, 1.5, eager=1.1, openvino=1.2, onnxrt=1.5),
    {"network": "timm vgg11", "batch_size": 8, "requested_img_size": 64, "backend": "engine",
     "status": "fail_accuracy", "error": "off | by 1"},
)  # fmt: skip


def cells(text: str) -> list[list[str]]:
    """Of the one table in a text."""
    return [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in text.splitlines()
        if line.startswith("|")
    ]


def test_losses_come_first() -> None:
    page = models_table.page(None, (), ROWS)
    assert "engine / compiled" not in page, "the network was measured at a later commit"
    assert (
        "- batch 1, 64 pixels: 3 networks of 2 families; engine / best peer 0.95 in the median, "
        "0.80 at the lowest (timm dla46_c), below 1 on 2; fused / eager 1.30 in the median, "
        "0.97 at the lowest\n"
        "- batch 8, 64 pixels: 1 network of 1 family; engine / best peer 1.10 in the median"
    ) in page
    parts = dict(re.findall(r"### (.*)\n\n((?:[|-].*\n)+)", page))
    assert cells(parts["Families, batch 1, 64 pixels"])[2:] == [
        ["DLA", "2", "0.80", "1.02", "0.97"],
        ["RepVGG", "1", "0.95", "0.95", "1.50"],
    ]
    titles, _, *lines = cells(parts["Networks, batch 1, 64 pixels"])
    assert [line[0] for line in lines] == ["timm dla46_c", "timm repvgg_a0", "timm dla34"]
    assert dict(zip(titles, lines[0], strict=True)) == {
        "network": "timm dla46_c", "pixels": "64", "best peer": "onnxrt",
        "engine / eager": "1.80 [1.62, 1.98]", "engine / onnxrt": "0.80 [0.72, 0.88]",
        "engine / openvino": "1.50 [1.35, 1.65]", "fused / eager": "0.97 [0.87, 1.07]",
        "MACs fused": "88 %", "build, s": "12.3, again 1.5", "memory, MB": "20",
        "of the best peer": "30",
    }  # fmt: skip
    assert parts["What was not measured"] == (
        "- timm vgg11, batch 8, 64 pixels, engine: fail_accuracy: off \\| by 1\n"
    )


def test_there_may_be_nothing_to_draw() -> None:
    failed = ROWS.tail(1)
    assert page_of.picture(failed) is None
    text = models_table.page(None, (), failed)
    assert MODELS_PICTURE not in text and "- batch 8, 64 pixels: 0 networks\n" in text


def test_both_parts_stand_on_one_page() -> None:
    known = models_study.SHEET
    empty = {name: "" if name in known.text else float("nan") for name in known.columns}
    answers = pd.DataFrame([{**empty, **WHERE, "network": "timm dla34", "fuse_status": "pass"}])
    page = models_table.page(answers, models_study.KINDS, ROWS)
    speed, of_answers = page.split("\n## Answers\n")
    assert "\n## Speed\n" in speed and "- fuse: 1 pass\n" in of_answers


def test_a_dot_for_each_network_in_the_line_of_its_family() -> None:
    figure = page_of.picture(ROWS)
    assert figure is not None
    left, right = figure.axes
    assert [tick.get_text() for tick in left.get_yticklabels()] == ["DLA", "RepVGG"]
    dots = {
        (float(x), int(y))
        for line in left.lines
        if line.get_linestyle() == "None"
        for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)
    }
    assert dots == {(1.25, 0), (0.8, 0), (0.95, 1)}
    assert right.get_title() == "batch 8, 64 pixels"


def test_a_late_row_of_a_backend_counts() -> None:
    row = {"network": "timm vgg11", "batch_size": 8, "requested_img_size": 64, "backend": "engine"}
    again = sheet({**row, "rounds": 3}, {**row, "requested_img_size": 96, "rounds": 4})
    found = [one for one in page_of.newest(pd.concat([ROWS, again])) if one.name == "timm vgg11"]
    assert [one.number("engine", "rounds") for one in found] == [3, 4], "a size is a setting"
    one = found[0]
    broken = replace(one, rows={"engine": {**one.rows["engine"], "rounds": float("inf")}})
    assert broken.number("engine", "rounds") is None


def test_rows_of_older_versions_are_of_float32() -> None:
    (old,) = page_of.newest(ROWS[ROWS.network == "timm dla34"])
    assert old.setting == "batch 1, 64 pixels"
    lower = ROWS[ROWS.network == "timm dla34"].assign(precision="bf16")
    both = page_of.newest(pd.concat([ROWS[ROWS.network == "timm dla34"], lower]))
    assert {one.setting for one in both} == {"batch 1, 64 pixels", "batch 1, 64 pixels, bf16"}


def test_a_setting_that_was_not_measured_again_keeps_its_commit() -> None:
    """As the three precisions of a table may take longer than an hour that is quiet."""
    lower = sheet(*speeds("timm dla34", 1, 1.3, eager=2.0, openvino=1.1)).assign(
        precision="bf16", commit="d"
    )
    rows = pd.concat([ROWS, lower])
    found = {(one.setting, one.commit) for one in page_of.newest(rows)}
    assert found == {
        ("batch 1, 64 pixels", "c"),
        ("batch 8, 64 pixels", "c"),
        ("batch 1, 64 pixels, bf16", "d"),
    }
    last = page_of.blocks(rows)[-1]
    assert "commits c (batch 1, 64 pixels; batch 8, 64 pixels) and d (batch 1" in last
    assert page_of.blocks(ROWS)[-1].endswith("environment e, commit c.")


def test_a_network_that_was_measured_again_leaves_the_others_on_the_page() -> None:
    again = sheet(*speeds("timm dla34", 1, 1.4, eager=2.0)).assign(commit="d")
    rows = pd.concat([ROWS, again])
    found = {one.name: one for one in page_of.newest(rows) if one.setting == "batch 1, 64 pixels"}
    before = {one.name for one in page_of.newest(ROWS) if one.setting == "batch 1, 64 pixels"}
    assert set(found) == before and len(before) > 1
    assert {name for name, one in found.items() if one.commit == "d"} == {"timm dla34"}
    assert set(found["timm dla34"].rows) == set(again.backend), "all of it at one commit"
    told = page_of.blocks(rows)[-1]
    assert "c (batch 1, 64 pixels; batch 8, 64 pixels)" in told and "d (batch 1, 64 pixels)" in told


def test_in_int8_eager_is_in_fp32_and_no_peer() -> None:
    rows = sheet(*speeds("timm dla34", 1, 1.3, eager=0.5, openvino=1.1)).assign(precision="int8")
    (one,) = page_of.newest(rows)
    assert one.best_peer == "openvino" and one.over_best == 1.1
    page = "\n\n".join(page_of.blocks(rows))
    assert "| engine / eager in fp32 |" in " ".join(page.split())
