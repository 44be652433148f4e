"""`resfuse study models --kinds speed`: who is timed beside whom, in which order, and what a run
writes.
"""

import re
import sys
from pathlib import Path

import pytest
from torch import nn

from resfuse.bench.cli import main
from resfuse.bench.records import results
from resfuse.bench.records.case import Options
from resfuse.bench.report.study_pages import MODELS, MODELS_PICTURE
from resfuse.bench.studies.models import networks, speed_study
from resfuse.bench.studies.models.speed_study import SPEEDS

pytestmark = pytest.mark.slow
TINY = "torchvision squeezenet1_1"


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
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
    assert main([*arguments, "--precision", "int4"]) == 2
    assert "argument --precision" in capsys.readouterr().err


def test_the_same_networks_in_int8(measured: tuple[list[str], Path]) -> None:
    """Calibrated on photographs of their own, beside eager in fp32, which is no peer there."""
    arguments, home = measured
    known = len(results.read_rows(home, SPEEDS))
    backends = "eager,fused,onnxrt,engine"
    assert main([*arguments, "--backend", backends, "--precision", "int8"]) == 0
    rows = results.read_rows(home, SPEEDS)[known:].set_index("backend")
    assert set(rows.precision) == {"int8"}
    assert rows.loc["fused", "status"] == "unavailable" and "int8" in rows.loc["fused", "error"]
    ours = rows.loc[["engine", "onnxrt"]]
    assert (ours.status == "pass").all(), list(ours.error)
    assert ours.rel_l2_err.between(1e-3, 0.5).all() and rows.loc["eager", "rel_l2_err"] < 1e-5
    page = (home / MODELS).read_text()
    (line,) = (line for line in page.splitlines() if f"| {TINY} " in line and "onnxrt" in line)
    assert line.split("|")[3].strip() == "onnxrt" and "engine / eager in fp32" in page


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
