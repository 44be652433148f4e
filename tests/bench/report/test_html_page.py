"""The HTML page in a browser: it filters, sorts, leads from point to row, and breaks at nothing."""

import json
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from browser import opened, settle, started
from report_rows import CASE, FACTS, STAMP, add, add_failed, build_core, headline, tables
from resfuse.bench.records.case_row import columns
from resfuse.bench.records.results import record_environment
from resfuse.bench.report import HTML, write_merged_report, write_report

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with started() as running:
        yield running


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = build_core(tmp_path_factory.mktemp("core"))
    record_environment(folder, STAMP.env_id, FACTS | {"device": "cpu"})
    write_report(folder)
    return folder


def lines(page: Any) -> list[dict[str, str]]:
    """The lines of the table of rows that can be seen, by column title."""
    return page.evaluate(
        """() => {
          const all = (query) => [...document.querySelectorAll("#rows-table " + query)];
          const titles = all("thead th").map((th) => th.innerText.trim());
          const cells = (tr) => [...tr.children].map((td, i) => [titles[i], td.innerText.trim()]);
          return all("tbody tr").filter((tr) => !tr.hidden)
            .map((tr) => Object.fromEntries(cells(tr)));
        }"""
    )


def drawn(page: Any, figure: str) -> set[int]:
    """The rows whose points a plot shows."""
    return set(
        page.evaluate(
            """(id) => document.getElementById(id).data
            .flatMap((trace) => trace.customdata ?? []).filter((row) => row !== null)""",
            figure,
        )
    )


def rows_of(page: Any, **wanted: object) -> set[int]:
    """The rows of the page's first comparison that passed, from its data."""
    data = json.loads(page.locator("#data").text_content())
    names = data["fields"]
    found = set()
    for number, values in enumerate(data["comparisons"][0]["rows"]):
        row = dict(zip(names, values, strict=False))
        if row["status"] == "pass" and all(row[key] == value for key, value in wanted.items()):
            found.add(number)
    return found


def choose(page: Any, value: str) -> None:
    page.locator("#narrow label", has=page.locator(f'input[value="{value}"]')).click()
    settle(page)


def test_the_table_says_what_the_markdown_says(browser: Any, core: Path) -> None:
    page, complaints = opened(browser, core / HTML)
    shown = {(r["model"], int(r["batch"]), r["backend"]): r for r in lines(page)}
    told = headline((core / "DETAILS.md").read_text())
    assert len(told) == 17 and set(told) < set(shown)
    for key, line in told.items():
        for title, text in line.items():
            assert shown[key][title].replace(",", "") == text.replace(",", ""), (key, title)
    assert {shown[key]["status"] for key in set(shown) - set(told)} == {"unavailable"}
    assert complaints == []


def test_filters_narrow_the_table_and_every_plot(browser: Any, core: Path) -> None:
    page, complaints = opened(browser, core / HTML)
    for figure in ("speedup-figure", "roofline-figure"):
        assert drawn(page, figure) == rows_of(page)
    choose(page, "resnet152")
    assert {line["model"] for line in lines(page)} == {"resnet152"}
    for figure in ("speedup-figure", "roofline-figure", "rates-figure", "batch-figure"):
        assert drawn(page, figure) == rows_of(page, model="resnet152"), figure
    assert "two depths" in page.locator("#depth-figure").inner_text()
    choose(page, "8")
    assert {line["batch"] for line in lines(page)} == {"8"}
    assert drawn(page, "speedup-figure") == rows_of(page, model="resnet152", batch=8)
    choose(page, "onnxrt")
    assert [(line["model"], line["batch"], line["backend"]) for line in lines(page)] == [
        ("resnet152", "8", "onnxrt")
    ]
    again, _ = opened(browser, core / HTML, part=page.evaluate("location.hash"))
    assert lines(again) == lines(page)  # the address carries the view
    page.get_by_role("button", name="Show all").click()
    settle(page)
    assert len(lines(page)) == 21 and drawn(page, "speedup-figure") == rows_of(page)
    assert complaints == []


