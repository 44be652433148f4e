"""`resfuse study depth`: which cases it measures, that it is a sweep, and its part of the page."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from report_rows import CASE, add, tables, text_of
from resfuse.bench.cli import main, parser
from resfuse.bench.records import results
from resfuse.bench.report.data.palette import looks
from resfuse.bench.report.data.select import read_folders
from resfuse.bench.report.plots.plot_growth import growth
from resfuse.bench.report.tables.growth import suites
from resfuse.bench.running.session import request_of
from resfuse.bench.running.sweep import expand
from resfuse.bench.studies.depth_study import requests
from resfuse.resnet_ref import MODELS

pytestmark = pytest.mark.slow


def cases_of(*arguments: str, device: str = "cpu") -> list[tuple[str, str, int]]:
    args = parser().parse_args(["study", "depth", *arguments])
    cases = [case for request in requests(args, device) for case in expand(request)]
    assert len(set(cases)) == len(cases)
    return [(case.model, case.backend, case.batch_size) for case in cases]


def test_every_depth_of_both_papers_is_there_with_its_plain_twin() -> None:
    cases = cases_of()
    eager = {model for model, backend, _ in cases if backend == "eager"}
    papers = {name for name in MODELS if name.startswith(("cifar_plain", "plain"))}
    papers |= {f"cifar_resnet{depth}" for depth in (20, 32, 44, 56, 110, 1202)}
    papers |= {f"resnet{depth}" for depth in (18, 34, 50, 101, 152)} | {"preact_resnet200"}
    assert eager == papers
    for backend in ("fused", "engine"):
        assert {model for model, name, _ in cases if name == backend} == eager
    compiled = {model for model, backend, _ in cases if backend == "compiled"}
    assert compiled < eager and "cifar_resnet1202" not in compiled
    assert [backend for _, backend, _ in cases][-len(compiled) :] == ["compiled"] * len(compiled)


def test_batches_go_by_image_size_and_device() -> None:
    def batches(device: str) -> dict[bool, set[int]]:
        cases = cases_of(device=device)
        return {small: {b for m, _, b in cases if m.startswith("cifar") is small}
                for small in (True, False)}  # fmt: skip

    assert batches("cpu") == {True: {8}, False: {1}}
    assert batches("cuda:1") == {True: {128}, False: {32}}
    assert {batch for _, _, batch in cases_of("-b", "2")} == {2}


def test_flags_choose_networks_and_backends() -> None:
    assert cases_of("-m", "cifar*1202,plain18", "--backend", "compiled") == [
        ("cifar_resnet1202", "compiled", 8),
        ("plain18", "compiled", 1),
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-m", "vgg19"], "--model: unknown name 'vgg19'"),
        (["--backend", "eagre"], "--backend: unknown name 'eagre'; did you mean eager"),
        (["--budget", "0"], "--budget: '0'; accepted: numbers above 0"),
        (["-b", "0"], "--batch-size: 0; accepted: whole numbers from 1"),
        (["--precision", "fp8"], "--precision: unknown name 'fp8'"),
    ],
)
def test_bad_arguments(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["study", "depth", "--results", str(tmp_path / "r"), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("resfuse: error: ") and error.count("\n") == 1
    assert said in error
    assert not (tmp_path / "r").exists()


def test_its_cases_are_those_of_a_sweep() -> None:
    """So a study resumes the rows of `resfuse bench`, and the other way round."""
    study = parser().parse_args(["study", "depth", "-m", "plain18", "--backend", "eager"])
    bench = ["bench", "-m", "plain18", "--backend", "eager", "-b", "1", "--channels-last"]
    (asked,) = requests(study, "cpu")
    assert expand(asked) == expand(replace(request_of(parser().parse_args(bench)), device="cpu"))


def test_it_ends_with_the_budget(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["-m", "cifar_plain20", "--backend", "eager", "--budget", "0.1", "--device", "cpu"]
    assert main(["study", "depth", *arguments, "--results", str(tmp_path)]) == 0
    assert "1 case is left out for want of time" in capsys.readouterr().err
    assert not list(tmp_path.glob(f"*/{results.ROWS}"))


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    """Times that go with the depth (2 ms a layer plus 10), and plain networks at half the error."""
    for backend in ("eager", "engine"):
        for kind, error in (("plain", 1e-7), ("resnet", 2e-7)):
            for depth in (20, 56, 110):
                case = replace(CASE, model=f"cifar_{kind}{depth}", backend=backend, img_size=32)
                ms = 10 + 2 * depth
                add(tmp_path, case, rate=8e3 / ms, peak_mem_mb=depth / 2, rel_l2_err=error * depth)
    return tmp_path


def test_what_another_layer_costs(measured: Path) -> None:
    (comparison,) = read_folders([measured])[0].comparisons
    (suite,) = suites(comparison)
    assert suite.title == "CIFAR, 32 px, batch 8"
    assert [(line.label, line.kind) for line in suite.lines] == [
        ("eager", "residual"), ("eager", "plain"), ("engine", "residual"), ("engine", "plain"),
    ]  # fmt: skip
    for line in suite.lines:
        assert line.slope("p50_ms") == pytest.approx(2)
        assert line.doubling("p50_ms") == pytest.approx(2 ** (np.log(230 / 50) / np.log(110 / 20)))
        assert line.slope("peak_mem_mb") == pytest.approx(0.5)
        assert line.slope("joules_per_image") is None
    rows = dict(tables(text_of(measured)))["CIFAR, 32 px, batch 8"]
    assert rows[1]["networks"] == "plain"
    assert rows[1]["memory, MB per 100 layers"] == "50.0"
    assert (rows[1]["error, least depth"], rows[1]["error, greatest depth"]) == (
        "2.00e-6",
        "1.10e-5",
    )


def test_the_plot_has_a_line_for_each_backend_and_kind(measured: Path) -> None:
    (comparison,) = read_folders([measured])[0].comparisons
    figure = growth(comparison, looks(["eager", "engine"]))
    assert figure is not None
    time, memory, error = figure.axes
    assert {line.get_linestyle() for line in time.get_lines()} == {"-", "--"}
    assert [np.asarray(line.get_ydata()).tolist() for line in time.get_lines()] == [
        pytest.approx([50, 122, 230])
    ] * 4
    assert all("M" in ax.get_ylabel() or "ms" in ax.get_ylabel() for ax in (time, memory))
    assert np.asarray(error.get_lines()[1].get_ydata())[0] == pytest.approx(2e-6)


def test_without_plain_networks_there_is_nothing_to_compare(tmp_path: Path) -> None:
    for model in ("resnet18", "resnet50"):
        add(tmp_path, replace(CASE, model=model))
    (comparison,) = read_folders([tmp_path])[0].comparisons
    assert suites(comparison) == []
    assert growth(comparison, looks(["eager"])) is None
    assert "another layer costs" not in text_of(tmp_path)
