"""`resfuse study models --kinds speed`: who is timed beside whom, what a failure costs, what stands
on the page, and what ends with the command."""

import contextlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest
import torch
from torch import Tensor, nn

import cheats
from resfuse.bench import backends
from resfuse.bench.cli import main
from resfuse.bench.records import results
from resfuse.bench.records.case import Options
from resfuse.bench.records.outcome import Outcome
from resfuse.bench.report.study_pages import MODELS, MODELS_PICTURE
from resfuse.bench.studies.models import (
    measure_speed,
    models_study,
    models_table,
    networks,
    speed_study,
)
from resfuse.bench.studies.models import speed_table as page_of
from resfuse.bench.studies.models.speed_study import SPEEDS

pytestmark = [pytest.mark.usefixtures("own_cache"), pytest.mark.slow]
TINY = "torchvision squeezenet1_1"


def nothing(*_: object, **__: object) -> None:
    """What a worker tells its parent, unheard."""


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory, own_cache: Path) -> tuple[list[str], Path]:
    """The arguments of a small run, and the folder of its results."""
    folder = tmp_path_factory.mktemp("results")
    arguments = [
        "study", "models", "--kinds", "speed", "-m", TINY, "-b", "2", "--img-size", "64",
        "--backend", "eager,fused,engine,tensorrt", "--seconds", "0.05", "--results", str(folder),
    ]  # fmt: skip
    assert main(arguments) == 0
    (home,) = folder.iterdir()
    return arguments, home


def test_ratios_are_taken_both_ways_in_the_same_rounds(measured: tuple[list[str], Path]) -> None:
    rows = results.read_rows(measured[1], SPEEDS).set_index("backend")
    passed = rows[rows.status == "pass"]
    assert list(passed.index) == ["eager", "fused", "engine"]
    assert (passed.rounds >= Options().min_rounds).all() and passed.rounds.nunique() == 1
    assert (passed.setup_s > 0).all() and (passed.rel_l2_err < 1e-5).all()
    assert rows.rebuild_s.notna().tolist() == [False, False, True, False]
    assert rows.loc["engine", "speedup"] == rows.loc["eager", "engine_speedup"]
    for column in ("speedup", "engine_speedup"):
        known = passed[passed[column].notna()]
        assert len(known) == 2
        assert known[column].between(known[f"{column}_ci_low"], known[f"{column}_ci_high"]).all()
    assert rows.loc["fused", "macs_fused_pct"] == 100
    assert (passed.infer_gmacs > 0.01).all() and (passed.img_size == 64).all()
    assert rows.loc["tensorrt", "status"] == "unavailable" and rows.loc["tensorrt", "error"]