def test_headings_sort_and_empty_cells_stay_last(browser: Any, core: Path) -> None:
    page, _ = opened(browser, core / HTML)

    def rates() -> list[str]:
        return [line["images/s"] for line in lines(page)]

    heading = page.locator("#rows-table th", has_text="images/s")
    heading.get_by_role("button").click()
    speeds = [float(text) for text in rates() if text != "-"]
    assert speeds == sorted(speeds, reverse=True) and len(speeds) == 16
    assert rates()[16:] == ["-"] * 5
    assert heading.get_attribute("aria-sort") == "descending"
    heading.get_by_role("button").click()
    assert [float(text) for text in rates()[:16]] == sorted(speeds)
    assert rates()[16:] == ["-"] * 5
    assert heading.get_attribute("aria-sort") == "ascending"
    page.locator("#rows-table th", has_text="backend").get_by_role("button").click()
    names = [line["backend"] for line in lines(page)]
    assert names == sorted(names)
    assert page.locator("#rows-table [aria-sort]").count() == 1


def test_a_point_leads_to_its_row_and_the_row_to_its_command(browser: Any, core: Path) -> None:
    page, complaints = opened(browser, core / HTML)
    for figure in ("speedup-figure", "rates-figure", "depth-figure", "roofline-figure"):
        # the middle of a point that no other covers: the last trace is drawn on top
        row = page.evaluate(
            """(id) => document.getElementById(id).data
            .findLast((trace) => trace.customdata && trace.type === "scatter").customdata.at(-1)""",
            figure,
        )
        point = page.locator(f"#{figure} .scatterlayer .points path:not(.yerror):not(.xerror)").last
        point.scroll_into_view_if_needed()
        box = point.bounding_box()
        page.mouse.move(box["x"] + box["width"] / 2 - 1, box["y"] + box["height"] / 2)
        page.wait_for_selector(f"#{figure} .hoverlayer .hovertext")
        page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        page.wait_for_selector("#detail[open]")
        line = page.locator(f"#row-{row}")
        assert "marked" in line.get_attribute("class"), figure
        model, batch, backend = line.locator("th, td").all_inner_texts()[:3]
        title = page.locator("#detail-title").text_content()
        assert title == f"{model}, batch {batch}, {backend}"
        words = shlex.split(page.locator("#detail .command code").inner_text())
        assert words[:4] == ["resfuse", "bench", "-m", model]
        assert words[words.index("-b") + 1] == batch
        shown = page.locator("#detail").inner_text()
        assert "Environment xeon-torch2.14.1" in shown and "2.14.1" in shown
        assert STAMP.commit in shown and f"of {core.name}/rows.csv" in shown
        page.keyboard.press("Escape")
        page.wait_for_selector("#detail:not([open])", state="attached")
        assert page.evaluate("document.activeElement.closest('tr').id") == f"row-{row}"
    assert complaints == []


def test_it_can_be_used_without_a_mouse(browser: Any, core: Path) -> None:
    page, _ = opened(browser, core / HTML)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.locator('#narrow input[value="onnxrt"]').focus()
    page.keyboard.press("Space")
    settle(page)
    assert {line["backend"] for line in lines(page)} == {"onnxrt"}
    assert page.evaluate("document.activeElement.value") == "onnxrt"  # redrawing keeps the place
    page.locator("#rows-table tbody tr:not([hidden]) button").first.focus()
    page.keyboard.press("Enter")
    page.wait_for_selector("#detail[open]")
    assert "onnxrt" in page.locator("#detail-title").inner_text()


def test_names_are_text_wherever_they_stand(browser: Any, tmp_path: Path) -> None:
    bait = "</script><img src=x onerror=alert(1)><b>resnet18</b><!--"
    case = replace(CASE, model=bait, backend="<i>onnxrt</i>", weights=bait)
    stamp = replace(STAMP, device_name=bait, env_id=bait)
    add(tmp_path, case, stamp=stamp)
    add(tmp_path, replace(case, batch_size=1), stamp=stamp)
    record_environment(tmp_path, bait, {"<u>fact</u>": bait})
    add(tmp_path, replace(case, backend="__proto__"), stamp=stamp)
    write_report(tmp_path)
    page, complaints = opened(browser, tmp_path / HTML)
    assert page.locator("h1").inner_text() == bait
    assert {line["model"] for line in lines(page)} == {bait}
    page.locator("#rows-table tbody button").first.click()
    assert bait in page.locator("#detail-title").inner_text()
    assert page.locator("#detail dd", has_text=bait).count()
    assert page.locator("img, body b:not(.strip b), i:not(.strip i), u").count() == 0
    plot = page.locator("#speedup-figure .annotation-text").all_text_contents()
    assert bait in [" ".join(text.split()) for text in plot]
    assert complaints == []


def test_environments_and_precisions_are_never_on_one_page_view(
    browser: Any, tmp_path: Path
) -> None:
    rate = 10.0
    for env_id, device in (("a", "Xeon"), ("b", "Xeon"), ("c", "H200")):
        for precision in ("float32", "bfloat16"):
            for model in ("resnet18", "resnet50"):
                rate += 1
                stamp = replace(STAMP, env_id=env_id, device_name=device)
                add(tmp_path, replace(CASE, model=model, precision=precision), stamp, rate=rate)
    out = write_merged_report([tmp_path], tmp_path / "all.html")
    page, complaints = opened(browser, out)
    seen = {}

    def pick(title: str, value: str) -> None:
        chosen = page.locator("#picker label", has_text=title).locator("select")
        if chosen.count():
            chosen.select_option(label=value)
            settle(page)

    for env_id, device in (("a", "Xeon"), ("b", "Xeon"), ("c", "H200")):
        for precision in ("float32 (ieee arithmetic)", "bfloat16 (bf16 arithmetic)"):
            pick("Device", device)
            pick("Environment", f"{env_id}, 2026-05-09")
            pick("Precision", precision)
            shown = {float(line["images/s"]) for line in lines(page)}
            assert len(shown) == 2 and len(drawn(page, "speedup-figure")) == 2
            assert page.locator("h1").inner_text() == device
            assert page.locator("#facts dd").first.inner_text() == env_id
            seen[env_id, precision] = shown
    assert sorted(rate for shown in seen.values() for rate in shown) == list(range(11, 23))
    assert complaints == []


def test_failures_alone_are_a_page_too(browser: Any, tmp_path: Path) -> None:
    add_failed(tmp_path, CASE, "timeout", "no answer in 300 s")
    add_failed(tmp_path, replace(CASE, backend="tensorrt"), "unavailable", "needs an NVIDIA GPU")
    write_report(tmp_path)
    page, complaints = opened(browser, tmp_path / HTML)
    assert "No row shown here has a speed" in page.locator("#lead").inner_text()
    failures = page.locator("#failures").inner_text()
    assert "no answer in 300 s" in failures and "needs an NVIDIA GPU" in failures
    page.locator("#failures button", has_text="row").first.click()
    assert "timeout: it did not end within the time limit" in page.locator("#detail").inner_text()
    assert complaints == []