def test_the_same_networks_in_bf16(
    measured: tuple[list[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows of their own in the same file, and a part of the page."""
    arguments, home = measured
    fp32 = len(results.read_rows(home, SPEEDS))
    mine = [*arguments, "--backend", "eager,fused", "--precision", "bf16"]
    assert main(mine) == 0
    rows = results.read_rows(home, SPEEDS)
    assert set(rows.precision[:fp32]) == {"float32"}
    lower = rows[fp32:].set_index("backend")
    assert set(lower.precision) == {"bf16"} and list(lower.index) == ["eager", "fused"]
    assert (lower.status == "pass").all(), list(lower.error)
    assert lower.rel_l2_err.between(1e-4, 0.2).all()
    page = (home / MODELS).read_text()
    assert "- batch 2, 64 pixels: 1 network" in page
    assert "- batch 2, 64 pixels, bf16: 0 networks; fused / eager" in page  # without the engine
    assert main([*mine, "--resume"]) == 0
    assert len(results.read_rows(home, SPEEDS)) == fp32 + 2
    assert main([*arguments, "--precision", "int8"]) == 2
    assert "argument --precision: int8 is measured by `resfuse bench`" in capsys.readouterr().err


def test_rows_of_older_versions_are_of_float32() -> None:
    (old,) = page_of.newest(ROWS[ROWS.network == "timm dla34"])
    assert old.setting == "batch 1, 64 pixels"
    lower = ROWS[ROWS.network == "timm dla34"].assign(precision="bf16")
    both = page_of.newest(pd.concat([ROWS[ROWS.network == "timm dla34"], lower]))
    assert {one.setting for one in both} == {"batch 1, 64 pixels", "batch 1, 64 pixels, bf16"}


def test_the_environment_is_that_of_the_processes_that_measured(
    measured: tuple[list[str], Path],
) -> None:
    home = measured[1]
    (env_id,) = set(results.read_rows(home, SPEEDS).env_id)
    malloc = results.read_environments(home)[env_id]["malloc"]
    assert sys.platform != "linux" or "MALLOC_TRIM_THRESHOLD_=" in malloc


def test_the_page_and_its_picture(measured: tuple[list[str], Path]) -> None:
    home = measured[1]
    text = (home / MODELS).read_text()
    assert re.search(
        r"- batch 2, 64 pixels: 1 network of 1 family; engine / best peer \d+\.\d\d", text
    )
    assert f"![engine / best peer, a dot for each network]({MODELS_PICTURE})" in text
    assert f"- {TINY}, batch 2, 64 pixels, tensorrt: unavailable: " in text
    assert (home / MODELS_PICTURE).read_bytes().startswith(b"\x89PNG")


def test_what_is_settled_is_skipped(
    measured: tuple[list[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, home = measured
    before = (home / SPEEDS.file).read_text()
    monkeypatch.setattr(speed_study, "run_task", None)
    assert main([*arguments, "--resume"]) == 0
    assert (home / SPEEDS.file).read_text() == before
    for other in (["-b", "3"], ["--img-size", "96"]):
        with pytest.raises(TypeError):  # it would have run
            main([*arguments, "--resume", *other])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--jobs", "2"], "argument --jobs: 2; times are taken one network at a time"),
        (["--backend", "nosuch"], "argument --backend: unknown name 'nosuch'"),
        (["-b", "0"], "argument --batch-size: 0; accepted: whole numbers from 1"),
        (["--kinds", "speeds"], "argument --kinds: unknown name 'speeds'"),
    ],
)
def test_bad_input_is_a_sentence(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["study", "models", "--kinds", "speed", "-m", TINY, "--results", str(tmp_path)]
    assert main([*asked, *arguments]) == 2
    assert said in capsys.readouterr().err


def plant(monkeypatch: pytest.MonkeyPatch, **builds: Callable[[nn.Module, Tensor], Any]) -> None:
    """Adds backends that are built by these functions."""
    for name in builds:
        monkeypatch.setitem(backends.BACKENDS, name, backends.Backend(name, "planted"))
    real = backends.load
    monkeypatch.setattr(backends, "load", lambda target: builds.get(target) or real(target))


def test_a_failure_while_timing_costs_its_own_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def raises_late(model: nn.Module, example: Tensor) -> Callable[[Tensor], Tensor]:
        calls: list[Tensor] = []

        def run(images: Tensor) -> Tensor:
            calls.append(images)
            if len(calls) > 8:
                raise RuntimeError("out of luck")
            with torch.inference_mode():
                return model(images)

        return run

    plant(monkeypatch, cached=cheats.cached_after_checks, late=raises_late)
    told: list[tuple[object, ...]] = []
    outcomes, span_s = measure_speed.measure(
        TINY, ["cached", "eager", "late"], 1, 64, Options(seconds=0.02),
        lambda *event, **more: told.append(event),
    )  # fmt: skip
    assert {name: one.status for name, one in outcomes.items()} == {
        "cached": "fail_accuracy", "late": "fail_to_run", "eager": "pass",
    }  # fmt: skip
    assert "in a timed round" in outcomes["cached"].error
    assert "out of luck" in outcomes["late"].error
    assert span_s > 0 and told[-1] == ("timed",)


def test_a_network_without_a_reference_is_no_backends_failure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Chaos(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.sin(1e9 * x.mean((2, 3)))

    monkeypatch.setattr(measure_speed, "build", lambda *_: Chaos().eval())
    found, _ = measure_speed.measure(TINY, ["eager", "fused"], 1, 64, Options(), nothing)
    for outcome in found.values():
        assert outcome.status == "unavailable"
        assert re.match("no reference: .*(from fp64|cannot tell inputs apart)", outcome.error)


def answer(backends: list[str], watched_s: float = 1.0) -> dict[str, Any]:
    """What a worker sends."""
    return {
        "outcomes": {name: {"status": "pass"} for name in backends},
        "span_s": 1.0, "watched_s": watched_s,
    }  # fmt: skip


def test_a_backend_that_hangs_costs_its_own_row(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def run_task(
        task: str, job: Mapping[str, Any], limit_s: float, heard: Callable[[dict[str, Any]], None]
    ) -> dict[str, Any] | Outcome:
        asked.append(list(job["backends"]))
        for name in job["backends"]:
            heard({"backend": name})
            if name == "hangs":
                return Outcome("timeout", f"not done after {limit_s:g} s")
        heard({"backend": ""})
        return answer(job["backends"])

    monkeypatch.setattr(speed_study, "run_task", run_task)
    options = Options(timeout_s=7)
    found = dict(speed_study.outcomes(1, TINY, 64, ["eager", "hangs", "fused"], options))
    assert asked == [["eager", "hangs", "fused"], ["eager", "fused"]]
    assert {name: one.status for name, one in found.items()} == {
        "hangs": "timeout", "eager": "pass", "fused": "pass",
    }  # fmt: skip
    assert found["hangs"].error == "as it was set up: not done after 7 s"
    cut_off = speed_study.outcomes(1, TINY, 64, ["hangs", "eager"], options, lambda: 3.0)
    assert dict(cut_off) == {}, "the budget's end is no timeout of the backend's"


def test_clocks_that_disagree_fail_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed_study, "run_task", lambda *_: answer(["eager", "fused"], 9.0))
    found = dict(speed_study.outcomes(1, TINY, 64, ["eager", "fused"], Options()))
    assert {one.status for one in found.values()} == {"fail_to_run"}
    monkeypatch.setattr(speed_study, "run_task", lambda *_: answer(["eager"]))
    found = dict(speed_study.outcomes(1, TINY, 64, ["eager", "fused"], Options()))
    assert "no message of ours" in found["fused"].error


def test_the_budget_ends_it_and_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_task(task: str, job: Mapping[str, Any], *_: object) -> dict[str, Any]:
        time.sleep(0.4)
        return answer(list(job["backends"]))

    monkeypatch.setattr(speed_study, "run_task", run_task)
    asked = ["study", "models", "--kinds", "speed", "-m", "timm resnet1*", "--backend", "eager"]
    assert main([*asked, "-b", "1,8", "--budget", "1", "--results", str(tmp_path)]) == 0
    (home,) = tmp_path.iterdir()
    done = len(results.read_rows(home, SPEEDS))
    assert 1 <= done <= 2
    assert f"{8 - done} of 8 left out for want of time; --resume" in capsys.readouterr().out


def test_every_family_has_its_turn_early() -> None:
    order = networks.in_turns(networks.NETWORKS)
    assert sorted(order) == sorted(networks.NETWORKS)
    assert tuple(order[:15]) == networks.FIRST
    started = order[: 15 + len(networks.FAMILIES)]
    assert {networks.FAMILY[name] for name in started} == set(networks.FAMILIES)
    assert networks.in_turns(["timm:resnet50d", "torchvision googlenet"])[0].endswith("googlenet")


def test_stems_that_shrink_much_get_what_was_asked_where_that_is_enough() -> None:
    sizes = [
        networks.image_size("timm inception_v3", nn.Identity(), wanted) for wanted in (64, 224)
    ]
    assert sizes == [128, 224]


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
    {"network": "timm old", "batch_size": 1, "requested_img_size": 64,
     "backend": "engine", "commit": "before"},
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
    assert "timm old" not in page
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


HANGS = """
import sys, time
from pathlib import Path
from resfuse.bench.studies.models import models_study

def hangs(network, img_size, kinds):
    Path(network).touch()
    time.sleep(600)

models_study.compare = hangs
if __name__ == "__main__":
    list(models_study.rows([sys.argv[1]], 32, 600.0))
"""


@pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux tells a process of its parent's end"
)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_workers_end_with_the_command(number: signal.Signals, tmp_path: Path) -> None:
    script, at_work = tmp_path / "hangs.py", tmp_path / "at-work"
    script.write_text(HANGS)
    parent = psutil.Popen(
        [sys.executable, str(script), str(at_work)], stderr=subprocess.DEVNULL,
        # a shell's background jobs ignore Ctrl-C
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    workers: list[psutil.Process] = []
    try:
        while not at_work.exists():
            assert parent.poll() is None
            time.sleep(0.1)
        workers += parent.children(recursive=True)
        assert workers
        parent.send_signal(number)
        parent.wait(30)
        _, alive = psutil.wait_procs(workers, 30)
        assert not alive
    finally:
        for process in [parent, *workers]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