def test_no_row_at_all_is_said(browser: Any, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text(",".join(columns()) + "\n")
    write_report(tmp_path)
    page, complaints = opened(browser, tmp_path / HTML)
    assert "There is nothing to report" in page.locator("main").inner_text()
    assert complaints == []


@pytest.mark.parametrize("alone", [False, True])
def test_rows_under_load_are_those_of_the_markdown(
    alone: bool, browser: Any, tmp_path: Path
) -> None:
    """The scenarios throughput and server have a table each, beside other rows or without any."""
    server = replace(CASE, scenario="server", qps=50.0)
    found = {"streams": 2, "qps": 50.0, "queries": 662, "p99_ms": 33.3}
    if not alone:
        add(tmp_path, CASE)
    add(tmp_path, replace(CASE, scenario="throughput"), speedup=1.5, **found)
    add(tmp_path, replace(server, model="odd*name"), **found)
    add_failed(tmp_path, replace(server, backend="openvino"), "fail_to_run", "it cannot <keep> up")
    write_report(tmp_path)
    page, complaints = opened(browser, tmp_path / HTML)
    told = [
        (title, cells)
        for title, cells in tables((tmp_path / "DETAILS.md").read_text())
        if title.startswith(("Throughput", "Server"))
    ]
    section = page.locator("#served")
    assert section.locator("h3").all_inner_texts() == list(dict.fromkeys(t for t, _ in told))
    assert section.locator("tbody tr").count() == 3
    text = section.inner_text()
    assert "odd*name, 224 px" in text and "33.3" in text and "it cannot <keep> up" in text
    assert page.locator("#empty").is_hidden() and page.locator("#served-link").count() == 1
    assert complaints == []


def test_a_page_without_such_rows_does_not_speak_of_them(browser: Any, core: Path) -> None:
    page, _ = opened(browser, core / HTML)
    assert page.locator("#served").is_hidden() and page.locator("#served-link").is_hidden()


def test_failures_are_those_of_the_markdown(browser: Any, core: Path) -> None:
    page, _ = opened(browser, core / HTML)
    told = dict(tables((core / "DETAILS.md").read_text()))["Failures and unavailable backends"]
    shown = page.locator("#failures tbody tr").all_inner_texts()
    assert len(told) == len(shown) == 2
    for line, text in zip(told, shown, strict=True):
        assert all(line[title] in text for title in ("status", "cases", "which", "reason"))


def test_the_fastest_and_how_sure_that_is(browser: Any, tmp_path: Path) -> None:
    def measured(backend: str, batch: int, rate: float, low: float, high: float) -> None:
        case = replace(CASE, backend=backend, batch_size=batch)
        middle = (low + high) / 2
        add(tmp_path, case, rate=rate, speedup=middle, speedup_ci_low=low, speedup_ci_high=high)

    measured("eager", 1, 10, 0.99, 1.01)
    measured("onnxrt", 1, 15, 1.45, 1.55)
    measured("compiled", 1, 20, 1.9, 2.1)
    measured("eager", 8, 10, 0.99, 1.01)
    measured("onnxrt", 8, 19, 1.8, 1.95)
    measured("compiled", 8, 20, 1.9, 2.1)
    add_failed(tmp_path, replace(CASE, backend="fused"), "oom", "out of memory")
    write_report(tmp_path)
    page, _ = opened(browser, tmp_path / HTML)
    assert page.locator("#lead").inner_text() == (
        "Of 2 combinations of model and batch, compiled is fastest in all, at 2.00 times the speed "
        "of eager. In 1 the fastest one's interval is clear of every other backend's."
    )
    sure = page.locator(".fastest td.sure").all_inner_texts()
    assert sure == ["clear of the others", "not told apart from onnxrt; 1 failed"]
    assert page.locator(".fastest tbody tr").nth(0).locator(".strip button").count() == 3


@pytest.mark.parametrize("width", [390, 1280])
def test_it_fits_the_window(width: int, browser: Any, core: Path) -> None:
    page, complaints = opened(browser, core / HTML, width=width)
    wide = """() => [document.documentElement.scrollWidth,
        ...[...document.querySelectorAll(".figure")].map((f) => f.scrollWidth - f.clientWidth)]"""
    overall, *figures = page.evaluate(wide)
    assert overall == width
    assert figures == [0] * 5
    page.locator("#rows-table tbody button").first.click()
    assert page.locator("#detail").evaluate("(d) => d.scrollWidth - d.clientWidth") == 0
    assert complaints == []


def test_dark_and_light(browser: Any, core: Path) -> None:
    page, complaints = opened(browser, core / HTML, theme="dark")

    def colours() -> tuple[str, str]:
        return (
            page.evaluate("getComputedStyle(document.body).backgroundColor"),
            page.evaluate(
                """document.getElementById("roofline-figure").data
                .find((trace) => trace.customdata).marker.line.color"""
            ),
        )

    dark = colours()
    page.get_by_role("button", name="Switch to the light theme").click()
    settle(page)
    page.wait_for_timeout(300)
    light = colours()
    assert dark[0] == "rgb(21, 23, 26)" and light[0] == "rgb(250, 250, 248)"
    assert dark[1] != light[1]
    assert complaints == []


def test_paper_is_white_and_the_screen_as_before(browser: Any, core: Path) -> None:
    page, complaints = opened(browser, core / HTML, theme="dark")
    theme = "document.documentElement.dataset.theme"
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate(theme) == "light"
    assert page.locator(".figure .main-svg").count()
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.evaluate(theme) == "dark"
    assert complaints == []
